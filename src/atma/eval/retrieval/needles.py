"""Passkeys and needles in the form that suits a base model: the question repeats the needle's own words.

`<start> haystack needle haystack cue value`: a needle is a cue and its value, and the text ends with the cue again, as
in `induction`, so nothing but recall is asked of a model, and no obedience. Values are five single-digit tokens.
"""

from typing import NamedTuple

import numpy as np

from atma.eval.retrieval.haystacks import Haystack
from atma.eval.retrieval.prompts import Ask, Encoder, Insert, NoRoom, Prompt, spliced
from atma.tokenizer import Tokenizer

NEEDLES = ("passkey", "niah", "multikey", "multivalue", "multiquery")
ASKS_ALL = ("multivalue", "multiquery")
"""Tasks whose needles are all asked for: they stand at random depths, so no depth is chosen."""
CUE = " The access code for record {record} is"
PASSKEY = " The pass key is"
RECORD_DIGITS, VALUE_TOKENS = 7, 5
COUNT = 4
"""Needles of the tasks with several."""
PARTS = 1 << 32


class Draw(NamedTuple):
    """What is random in a trial: the same for every task, length, depth, haystack and model."""

    records: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    depths: tuple[int, ...]
    """Of needles whose depth is not chosen, in parts of 2**32."""
    end: int
    """Where the haystack ends, in parts of 2**32 of its text."""


def draw(seed: int, index: int) -> Draw:
    """Trial `index` of a seed: four distinct records of seven digits, four distinct values of five."""
    rng = np.random.default_rng([seed, index])
    while True:
        records = rng.integers(0, 10**RECORD_DIGITS, COUNT).tolist()
        values = rng.integers(0, 10, (COUNT, VALUE_TOKENS)).tolist()
        if len(set(records)) == len({tuple(value) for value in values}) == COUNT:
            break
    depths = rng.integers(0, PARTS, COUNT).tolist()
    named = tuple(f"{record:0{RECORD_DIGITS}}" for record in records)
    return Draw(named, tuple(map(tuple, values)), tuple(depths), int(rng.integers(0, PARTS)))


class Fact(NamedTuple):
    """A needle: token ids of its cue and of its value, and the value as text."""

    cue: np.ndarray
    value: np.ndarray
    text: str


class Writer:
    """Needles in the tokens of a tokenizer. ValueError for one without single digits."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.first, self.rest, self.spaced = digit_ids(encoder.tokenizer)

    def fact(self, cue: str, digits: tuple[int, ...]) -> Fact:
        """The cue takes the space before the value where the first digit's token cannot hold it."""
        ids = [self.first[digits[0]], *(self.rest[digit] for digit in digits[1:])]
        shown = self.encoder.ids(cue if self.spaced else cue + " ")
        return Fact(shown, np.array(ids), "".join(map(str, digits)))

    def facts(self, task: str, drawn: Draw) -> list[Fact]:
        """The needles of a trial."""
        if task == "passkey":
            return [self.fact(PASSKEY, drawn.values[0])]
        records = [drawn.records[0]] * COUNT if task == "multivalue" else drawn.records
        count = 1 if task == "niah" else COUNT
        pairs = list(zip(records, drawn.values, strict=True))[:count]
        return [self.fact(CUE.format(record=record), value) for record, value in pairs]


def needle_prompt(
    writer: Writer, task: str, haystack: Haystack, drawn: Draw, length: int, depth: int | None, absent: bool = False
) -> Prompt:
    """A trial at a length in tokens and a depth in percent, None for the tasks that ask for all their needles.

    multivalue asks for its values in the order in which they stand, multiquery in the order of the draw; each question
    stands after the true answer to the one before. `absent` has haystack in place of the needles asked for; those of
    multikey that are not asked for stay. ValueError if the haystack has no room.
    """
    facts = writer.facts(task, drawn)
    depths = [part / PARTS for part in drawn.depths]
    wanted = list(range(len(facts))) if task in ASKS_ALL else [0]
    if task == "multivalue":
        wanted.sort(key=depths.__getitem__)
    if depth is not None:
        depths[0] = depth / 100
    told = [i for i in range(len(facts)) if not (absent and i in wanted)]
    inserts = [Insert(depths[i], np.concatenate([facts[i].cue, facts[i].value])) for i in told]
    questions = [part for i in wanted for part in (facts[i].cue, facts[i].value)]
    size = length - 1 - sum(len(insert.ids) for insert in inserts) - sum(map(len, questions))
    if size < 1:
        raise NoRoom(f"its fixed parts alone take {length - size} tokens")
    text = spliced(haystack, haystack.end(drawn.end), size, inserts)
    asks, stop = [], 1 + len(text)
    for i in wanted:
        start = stop + len(facts[i].cue)
        stop = start + VALUE_TOKENS
        asks.append(Ask(start, stop, VALUE_TOKENS, (facts[i].text,)))
    return Prompt(np.concatenate([[writer.encoder.tokenizer.start], text, *questions]).astype(np.int64), tuple(asks))


def digit_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int], bool]:
    """Ids of a value's first digit and of its others, and whether the first holds the space before it.

    Where some digit with a space is not one token (bytes, a small BPE), the cue takes the space. ValueError where a
    bare digit is not one token.
    """
    bare = [tokenizer.encode(str(digit)) for digit in range(10)]
    for digit, ids in enumerate(bare):
        if len(ids) != 1:
            raise ValueError(f"the tokenizer makes {len(ids)} tokens of the digit {digit}; needles need single digits")
    rest = [ids[0] for ids in bare]
    spaced = [tokenizer.encode(f" {digit}") for digit in range(10)]
    if all(len(ids) == 1 for ids in spaced):
        return [ids[0] for ids in spaced], rest, True
    return rest, rest, False
