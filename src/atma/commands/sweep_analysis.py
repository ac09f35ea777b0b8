"""`atma sweep analyse` and `atma sweep dashboard`: what a sweep shows, in tables and as one page."""

import json as json_module
from collections.abc import Sequence
from pathlib import Path

from atma.commands.tables import print_table
from atma.statistics import says
from atma.sweep.analysis import Analysis
from atma.sweep.analysis_budget import Budget, Loss
from atma.sweep.analysis_compare import Comparison
from atma.sweep.contrasts import Effect
from atma.sweep.table import Cell, Table
from atma.sweep.table_metrics import digits_of, number_text

INTERACTIONS = 12
"""How many interactions are printed."""


def analyse(
    path: Path,
    /,
    metric: str | None = None,
    where: str = "",
    contrast: tuple[str, ...] = (),
    factors: tuple[str, ...] = (),
    budget: Budget | None = None,
    published: Path | None = None,
    json: Path | None = None,
) -> None:
    """Show what the factors of a sweep do: leaders, matched contrasts, interactions and the front of quality and cost.

    Effects are means over pairs of cells equal in all other factors and in the seed, with bootstrapped 95% intervals
    and an exact sign test. Contrasts are written like "memory where polar" or "polar+memory - nope+memory".

    Args:
        path: A sweep folder, or a .csv file with one cell a row.
        metric: What to judge by, such as clean_nll_4096; without its length the longest is meant, and @32x is 32 times
            the training length. Default: needle token accuracy at the longest length.
        where: Only these cells, such as "polar+memory" or "attention=polar|nope".
        contrast: Further contrasts to show.
        factors: The columns of a .csv that are factors. Default: those before the first known metric.
        budget: Judge by the loss at equal tokens or seconds of training, the most that every run reached: --metric
            validation_loss (default), or train_loss where runs were validated too rarely.
        published: The paper's table (.csv), to show its contrasts beside ours.
        json: Also write everything to this file.
    """
    from atma.sweep.analysis import analyse as analysed
    from atma.sweep.analysis_budget import at_budget
    from atma.sweep.analysis_compare import compare
    from atma.sweep.table_reading import load_table

    table = load_table(path, factors)
    if budget is not None:
        table, metric = at_budget(table, budget, loss=_loss_of(metric))
    found = analysed(table, metric, where, contrast)
    compared = compare(table, load_table(published)) if published is not None else []
    show(found, compared)
    if json is not None:
        told = found.as_dict() | {"published": [comparison.as_dict() for comparison in compared]}
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_module.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"written: {json}")


def dashboard(
    path: Path,
    /,
    out: Path = Path("dashboard.html"),
    metric: str | None = None,
    factors: tuple[str, ...] = (),
    title: str | None = None,
) -> None:
    """Write a sweep as one HTML page that needs no network: filters, cells, contrasts, curves, recipes and logs.

    Args:
        path: A sweep folder, or a .csv file with one cell a row.
        out: The page to write.
        metric: What to judge by at first; the page can change it. Default: needle token accuracy at the longest length.
        factors: The columns of a .csv that are factors. Default: those before the first known metric.
        title: The page's title. Default: the name of the sweep.
    """
    from atma.sweep.dashboard import page
    from atma.sweep.table_reading import load_table

    written = page(load_table(path, factors), out, title, metric)
    print(f"written: {written} ({written.stat().st_size / 1e6:.2f} MB)")


def _loss_of(metric: str | None) -> Loss:
    known: dict[str | None, Loss] = {None: "validation", "validation_loss": "validation", "train_loss": "train"}
    if metric not in known:
        raise ValueError(f"--metric {metric}: at an equal --budget there are validation_loss and train_loss")
    return known[metric]


def show(found: Analysis, compared: Sequence[Comparison] = ()) -> None:
    """Print an analysis as tables."""
    from rich.console import Console

    console = Console()
    table = found.table
    subset = f" where {found.where}" if found.where else ""
    console.print(f"{table.name}{subset}: {len(table.cells)} cells, judged by {found.metric}", markup=False)
    if table.unfinished:
        console.print(f"no result yet: {len(table.unfinished)} ({', '.join(table.unfinished[:5])} …)", markup=False)
    _print_cells(f"Leaders of {len(found.leaders)}", table, found.leaders[:10], found)
    if found.front:
        _print_cells(f"Front of {found.metric} and {' and '.join(found.costs)}", table, found.front, found)
    _print_effects("Contrasts asked for", found.contrasts)
    _print_effects("Main effects", found.effects)
    largest = sorted(found.interactions, key=lambda effect: -abs(effect.mean or 0))[:INTERACTIONS]
    count = f"{len(largest)} largest of {len(found.interactions)}"
    _print_effects(f"Interactions: differences of differences, {count} (all with --json)", largest)
    _print_comparisons(compared)


def _print_cells(title: str, table: Table, cells: Sequence[Cell], found: Analysis) -> None:
    columns = list(dict.fromkeys((found.metric, *_beside(table), *found.costs)))
    rows = [[cell.name, *(number_text(cell.metrics.get(name), digits_of(name)) for name in columns)] for cell in cells]
    _print(title, ["cell", *(name.replace("_", " ") for name in columns)], rows)


def _beside(table: Table) -> list[str]:
    longest = list(table.family("clean_nll").values())[-1:]
    return [*longest, *(name for name in table.metrics if name == "final_val_loss_nats")]


def _print_effects(title: str, effects: Sequence[Effect]) -> None:
    rows = [_effect_row(effect) for effect in effects]
    header = ["contrast", "pairs", "mean", "95% interval", "median", "range", "+ / 0 / −", "sign test p"]
    caption = (
        "pairs in how many settings, and cells left out for want of a partner; intervals resample settings; "
        "neither they nor p are corrected for the number of rows"
    )
    _print(title, header, rows, caption)


def _effect_row(effect: Effect) -> list[str]:
    digits = digits_of(effect.metric)
    low, high, mean, median = (
        number_text(v, digits, signed=True) for v in (effect.low, effect.high, effect.mean, effect.median)
    )
    ends = [number_text(end(effect.differences, default=None), digits, signed=True) for end in (min, max)]
    counts = f"{effect.positive} / {effect.zero} / {effect.negative}"
    p = "–" if effect.p is None else f"{effect.p:.2g}"
    pairs = str(len(effect.differences))
    if effect.settings < len(effect.differences):
        pairs += f" in {effect.settings}"
    if effect.unmatched:
        pairs += f", {effect.unmatched} left out"
    return [effect.label, pairs, mean, f"{low} … {high}", median, " … ".join(ends), counts, p]


def _print_comparisons(compared: Sequence[Comparison]) -> None:
    rows = []
    for comparison in compared:
        sign = {None: comparison.reason or says(None, None), True: "yes", False: "no"}[comparison.agree]
        rows.append([comparison.words, _brief(comparison.published), _brief(comparison.ours), sign])
    caption = f"{says(None, None)}: an interval spans zero, so that its sign says nothing"
    _print("Beside the paper", ["contrast", "paper, mean [95%]", "ours, mean [95%]", "same sign"], rows, caption)


def _brief(effect: Effect | None) -> str:
    if effect is None:
        return "–"
    digits = digits_of(effect.metric)
    mean, low, high = (number_text(v, digits, signed=True) for v in (effect.mean, effect.low, effect.high))
    return f"{mean} [{low}, {high}] {effect.positive}/{len(effect.differences)}"


def _print(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> None:
    """Print a table, or nothing where it has no rows."""
    if rows:
        print_table(title, header, rows, caption or "")
