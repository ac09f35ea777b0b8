"""The thirteen task types of RULER, generated: eight of needles, variable tracking, two of aggregation, two of reading.

Source of the definitions: RULER, arXiv 2404.06654, section 3 and appendix B (haystacks, counts, chains, frequencies,
tokens to write, scoring). All wording and every word list is our own, and so are the questions of qa_1 and qa_2 unless
a SQuAD or HotpotQA file is given: figures are not those of RULER's own prompts.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from atma.eval.retrieval.aggregation import common_words, frequent_words
from atma.eval.retrieval.haystacks import Haystack
from atma.eval.retrieval.prompts import Ask, Encoder, Insert, NoRoom, Prompt, asked, filled, listing, spliced
from atma.eval.retrieval.questions import Passages, reading
from atma.eval.retrieval.words import hyphenated, uuid


class Retrieve(NamedTuple):
    """A needle task: its haystack, kinds of keys and values, and how many of each."""

    haystack: str
    """"synthetic", "essay" or "needles", where everything else that is read is needles too."""
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    """Of each key that is asked for."""
    queries: int = 1


NIAH = {
    "niah_single_1": Retrieve("synthetic"),
    "niah_single_2": Retrieve("essay"),
    "niah_single_3": Retrieve("essay", value="uuids"),
    "niah_multikey_1": Retrieve("essay", keys=4),
    "niah_multikey_2": Retrieve("needles"),
    "niah_multikey_3": Retrieve("needles", key="uuids", value="uuids"),
    "niah_multivalue": Retrieve("essay", values=4),
    "niah_multiquery": Retrieve("essay", keys=4, queries=4),
}
RULER = (*NIAH, "vt", "cwe", "fwe", "qa_1", "qa_2")
ESSAY = tuple(task for task, kind in NIAH.items() if kind.haystack == "essay")
"""Tasks whose haystack can be chosen."""
ROOM = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
NIAH_ROOM = 128
HOPS = 4


class Source(NamedTuple):
    """What prompts are made of: an encoder, haystacks by name, and passages of the user's for qa_1 and qa_2."""

    encoder: Encoder
    haystacks: Mapping[str, Haystack]
    passages: Mapping[str, Passages]


def ruler_prompt(source: Source, task: str, essay: str, seed: int, index: int, length: int) -> Prompt:
    """Trial `index` of a seed: the same question for every tokenizer. ValueError if `length` has no room for it."""
    rng = np.random.default_rng([seed, index, 1 + RULER.index(task)])
    if task in NIAH:
        return _niah(source, NIAH[task], essay, rng, length)
    if task == "vt":
        return _variables(source, rng, length)
    if task == "cwe":
        return common_words(source.encoder, rng, length, ROOM[task])
    if task == "fwe":
        return frequent_words(source.encoder, rng, length, ROOM[task])
    padding = source.haystacks["synthetic"]
    return reading(source.encoder, source.passages.get(task), task == "qa_2", padding, rng, length, ROOM[task])


def _niah(source: Source, task: Retrieve, essay: str, rng: np.random.Generator, length: int) -> Prompt:
    parts = 3 if task.haystack == "needles" else 2
    keys = _distinct(_named(rng, task.key, parts), task.keys)
    values = _distinct(_named(rng, task.value, parts), task.keys * task.values)
    noun = "number" if task.value == "numbers" else "code"
    lines = [f" The secret {noun} for {key} is {value}." for key, value in zip(_each(keys, task), values, strict=True)]
    depths, end = rng.random(len(lines)).tolist(), int(rng.integers(0, 1 << 32))
    wanted, outputs = keys[: task.queries], tuple(values[: task.values * task.queries])
    inserts = [Insert(depth, source.encoder.ids(line)) for depth, line in zip(depths, lines, strict=True)]

    def context(size: int) -> np.ndarray:
        if task.haystack == "needles":
            more = (f" The secret {noun} for {key} is {value}.\n" for key, value in _others(rng, task, set(keys)))
            ids = listing(source.encoder, [lines[0] + "\n"], more, size, lambda _: "", rng)
            return filled(ids, source.haystacks["synthetic"], size)
        text = source.haystacks[essay if task.haystack == "essay" else task.haystack]
        return spliced(text, text.end(end), _room(size, inserts), inserts)

    before = f"The text below hides some secret {noun}s. Remember them: they are asked for at the end.\n"
    ask = Ask(0, 0, NIAH_ROOM, outputs)
    return asked(source.encoder, length, before, context, _question(noun, wanted, len(outputs)), ask)


def _question(noun: str, keys: list[str], count: int) -> str:
    names = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]
    what = f"secret {noun} for {names}" if count == 1 else f"secret {noun}s for {names}"
    begin = f"The {what} in the text is" if count == 1 else f"The {what} in the text are"
    return f"\nQuestion: which {what} does the text tell?\nAnswer: {begin}"


def _variables(source: Source, rng: np.random.Generator, length: int) -> Prompt:
    """One chain of four hops: five names of one value, told in order at random depths of the synthetic haystack."""
    names = _distinct(_letters(rng), HOPS + 1)
    value = str(rng.integers(10_000, 100_000))
    inserts = [
        Insert(depth, source.encoder.ids(line))
        for depth, line in zip(sorted(rng.random(HOPS + 1).tolist()), _chain(names, value), strict=True)
    ]
    text = source.haystacks["synthetic"]
    end = text.end(int(rng.integers(0, 1 << 32)))
    example = _distinct((name for name in _letters(rng) if name not in names), HOPS + 1)
    before = (
        "The text below hides assignments of variables. Follow them, and name at the end all that hold a value.\n"
        f"Example:{''.join(_chain(example, '54321'))}{_which('54321')} {', '.join(example)}\n\nText:"
    )
    ask = Ask(0, 0, ROOM["vt"], tuple(names))

    def context(size: int) -> np.ndarray:
        return spliced(text, end, _room(size, inserts), inserts)

    return asked(source.encoder, length, before, context, _which(value), ask)


def _chain(names: list[str], value: str) -> list[str]:
    held = [value, *(f"VAR {name}" for name in names)]
    return [f" VAR {name} = {of}." for name, of in zip(names, held, strict=False)]


def _which(value: str) -> str:
    return (
        f"\nQuestion: which variables hold the value {value}?\nAnswer: The {HOPS + 1} variables that hold {value} are"
    )


def _room(size: int, inserts: list[Insert]) -> int:
    left = size - sum(len(insert.ids) for insert in inserts)
    if left < 1:
        raise NoRoom(f"what is hidden alone takes {size - left} of {size} tokens")
    return left


def _each(keys: list[str], task: Retrieve) -> list[str]:
    return [key for key in keys for _ in range(task.values)]


def _others(rng: np.random.Generator, task: Retrieve, used: set[str]) -> Iterator[tuple[str, str]]:
    """Endless needles of keys that are not `used`, nor twice."""
    keys, values = _named(rng, task.key, 3), _named(rng, task.value, 3)
    while True:
        key = next(key for key in keys if key not in used)
        used.add(key)
        yield key, next(values)


def _named(rng: np.random.Generator, kind: str, parts: int) -> Iterator[str]:
    make: dict[str, Callable[[], str]] = {
        "words": lambda: hyphenated(rng, parts),
        "numbers": lambda: str(rng.integers(1_000_000, 10_000_000)),
        "uuids": lambda: uuid(rng),
    }
    while True:
        yield make[kind]()


def _letters(rng: np.random.Generator) -> Iterator[str]:
    """Endless names of five capital letters."""
    while True:
        yield "".join(chr(65 + i) for i in rng.integers(0, 26, 5).tolist())


def _distinct(names: Iterator[str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[next(names)] = None
    return list(found)
