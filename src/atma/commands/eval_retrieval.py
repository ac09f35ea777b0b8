"""`atma eval retrieval`: recall over long contexts, by task, depth and length."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from atma.commands.suite import check_page, command_line, measure, print_table, tell
from atma.eval.measured import Measured
from atma.eval.retrieval.presets import Setting
from atma.eval.retrieval.suite import Retrieval


def run(
    measured: Annotated[Measured, tyro.conf.OmitArgPrefixes] = Measured(),  # noqa: B008
    suite: Annotated[Retrieval, tyro.conf.OmitArgPrefixes] = Retrieval(),  # noqa: B008
    page: Path | None = None,
    prompts: Path | None = None,
) -> None:
    """Measure what a model finds again in a long context: passkeys, needles, and the task types of RULER.

    Presets: needles (the default, for small base models), induction and stage-two (the grids of the ATMA paper), ruler.

    Args:
        measured: Which model, and how.
        suite: What to measure.
        page: Write heat maps of depth and length to this .html file.
        prompts: Measure nothing, but write the prompts, as long in the model's tokens, as texts to this .jsonl file.
    """
    if prompts is not None:
        _export(measured, suite, prompts)
        return
    check_page(page)
    rows, left_out = measure(suite, measured)
    show(rows, f"{suite.preset}: {measured.model}")
    if page is not None:
        from atma.eval.retrieval.heat_map import page as write

        print(f"heat maps: {write(rows, page, command_line())}")
    tell(left_out)


def _export(measured: Measured, suite: Retrieval, path: Path) -> None:
    from atma.eval.retrieval.export import exported
    from atma.eval.retrieval.maker import Maker

    count = exported(Maker(suite, measured.load().tokenizer), path)
    print(f"{count:,} prompts: {path}")


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line for each task, haystack and depth, a column for each length: all right, of how many (tokens or texts)."""
    from atma.eval.retrieval.heat_map import cell_text

    lengths = sorted({row["length"] for row in rows})
    lines: dict[str, dict[int, str]] = {}
    for row in rows:
        setting = Setting(row["task"], row["haystack"], row.get("depth"), row["scoring"], row["kind"] == "absent")
        both = len({one["scoring"] for one in rows}) > 1
        name = f"{setting.words()}, {setting.scoring}" if both else setting.words()
        lines.setdefault(name, {})[row["length"]] = cell_text(row)
    body = [[name, *(found.get(length, "–") for length in lengths)] for name, found in lines.items()]
    return ["", *(f"{length:,}" for length in lengths)], body


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print the table, and how many trials it is of."""
    head, body = table(rows)
    trials = sum(row["trials"] for row in rows if row["kind"] == "retrieval")
    second = {"forced": "answer tokens right, teacher-forced", "greedy": "expected texts found, greedy"}
    told = "; ".join(second[name] for name in second if any(row["scoring"] == name for row in rows))
    caption = f"whole answers right, 95% interval, of how many trials; then {told}; {trials:,} trials in all"
    print_table(title, head, body, caption)
