"""BABILong as published, from files that a user has: rows with `input`, `target` and `question`, arXiv 2406.10149.

A file belongs to the task and the length that its path names below the folder: `data/qa1/0k.json` and
`0k/qa1-00000-of-00001.parquet` are the two forms on the hub, `0k/qa1/data-….arrow` is that of a saved data set.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atma.eval.language_model import Row
from atma.eval.reasoning.prompts import Maker, Prompt, commonest
from atma.eval.reasoning.worlds import Task
from atma.eval.suite import sha256

ENDINGS = (".json", ".jsonl", ".parquet", ".arrow")
METADATA = ("dataset_info", "dataset_dict", "state")
FIELDS = ("input", "question", "target")
KILO = 1024


class Entry(NamedTuple):
    """One published row."""

    input: str
    question: str
    target: str


class Published:
    """The rows of one task at one length, and their prompts."""

    def __init__(self, folder: Path, task: Task, length: int, maker: Maker) -> None:
        """ValueError: no such file, a damaged one, one of other fields, or one whose answers differ from examples."""
        files = [path for path in data_files(folder) if names(path.relative_to(folder)) == (task.name, length)]
        if not files:
            known = sorted({label(*found) for path in data_files(folder) if (found := names(path.relative_to(folder)))})
            told = f"it has {', '.join(known)}" if known else "it has no files of tasks and lengths at all"
            raise ValueError(f"{folder}: nothing for {label(task.name, length)}; {told}")
        self.task, self.maker = task, maker
        self.entries = [entry for path in files for entry in read(path)]
        if not self.entries:
            raise ValueError(f"{files[0]}: no rows in it")
        self.answers = tuple(sorted({entry.target for entry in self.entries}))
        """Every target of these rows: what answers are ranked among."""
        if maker.shots and not set(self.answers) & set(task.answers):
            ours = f"'{task.answers[0]}', and {files[0]} has answers such as '{self.answers[0]}'"
            raise ValueError(f"examples of {task.name} have answers such as {ours}; leave out --shots")

    def prompt(self, index: int) -> Prompt:
        """A row as a model is shown it, after the examples that are asked for."""
        entry, writer = self.entries[index], self.maker.writer
        context = writer.tokenizer.encode(entry.input.rstrip() + "\n")
        before, question = self.maker.beginning(self.task, index), writer.question(entry.question)
        ids = np.concatenate([before, context, question]).astype(np.int64)
        return Prompt(ids, writer.answers(self.answers), self.answers.index(entry.target), entry.question)

    def drawn(self, count: int) -> Row:
        """As `Maker.drawn`: of the first `count` rows."""
        return {
            "chance": 1 / len(self.answers),
            "majority": commonest([entry.target for entry in self.entries[:count]]),
            "trials_sha256": sha256([self.entries[:count], self.maker.shots]),
        }


def data_files(folder: Path) -> list[Path]:
    """Files of rows below a folder, in the order of their names. ValueError: no such folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of BABILong's files")
    return sorted(path for path in folder.rglob("*") if path.suffix in ENDINGS and path.stem not in METADATA)


def names(path: Path) -> tuple[str, int] | None:
    """The task and the length in tokens that a path names, None if not one of each."""
    words = re.split(r"[/\\._-]", path.as_posix())
    tasks = [word for word in words if re.fullmatch(r"qa\d+", word)]
    lengths = [word for word in words if re.fullmatch(r"\d+[kM]", word)]
    if len(tasks) != 1 or len(lengths) != 1:
        return None
    return tasks[0], int(lengths[0][:-1]) * (KILO if lengths[0][-1] == "k" else KILO * KILO)


def label(task: str, length: int) -> str:
    """ "qa1 at 4k", or at the number where that is no whole k."""
    for unit, name in ((KILO**2, "M"), (KILO, "k")):
        if length % unit == 0 and (length or unit == KILO):
            return f"{task} at {length // unit}{name}"
    return f"{task} at {length}"


def read(path: Path) -> list[Entry]:
    """The rows of a file. ValueError names it and what is wrong."""
    entries = []
    for number, row in enumerate(_rows(path), 1):
        values = [row.get(field) if isinstance(row, dict) else None for field in FIELDS]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{path}, row {number}: rows must have the texts {', '.join(FIELDS)}")
        context, question, target = (str(value) for value in values)
        entries.append(Entry(context, question.strip(), target.strip()))
    return entries


def _rows(path: Path) -> Sequence[Any]:
    if path.suffix in (".json", ".jsonl"):
        return _json(path)
    return list(_arrow(path))


def _json(path: Path) -> Sequence[Any]:
    """One array, or an object a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{path}: not a file of JSON rows: {error}") from None


def _arrow(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading it needs `pip install 'atma-lm[parquet]'`") from None
    try:
        if path.suffix == ".parquet":
            yield from pyarrow.parquet.read_table(path).to_pylist()
        else:
            with pyarrow.ipc.open_stream(path) as stream:
                yield from stream.read_all().to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: damaged, or not of its kind: {str(error).splitlines()[0]}") from None
