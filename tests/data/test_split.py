"""The held-out documents cover every length and do not depend on order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atma.data.sources import Document
from atma.data.split import cut, held_out, mix


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return mix(np.arange(count, dtype=np.uint64), seed)


@given(count=st.integers(20, 400), seed=st.integers(0, 1000))
def test_the_share_is_kept_in_the_body_and_exceeded_only_by_the_longest(count, seed):
    lengths = np.random.default_rng(seed).integers(1, 10_000, count)
    chosen = held_out(lengths, hashes(count, seed), 0.05)
    assert chosen.sum() == min(8, count // 5) + max(0, count - 40) // 20


@given(seed=st.integers(0, 1000))
def test_eight_of_the_forty_longest_are_held_out_one_of_every_five(seed):
    lengths = np.random.default_rng(seed).permutation(1000) + 1
    chosen = held_out(lengths, hashes(1000, seed), 0.05)
    longest = chosen[np.argsort(-lengths)][:40]
    assert longest.reshape(8, 5).sum(1).tolist() == [1] * 8


def test_the_choice_follows_documents_not_their_order():
    lengths, order = np.arange(1, 301), np.random.default_rng(0).permutation(300)
    chosen = held_out(lengths, hashes(300), 0.05)
    assert np.array_equal(held_out(lengths[order], hashes(300)[order], 0.05), chosen[order])
    assert not np.array_equal(held_out(lengths, hashes(300, 1), 0.05), chosen)


@pytest.mark.parametrize("share", [0.5, 0.3, 0.01])
def test_other_shares_are_about_kept(share):
    chosen = held_out(np.arange(1, 10_001), hashes(10_000), share)
    assert abs(chosen.mean() - share) < 0.001 + 8 / 10_000


def test_a_document_is_cut_at_a_line_end_and_nothing_is_lost():
    document = Document("book", "".join(f"line {i}\n" for i in range(100)))
    (head, held_head), (tail, held_tail) = cut(document, 0.1)
    assert (held_head, held_tail) == (False, True)
    assert head.text + tail.text == document.text
    assert head.text.endswith("\n")
    assert 0.05 < len(tail.text) / len(document.text) < 0.1


def test_a_document_too_short_to_cut_stays_whole():
    assert list(cut(Document("a", "x"), 0.1)) == [(Document("a", "x"), False)]


def test_mixing_is_a_bijection_that_depends_on_the_seed():
    values = np.arange(100_000, dtype=np.uint64)
    assert len(np.unique(mix(values, 3))) == 100_000
    assert not np.any(mix(values, 3) == mix(values, 4))
    assert abs((mix(values, 3) / 2**64).mean() - 0.5) < 4 / np.sqrt(12 * 100_000)
