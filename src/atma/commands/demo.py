"""`atma demo`: the whole stack in some minutes."""

from pathlib import Path


def run(out: Path = Path("runs/demo"), minutes: float = 11.0, seeds: int = 1) -> None:
    """Train a small ATMA and its control here and now, evaluate both and the packaged pair far beyond their length.

    Builds a corpus from the Python standard library, trains both models on the same tokens at length 256, measures
    them to 64 times that length, measures the packaged pair, and writes one HTML report with everything. Tokens,
    documents and needles are chosen by this machine's speed so that it ends in time.

    Args:
        out: The folder for data, runs and report.html.
        minutes: What it may take in all, after installation.
        seeds: Pairs to train in that time.
    """
    from atma.demo import demo

    print(f"report: {demo(out, minutes, seeds)}")
