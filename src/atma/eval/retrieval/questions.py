"""Reading: a question whose answer stands in one passage (qa_1) or takes two (qa_2), among passages that do not matter.

The passages are generated facts about towns, rivers and ships that do not exist, or those of a SQuAD or HotpotQA file.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atma.eval.retrieval.haystacks import Haystack
from atma.eval.retrieval.prompts import Ask, Encoder, Prompt, asked, filled, listing
from atma.eval.retrieval.words import listed, made_up
from atma.eval.suite import sha256

GOODS = listed(
    "amber glass|black tea|brass bells|clay bricks|copper wire|dark honey|fine paper|fishing nets|garden seeds|"
    "goat cheese|green soap|iron nails|lamp oil|linen sails|oak barrels|olive oil|pine tar|river salt|"
    "silk ribbon|sour cherries|steel springs|wax candles|white lace|wool blankets"
)
MATERIALS = ("brick", "granite", "iron", "limestone", "marble", "oak", "sandstone", "slate", "steel", "timber")
COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "purple", "red", "white", "yellow")


class Question(NamedTuple):
    """A question, texts of which each answers it, and the passages that one must have read."""

    text: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]


class Passages(NamedTuple):
    """Questions, and all passages from which others are taken for company."""

    questions: list[Question]
    pool: list[str]
    sha256: str


def reading(
    encoder: Encoder,
    passages: Passages | None,
    two_hops: bool,
    padding: Haystack,
    rng: np.random.Generator,
    length: int,
    room: int,
) -> Prompt:
    """qa_1 or, with `two_hops`, qa_2: numbered passages in random order and a question. Any of its answers counts."""
    question, others = _taken(passages, rng) if passages else _invented(two_hops, rng)

    def context(size: int) -> np.ndarray:
        first = [_passage(text) for text in question.passages]
        ids = listing(encoder, first, map(_passage, others), size, lambda number: f"Passage {number}:\n", rng)
        return filled(ids, padding, size)

    before = "Read the passages, then answer the question in a few words.\n"
    after = f"\nQuestion: {question.text}\nAnswer:"
    return asked(encoder, length, before, context, after, Ask(0, 0, room, question.answers, any=True))


def _passage(text: str) -> str:
    return f"{text.strip()}\n"


def _taken(passages: Passages, rng: np.random.Generator) -> tuple[Question, Iterator[str]]:
    """A question of a file, and its other passages in random order, again and again where there are too few."""
    question = passages.questions[int(rng.integers(len(passages.questions)))]
    order = rng.permutation(len(passages.pool)).tolist()
    others = [passages.pool[i] for i in order if passages.pool[i] not in question.passages]
    return question, itertools.cycle(others)


class _Town(NamedTuple):
    name: str
    text: str
    facts: tuple[tuple[str, str], ...]
    """Questions, with {town} for what names the town, and answers."""


def _invented(two_hops: bool, rng: np.random.Generator) -> tuple[Question, Iterator[str]]:
    names = (word.capitalize() for word in made_up(rng))
    town = _town(names, rng)
    asked_for, answer = town.facts[int(rng.integers(len(town.facts)))]
    if not two_hops:
        others = (_town(names, rng).text for _ in itertools.count())
        return Question(asked_for.format(town=town.name), (answer,), (town.text,)), others
    ship = next(names)
    name = f"the town where the ship {ship} was built"
    question = Question(asked_for.format(town=name), (answer,), (_ship(ship, town.name, rng), town.text))
    return question, _fleet(names, rng)


def _fleet(names: Iterator[str], rng: np.random.Generator) -> Iterator[str]:
    """Endless pairs of a ship and the town where it was built."""
    while True:
        town = _town(names, rng)
        yield _ship(next(names), town.name, rng)
        yield town.text


def _town(names: Iterator[str], rng: np.random.Generator) -> _Town:
    name, river = next(names), next(names)
    year, goods, material = int(rng.integers(1100, 1900)), _one(GOODS, rng), _one(MATERIALS, rng)
    text = (
        f"{name} is a town on the river {river}. It was founded in {year}. "
        f"The people of {name} are known for making {goods}. The oldest bridge there is built of {material}."
    )
    facts = (
        ("On which river does {town} lie?", river),
        ("In which year was {town} founded?", str(year)),
        ("What are the people of {town} known for making?", goods),
        ("Which material does the oldest bridge of {town} consist of?", material),
    )
    return _Town(name, text, facts)


def _ship(name: str, town: str, rng: np.random.Generator) -> str:
    return (
        f"The ship {name} was built in {town}. Her hull was painted {_one(COLOURS, rng)}, "
        f"and on her first voyage she carried {int(rng.integers(20, 900))} barrels."
    )


def _one(words: tuple[str, ...], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]


def read_squad(path: Path) -> Passages:
    """A SQuAD file (version 1.1 or 2.0; questions without an answer are left out). ValueError if it is none."""
    data, digest = _json(path)
    try:
        paragraphs = [paragraph for article in data["data"] for paragraph in article["paragraphs"]]
        questions = [
            Question(qa["question"].strip(), _texts(qa["answers"]), (paragraph["context"],))
            for paragraph in paragraphs
            for qa in paragraph["qas"]
            if qa["answers"]
        ]
        pool = [paragraph["context"] for paragraph in paragraphs]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a SQuAD file: it needs data, paragraphs, context, qas and answers") from None
    return _checked(path, questions, pool, digest)


def read_hotpot(path: Path) -> Passages:
    """A HotpotQA file (distractor setting): the passages of its supporting facts must be read. ValueError if none."""
    data, digest = _json(path)
    questions, pool = [], []
    try:
        for row in data:
            texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]}
            needed = tuple(texts[title] for title in dict.fromkeys(t for t, _ in row["supporting_facts"]))
            questions.append(Question(row["question"].strip(), (row["answer"],), needed))
            pool += texts.values()
    except (KeyError, TypeError, ValueError, AttributeError):
        what = "a list of question, answer, context and supporting_facts"
        raise ValueError(f"{path}: not a HotpotQA file: {what}") from None
    return _checked(path, questions, pool, digest)


def _checked(path: Path, questions: list[Question], pool: list[str], digest: str) -> Passages:
    """Without empty answers and passages, and questions left without an answer. ValueError: no texts, or too few."""
    for found in (*pool, *(text for one in questions for text in (one.text, *one.answers, *one.passages))):
        if not isinstance(found, str):
            raise ValueError(f"{path}: questions, answers and passages must be texts, not {found!r}")
    questions = [one._replace(answers=tuple(filter(str.strip, one.answers))) for one in questions]
    questions = [one for one in questions if one.answers]
    pool = list(dict.fromkeys(filter(str.strip, pool)))
    if not questions or len(pool) < 3:
        few = f"too few passages ({len(pool)}) to put others beside its own"
        raise ValueError(f"{path}: no question with an answer, or {few}")
    return Passages(questions, pool, digest)


def _texts(answers: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(answer["text"] for answer in answers))


def _json(path: Path) -> tuple[Any, str]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file of questions")
    data = path.read_bytes()
    try:
        return json.loads(data), sha256(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not a JSON file of questions") from None
