"""`atma demo`: the whole stack in some minutes."""

from pathlib import Path


def run(
    out: Path = Path("runs/demo"), minutes: float = 11.0, seeds: int = 1, text: Path | None = None, threads: int = 0
) -> None:
    """Ask the packaged models for facts told 16,384 tokens ago, then train small models here and measure them all.

    First, live: facts are hidden at the beginning of a text, by default Python's language reference, and the
    packaged models write them at its end. Then a small ATMA and its control are trained on the same tokens at length
    256, measured to 64 times that length, beside the packaged ones, and one HTML report is written with everything. It
    ends in its minutes on a busy machine too: it plans again as it goes, does less, and says what it left out. Ctrl-C
    ends it with what there is.

    Args:
        out: The folder for data, runs and report.html.
        minutes: What it may take in all, after installation.
        seeds: Models of each kind to train in that time.
        text: A text file to hide the facts in.
        threads: Processor threads; measured by default.
    """
    from atma.demo import demo

    print(f"report: {demo(out, minutes, seeds, text, threads=threads)}")
