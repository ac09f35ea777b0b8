"""Files of many documents: JSON lines, JSON, tables of text, parquet. Each reader gives (name, text) row by row."""

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from atma.data.conversations import CONVERSATIONS
from atma.data.fields import texts
from atma.data.left_out import Document, LeftOut, NoField
from atma.data.streams import inner_name, open_text

Reader = Callable[[Path, str, str, LeftOut], Iterator[Document]]
"""Reads a file, by its path, the name it has in the source, the field, and where to note what is left out."""
_DELIMITERS = ",\t;|"
_WHOLE = 1 << 16


def reader_of(path: Path) -> Reader | None:
    """The reader of a file of many documents, by its ending, or else its first lines; None for one that is one text."""
    name = inner_name(path)
    if path.name.lower().endswith((".parquet", ".pq")):
        return parquet
    if name.endswith((".jsonl", ".ndjson", ".jsonlines", ".jl", ".ldjson", ".geojsonl")):
        return json_lines
    if name.endswith(".json"):
        return json_file
    if name.endswith((".csv", ".tsv")):
        return table
    return json_lines if _is_lines(path, 2) else None


def json_lines(path: Path, name: str, field: str, left_out: LeftOut) -> Iterator[Document]:
    """A JSON value a line; blank lines are none."""
    number, first = 0, True
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                line = line.lstrip("\ufeff")  # files that were joined each bring their mark
                if line.strip():
                    row = _parsed(line.strip(), f"{path}, line {number}")
                    for text in texts(row, field, f"{path}, line {number}", left_out, first):
                        yield Document(f"{name}:{number}", text)
                    first = False
    except UnicodeError:
        raise ValueError(f"{path}, after line {number}: not UTF-8 text") from None


def json_file(path: Path, name: str, field: str, left_out: LeftOut) -> Iterator[Document]:
    """One array of records or texts, one record, or, as data sets often have it under this ending, JSON lines."""
    if _is_lines(path):
        yield from json_lines(path, name, field, left_out)
        return
    try:
        with open_text(path) as file:
            values = _parsed(file.read(), str(path))
    except UnicodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    rows = values if isinstance(values, list) else [values]
    for number, row in enumerate(rows, 1):
        for text in texts(row, field, f"{path}, record {number}", left_out, number == 1):
            yield Document(f"{name}:{number}", text)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read: nested without end") from None
    except ValueError as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) and error.lineno > 1 else ""
        raise ValueError(f"{where}{line}: not JSON: {getattr(error, 'msg', error)}") from None


def _is_lines(path: Path, records: int = 1) -> bool:
    """Whether each of the first lines, so many, of a file that has two or more is a whole record."""
    try:
        with open_text(path) as lines:
            rows = list(itertools.islice((line.lstrip("\ufeff") for line in lines if line.strip()), 2))
        whole = len(rows) == 2 and rows[0].lstrip().startswith("{")
        return whole and all(isinstance(json.loads(row), dict) for row in rows[:records])
    except (OSError, ValueError, RecursionError):
        return False


def table(path: Path, name: str, field: str, left_out: LeftOut) -> Iterator[Document]:
    """Rows of text with the names of their columns first, apart by commas, tabs, semicolons or bars."""
    csv.field_size_limit(sys.maxsize)
    number = 0
    try:
        with open_text(path, newline="") as file:
            head = file.readline()
            by = "\t" if inner_name(path).endswith(".tsv") else _delimiter(head, field)
            rows = csv.reader(itertools.chain([head], file), delimiter=by, strict=True)
            columns = [column.strip().lstrip("\ufeff") for column in next(rows, [])]
            if field not in (*columns, CONVERSATIONS):
                raise NoField(f"{path}: no column '{field}'; it has {', '.join(columns)}")
            place = columns.index(field) if field in columns else None
            for number, row in enumerate(rows, 1):
                if not row:
                    continue
                if len(row) != len(columns):
                    cells = f"{len(row)} cells where the columns are {len(columns)}"
                    raise ValueError(f"{path}, row {number}: {cells}: not a table, or damaged")
                if place is not None:
                    yield Document(f"{name}:{number}", row[place])
                    continue
                whole = dict(zip(columns, row, strict=True))
                for text in texts(whole, field, f"{path}, row {number}", left_out, number == 1):
                    yield Document(f"{name}:{number}", text)
    except UnicodeError:
        raise ValueError(f"{path}, after row {number}: not UTF-8 text") from None
    except csv.Error as error:
        raise ValueError(f"{path}, after row {number}: not a table of text: {error}") from None


def _delimiter(head: str, field: str) -> str:
    """What lies between columns: where the head then has the field, else where it has most columns."""
    split = {by: [cell.strip().strip('"').lstrip("\ufeff") for cell in head.strip().split(by)] for by in _DELIMITERS}
    return next((by for by, cells in split.items() if field in cells), max(split, key=lambda by: len(split[by])))


def parquet(path: Path, name: str, field: str, left_out: LeftOut) -> Iterator[Document]:
    """The column of a parquet file, which may lie within another."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs `pip install 'atma-lm[parquet]'`") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            column = field if field in columns else next((c for c in columns if field.startswith(f"{c}.")), None)
            if column is None and field != CONVERSATIONS:
                raise NoField(f"{path}: no column '{field}'; it has {', '.join(columns)}")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column] if column else None):
                for row in batch.to_pylist():
                    number += 1
                    first = number == 1 and column is None
                    for text in texts(row, field, f"{path}, row {number}", left_out, first):
                        yield Document(f"{name}:{number}", text)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path}: not a whole parquet file: {str(error).splitlines()[0]}") from None
    except UnicodeError:
        raise ValueError(f"{path}: its column '{field}' holds text that is not UTF-8") from None


def rows_of(rows: Any, name: str, field: str, left_out: LeftOut) -> Iterator[Document]:
    """Rows of a Hugging Face data set."""
    for number, row in enumerate(rows, 1):
        for text in texts(row, field, f"{name}, row {number}", left_out, number == 1):
            yield Document(f"{name}:{number}", text)
