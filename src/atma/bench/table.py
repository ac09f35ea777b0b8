"""The rows of a measurement as text: for the terminal, and as a table in Markdown."""

from typing import TYPE_CHECKING

from atma.bench.rows import Result, Row
from atma.report.content import size_text

if TYPE_CHECKING:
    from rich.table import Table

LEAST_COLUMNS = 112
LEGEND = (
    "median: of the rounds; spread: interquartile range over median; floor: least time for the work at this machine's "
    "rates, set by operations or bytes; × peer: median over that of the fastest peer"
)
MODEL_LEGEND = (
    "; of peak: operations a second over the rate of matrix products; calls: share of the same layers with next to no "
    "arithmetic in them (Python, dispatch, launches)"
)


def header(result: Result) -> list[str]:
    """Column names."""
    names = ["what", "sizes", "dtype", "by", "median", "spread", "floor", "set by", "× floor", "× peer"]
    return names if result.kind == "ops" else [*names, "tokens/s", "weights", "of peak", "calls"]


def cells(result: Result, row: Row) -> list[str]:
    """One row as text."""
    shared = [
        row.what,
        " ".join(f"{name} {size_text(value)}" for name, value in row.sizes.items()),
        row.dtype,
        row.name,
        duration(row.seconds),
        f"{(row.high - row.low) / row.seconds:.0%}",
        duration(row.floor),
        row.bound,
        f"{row.to_floor:.3g}",
        "–" if row.to_peer is None else f"{row.to_peer:.2f}",
    ]
    if result.kind == "ops":
        return shared
    about = row.about
    overhead = f"{about['overhead']:.0%}" if "overhead" in about else "–"
    speed, share = f"{about['tokens_per_second']:,.0f}", f"{about['product_share']:.0%}"
    return [*shared, speed, f"{about['parameters'] / 1e6:,.2f}M", share, overhead]


def duration(seconds: float) -> str:
    """Seconds for people, three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def rates_text(result: Result) -> str:
    """The two rates that floors are made of."""
    products = ", ".join(f"{name} {rate / 1e9:,.3g} GFLOP/s" for name, rate in result.rates.operations.items())
    return f"matrix products: {products}; copying: {result.rates.bytes / 1e9:,.3g} GB/s"


def legend(result: Result) -> str:
    """What the columns mean."""
    return LEGEND if result.kind == "ops" else LEGEND + MODEL_LEGEND


def show(result: Result) -> None:
    """Print a table for each case, the rates and the notes."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, LEAST_COLUMNS)
    for rows in cases(result):
        console.print(_drawn(result, rows))
    for text in (rates_text(result), legend(result), *(f"note: {note}" for note in result.notes)):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def cases(result: Result) -> list[list[Row]]:
    """The rows that are compared with each other."""
    grouped: dict[tuple, list[Row]] = {}
    for row in result.rows:
        grouped.setdefault((row.what, row.dtype, *row.sizes.items()), []).append(row)
    return list(grouped.values())


def _drawn(result: Result, rows: list[Row]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    what, sizes, dtype, *_ = cells(result, rows[0])
    table = Table(title=f"{what}, {dtype}: {sizes}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(header(result)[3:]):
        width = 14 if i == 0 else 7
        table.add_column(name, justify="left" if i == 0 else "right", min_width=width, no_wrap=True)
    for row in rows:
        table.add_row(*cells(result, row)[3:], style="bold" if row.ours else None)
    return table


def markdown(result: Result) -> str:
    """The same as Markdown."""
    rows = [header(result), ["---"] * len(header(result)), *(cells(result, row) for row in result.rows)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = "\n".join(f"- {note}" for note in result.notes)
    return f"`{result.command}`\n\n{table}\n\n{rates_text(result)}; {legend(result)}\n\n{notes}\n"
