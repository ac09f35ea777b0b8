"""The needle, token by token; a perfect copier finds it, and finds nothing where it is absent."""

from types import SimpleNamespace

import numpy as np
import pytest

from atma.eval import OwnModel, Streaming, haystack, needle
from atma.eval.retrieval.induction import draw_trials, layouts
from atma.eval.retrieval.needles import digit_ids
from atma.tokenizer import byte_tokenizer

TEXT = np.random.default_rng(0).integers(97, 123, 500)


def test_the_layout_is_eot_needle_gap_cue_value():
    tokenizer = byte_tokenizer()
    [trial] = draw_trials(tokenizer, 1, len(TEXT), seed=4)
    [row] = layouts(tokenizer.eot, TEXT, [trial], 200).tolist()
    cue = tokenizer.decode(trial.cue)
    assert cue.startswith(" The access code for record ") and cue.endswith(" is ") and len(cue) == len(trial.cue) == 39
    record = cue.split()[5]
    assert len(record) == 7 and record.isdigit()
    assert len(trial.value) == 5 and tokenizer.decode(trial.value).isdigit()
    needle_ids = trial.cue + trial.value
    assert row[0] == tokenizer.eot
    assert row[1:45] == needle_ids
    assert row[-44:] == needle_ids
    gap = row[45:-44]
    assert len(gap) == 200 - 1 - 88
    assert gap == [int(TEXT[i % 500]) for i in range(trial.gap_end - len(gap), trial.gap_end)]


def test_an_absent_needle_is_replaced_by_text_and_nothing_else_changes():
    tokenizer = byte_tokenizer()
    trials = draw_trials(tokenizer, 3, len(TEXT), seed=4)
    present, absent = (layouts(tokenizer.eot, TEXT, trials, 200, absent) for absent in (False, True))
    assert present.shape == absent.shape == (3, 200)
    assert (present[:, 45:] == absent[:, 45:]).all() and (present[:, 0] == absent[:, 0]).all()
    assert ((absent[:, 1:45] >= 97) & (absent[:, 1:45] < 123)).all()


def test_trials_are_the_same_at_every_length_and_count():
    tokenizer = byte_tokenizer()
    few, many = draw_trials(tokenizer, 2, 500, 1), draw_trials(tokenizer, 9, 500, 1)
    assert few == many[:2]
    assert len({tuple(trial.cue + trial.value) for trial in many}) == 9
    short, long = (layouts(tokenizer.eot, TEXT, few, length) for length in (150, 400))
    assert (short[:, -105:] == long[:, -105:]).all()


def test_the_first_digit_holds_the_space_where_every_spaced_digit_is_a_token():
    spaced = SimpleNamespace(encode=lambda text: [int(text) + (10 if text[0] == " " else 0)])
    assert digit_ids(spaced) == (list(range(10, 20)), list(range(10)), True)


def test_a_tokenizer_without_single_digits_is_refused():
    halves = SimpleNamespace(encode=lambda text: [0, 1])
    with pytest.raises(ValueError, match="2 tokens of the digit 0"):
        digit_ids(halves)


def test_a_perfect_copier_finds_every_needle_and_none_that_is_absent(copier):
    [row] = needle(OwnModel(copier, Streaming(chunk=64)), TEXT, [150], 12, seed=2)
    assert row["token_accuracy"] == row["exact_accuracy"] == 1.0
    assert row["cross_entropy"] < 1e-9
    assert row["token_low"] == pytest.approx(60 / (60 + 1.959964**2), rel=1e-6)
    assert row["absent_token_accuracy"] < 0.35 and row["absent_exact_accuracy"] == 0
    assert row["absent_cross_entropy"] > 5
    assert (row["length"], row["gap"], row["trials"]) == (150, 61, 12)


def test_a_gap_longer_than_the_text_reads_it_again():
    tokenizer = byte_tokenizer()
    trials = draw_trials(tokenizer, 1, 20, 0)
    gap = layouts(tokenizer.eot, TEXT[:20], trials, 200)[0, 45:-44].tolist()
    assert gap[:20] == gap[20:40] and sorted(gap[:20]) == sorted(TEXT[:20].tolist())


def test_accuracy_does_not_depend_on_chunks_or_batches(tiny):
    whole = needle(OwnModel(tiny), TEXT, [128], 5)
    pieces = needle(OwnModel(tiny, Streaming(chunk=31, batch_tokens=130)), TEXT, [128], 5)
    assert whole[0]["token_accuracy"] == pieces[0]["token_accuracy"]
    assert whole[0]["cross_entropy"] == pytest.approx(pieces[0]["cross_entropy"], abs=1e-4)


def test_a_length_without_room_for_a_needle_is_refused(copier):
    with pytest.raises(ValueError, match="length 89 has no room for a needle; its fixed parts alone take 89"):
        needle(OwnModel(copier), TEXT, [89], 1)


@pytest.mark.parametrize(("lengths", "trials"), [([], 3), ([128], 0)])
def test_no_length_or_no_trial_is_refused(copier, lengths, trials):
    with pytest.raises(ValueError, match="a length and a trial"):
        needle(OwnModel(copier), TEXT, lengths, trials)


def test_the_haystack_is_the_split_without_end_of_text(split):
    text = haystack(split, 256)
    assert len(text) == split.tokens - split.documents and not (text == 256).any()
    assert len(haystack(split, 256, limit=310)) == 308
