"""Parts of a model by patterns of their names: which a pattern hits, the nearest to one that hits none, and a table."""

import difflib
import itertools
import re
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple


class Part(NamedTuple):
    """A part of a model: its name, its shape, and how many numbers of it (or added to it) are trained."""

    name: str
    shape: tuple[int, ...]
    numbers: int


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is a name, its end or what holds it: "q_proj", "blocks.3", "mlp". * stands for anything."""
    return any(fnmatchcase(f".{name}.", f"{before}.{pattern}.{after}") for before in ("", "*") for after in ("", "*"))


def unmatched(what: str, pattern: str, names: Collection[str], kind: str) -> str:
    """What is said of a pattern, given as `what`, that hits none of the names."""
    parts = [name.split(".") for name in names]
    ends = dict.fromkeys(".".join(own[first:]) for own in parts for first in range(len(own)))
    within = dict.fromkeys(part for own in parts for part in own if not part.isdigit())
    near = difflib.get_close_matches(pattern, [*within, *ends], 1, 0.0)[:1]
    return f"'{what}': '{pattern}' hits no {kind} of the model" + (f"; did you mean '{near[0]}'?" if near else "")


def table(what: str, parts: Collection[Part]) -> Iterator[str]:
    """A line for parts that are alike but for the numbers in their names."""
    rows = dict[tuple[str, tuple[int, ...]], list[Part]]()
    for part in parts:
        rows.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", part.name), part.shape), []).append(part)
    width = max((len(name) for name, _ in rows), default=0)
    for (name, shape), alike in rows.items():
        layers = _ranges([int(number) for part in alike for number in re.findall(r"\.(\d+)\.", part.name)[:1]])
        size = " × ".join(map(str, shape)) or "1"
        total = sum(part.numbers for part in alike)
        yield f"{what:9} {name:{width}}  {size:>14}  {total:>12,} numbers{layers and f'  layers {layers}'}"


def _ranges(numbers: list[int]) -> str:
    """Numbers as "0-3, 5"."""
    told = []
    for _, group in itertools.groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        told.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(told)
