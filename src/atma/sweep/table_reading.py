"""Tables from files: the results in a sweep folder, or a CSV file of somebody else's sweep.

In a CSV the columns before the first known metric are the factors, unless they are declared; `seed` and `cell` are the
cell's seed and name wherever they stand; all other columns are metrics.
"""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atma.sweep.table import Cell, Level, Table, label, order, table
from atma.sweep.table_metrics import KNOWN


def load_table(path: str | Path, factors: Sequence[str] = ()) -> Table:
    """The table of a sweep folder or a .csv file; `factors` declares a CSV's factor columns.

    ValueError names the file and what is wrong in it; FileNotFoundError if there is nothing at `path`.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such sweep folder or CSV file")
    return _csv(path, list(factors))


def _folder(path: Path) -> Table:
    folders = [path / "cells" / name for name in _planned(path)]
    if not folders:
        raise ValueError(f"{path}: no sweep (it has no cells/); name the folder of `atma sweep run`, or a .csv file")
    done = [folder for folder in folders if (folder / "result.json").exists()]
    unfinished = [folder.name for folder in folders if folder not in done]
    return table(path.resolve().name, [_result(folder) for folder in done], unfinished)


def _planned(path: Path) -> list[str]:
    """The ids of the cells that the sweep's plan names, else of all that have a folder."""
    plan = path / "plan.json"
    if not plan.exists():
        return sorted(folder.name for folder in (path / "cells").glob("*") if folder.is_dir())
    try:
        return [str(cell["cell"]) for cell in json.loads(plan.read_text(encoding="utf-8"))["cells"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{plan}: not the plan of a sweep, or damaged; `atma sweep run` writes it again") from None


def _result(folder: Path) -> Cell:
    path = folder / "result.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        factors, metrics = dict(found["factors"]), dict(found["metrics"])
        name, seed, config = str(found["cell"]), int(found["seed"]), dict(found.get("config") or {})
        attempt = dict(found.get("provenance") or {}).get("attempt")
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: not the result of a cell ({type(error).__name__}: {error}); run it again") from None
    for factor, level in factors.items():
        if not isinstance(level, Level):
            raise ValueError(f"{path}: factor '{factor}' is {level!r}; a level is one text, number, true or false")
    for metric, value in metrics.items():
        if not isinstance(value, int | float | None) or isinstance(value, bool):
            raise ValueError(f"{path}: metric '{metric}' is {value!r}; a metric is a number")
    return Cell(name, factors, seed, _finite(metrics), config, folder, _record(folder, attempt))


def _record(folder: Path, attempt: Any) -> Path | None:
    """The cell's training record, else that of this attempt; where its number is not known, of the last one."""
    runs = folder.glob(f"run-{attempt:06}" if isinstance(attempt, int) else "run-*")
    records = [home / "metrics.jsonl" for home in (folder, *sorted(runs, reverse=True))]
    return next((record for record in records if record.is_file()), None)


def _csv(path: Path, declared: list[str]) -> Table:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            header, rows = list(reader.fieldnames or []), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file of UTF-8 text ({error})") from None
    factors = _factor_columns(path, header, declared)
    metrics = [name for name in header if name not in (*factors, "seed", "cell")]
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {number}: it has another number of columns than the header")
    return _cells(path, rows, factors, metrics)


def _factor_columns(path: Path, header: list[str], declared: list[str]) -> list[str]:
    if twice := [name for name in set(header) if header.count(name) > 1]:
        raise ValueError(f"{path}: column '{twice[0]}' stands twice in the header")
    for name in declared:
        if name not in header:
            raise ValueError(f"{path}: no column '{name}' to be a factor; columns: {', '.join(header)}")
    first = next((i for i, name in enumerate(header) if KNOWN.fullmatch(name)), 0)
    found = declared or [name for name in header[:first] if name not in ("seed", "cell")]
    if not found:
        raise ValueError(f"{path}: which columns are factors? Name them with --factors; columns: {', '.join(header)}")
    return found


def _cells(path: Path, rows: list[dict[str, str]], factors: list[str], metrics: list[str]) -> Table:
    found = [{factor: _level(row[factor]) for factor in factors} for row in rows]
    levels = {factor: order(row[factor] for row in found) for factor in factors}
    cells = []
    for number, (row, levelled) in enumerate(zip(rows, found, strict=True), 2):
        where = f"{path}, line {number}"
        seed = _number(where, "seed", row.get("seed") or "0")
        if not seed.is_integer():
            raise ValueError(f"{where}: '{row['seed']}' in column 'seed' is not a whole number")
        measured = {name: _number(where, name, row[name]) for name in metrics if row[name].strip()}
        cells.append(Cell(row.get("cell") or label(levelled, levels), levelled, int(seed), _finite(measured)))
    return table(path.name, cells)


def _level(text: str) -> Level:
    text = text.strip()
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _number(where: str, column: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        mend = "declare it with --factors if it is a factor"
        raise ValueError(f"{where}: '{text}' in column '{column}' is not a number; {mend}") from None


def _finite(metrics: dict[str, Any]) -> dict[str, float]:
    """Numbers that can be computed with; what was not measured or was not finite (null, NaN, inf) is left out."""
    return {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
