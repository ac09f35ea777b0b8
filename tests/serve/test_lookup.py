"""The places of a text are found as by looking through all of it, and a repetition is believed by what it has held."""

import random

import pytest

from atma.serve import lookup
from atma.serve.lookup import FIRST, INDEX_BYTES, LEAST, LONGEST, MOST, PAIRS, Lookup


def _longest(tokens: list[int]) -> int:
    """Tokens of the longest repetition that a text ends with."""
    ends = range(2, len(tokens))
    equal = [next((n for n in range(at + 1) if n == at or tokens[at - 1 - n] != tokens[-1 - n]), 0) for at in ends]
    return max(equal, default=0)


def test_the_longest_repetition_is_found_wherever_a_text_stands(monkeypatch) -> None:
    monkeypatch.setattr(lookup, "TRIED", 10_000)
    chance, found = random.Random(0), 0
    for _ in range(300):
        tokens = [chance.randrange(4) for _ in range(chance.randint(1, 30))]
        one = Lookup(tokens)
        one.needed = 1
        for _ in range(30):
            fresh, expected = Lookup(list(tokens)), min(LONGEST, _longest(tokens))
            fresh.needed = 1
            assert fresh.reach() == (expected if expected > 1 else 0)
            assert one.reach() <= _longest(tokens)
            assert (one.reach() > 1) == (expected > 1)
            found += expected > 3
            tokens.append(chance.randrange(4))
    assert found > 500


@pytest.mark.parametrize("grown", [False, True])
def test_a_draft_is_what_followed_the_last_time(grown: bool) -> None:
    said = [*range(100, 200)]
    tokens = [*range(3000), *said, *range(3000, 5000)]
    one = Lookup(tokens)
    if grown:
        assert one.reach() == 0
    for token in said[:FIRST]:
        assert one.reach() == 0
        tokens.append(token)
    assert one.reach() == FIRST
    assert one.draft(7) == said[FIRST : FIRST + 7]
    tokens.extend(said[FIRST:20])
    assert one.reach() == 20
    assert one.draft(31) == said[20:51]


def test_the_last_place_is_taken_of_two_that_are_as_long() -> None:
    one = Lookup([1, 2, 3, 4, 50, 9, 1, 2, 3, 4, 60, 9, 8, 1, 2, 3, 4])
    one.needed = 4
    assert one.reach() == 4
    assert one.draft(2) == [60, 9]


def test_what_repeats_may_be_shorter_than_its_draft() -> None:
    one = Lookup([9, 8, *[1, 2, 3] * 4])
    assert one.reach() > 6
    assert one.draft(8) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_wrong_drafts_make_it_doubt_and_right_ones_believe() -> None:
    tokens = [*range(1, 20), 1, 2, 3, 4]
    one = Lookup(tokens)
    assert one.reach() == 0
    one.tell(3, 2)
    assert one.reach() == LEAST == 4
    one.tell(3, 1)
    assert one.reach() == 0
    tokens += [5, 6, 7, 8]
    assert one.reach() == 8
    one.tell(5, 3)
    assert one.needed == LEAST
    for _ in range(20):
        one.tell(3, 0)
    assert one.needed == MOST
    for _ in range(20):
        one.tell(3, 3)
    assert one.needed == LEAST


def test_the_index_of_a_long_text_is_bounded_and_knows_its_last_part(monkeypatch) -> None:
    monkeypatch.setattr(lookup, "PAIRS", 1024)
    chance = random.Random(1)
    tokens = [chance.randrange(500) for _ in range(200)]
    one = Lookup(tokens)
    for _ in range(5000):
        tokens.append(chance.randrange(500))
        one.reach()
    assert one.bytes == 6 * 1024 and INDEX_BYTES == 6 * PAIRS
    for back, known in ((900, True), (1200, False)):
        again = [*tokens, *tokens[-back : -back + 8]]
        grown = Lookup(tokens)
        grown.reach()
        tokens.extend(tokens[-back : -back + 8])
        for held in (one, grown, Lookup(again)):
            assert (held.reach() >= 8) == known
        del one._tokens[-8:]
        one = Lookup(tokens)
        one.reach()
