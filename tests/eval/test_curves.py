"""Loss by length: one pass equals separate passes, fixed targets are the same tokens, and rows say what they hold."""

import math

import numpy as np
import pytest
import torch

from atma.eval import OwnModel, choose_documents, fixed_targets, junk_stream, length_curve
from atma.eval.likelihood.prefixes import position_edges
from atma.eval.stream import score

LENGTHS = [16, 32, 64, 128]
TOLERANCE = 1e-4


@pytest.fixture
def documents(split):
    return choose_documents(split, 256, 128, 4)


def kinds(rows, kind):
    return [row for row in rows if row["kind"] == kind]


def test_one_pass_over_the_longest_prefix_equals_a_pass_over_each(tiny, documents):
    rows = kinds(length_curve(OwnModel(tiny), documents, LENGTHS), "nested")
    assert [row["length"] for row in rows] == LENGTHS
    for row in rows:
        nats = score(tiny.model, torch.from_numpy(documents.windows(row["length"])))
        assert row["loss"] == pytest.approx(nats.mean().item(), abs=TOLERANCE)
        assert row["document_losses"] == pytest.approx(nats.mean(1).tolist(), abs=TOLERANCE)
        assert row["tokens"] == 4 * row["length"]


def test_a_byte_is_a_token_of_the_byte_tokenizer_so_bits_per_byte_are_nats_over_log_two(tiny, documents):
    for row in kinds(length_curve(OwnModel(tiny), documents, LENGTHS), "nested"):
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2), rel=1e-6)


def test_fixed_targets_are_the_same_tokens_at_every_length(documents):
    endings = [documents.endings(length)[:, -16:] for length in LENGTHS]
    for ending in endings:
        np.testing.assert_array_equal(ending, documents.tokens[:, -16:])


def test_a_fixed_target_window_is_end_of_text_and_the_tokens_before_the_end(documents):
    window = documents.endings(32)
    assert window.shape == (4, 33)
    assert (window[:, 0] == 256).all()
    np.testing.assert_array_equal(window[:, 1:], documents.tokens[:, -32:])


def test_fixed_targets_score_only_the_targets(tiny, documents):
    rows = kinds(fixed_targets(OwnModel(tiny), documents, LENGTHS, 16), "fixed")
    for row in rows:
        nats = score(tiny.model, torch.from_numpy(documents.endings(row["length"])))[:, -16:]
        assert row["loss"] == pytest.approx(nats.mean().item(), abs=TOLERANCE)
        assert row["tokens"] == 4 * 16


def test_at_the_longest_length_fixed_targets_are_the_end_of_the_nested_prefix(tiny, documents):
    nats = score(tiny.model, torch.from_numpy(documents.windows(128)))[:, -16:]
    row = kinds(fixed_targets(OwnModel(tiny), documents, LENGTHS, 16), "fixed")[-1]
    assert row["loss"] == pytest.approx(nats.mean().item(), abs=TOLERANCE)


def test_positions_cover_the_longest_length_once_and_average_to_its_loss(tiny, documents):
    rows = length_curve(OwnModel(tiny), documents, LENGTHS)
    positions = kinds(rows, "position")
    assert [row["start"] for row in positions] == [0, 16, 32, 64]
    assert [row["end"] for row in positions] == [16, 32, 64, 128]
    mean = sum(row["loss"] * row["tokens"] for row in positions) / sum(row["tokens"] for row in positions)
    assert mean == pytest.approx(kinds(rows, "nested")[-1]["loss"], rel=1e-9)


@pytest.mark.parametrize(("longest", "edges"), [(1, [0, 1]), (16, [0, 16]), (17, [0, 16, 17]), (64, [0, 16, 32, 64])])
def test_position_edges_double(longest, edges):
    assert position_edges(longest) == edges


def test_the_summary_is_the_slope_and_change_of_its_rows(tiny, documents):
    rows = length_curve(OwnModel(tiny), documents, LENGTHS)
    nested, summary = kinds(rows, "nested"), rows[-1]
    losses = [row["loss"] for row in nested]
    assert summary["kind"] == "summary" and summary["measure"] == "nested" and summary["lengths"] == LENGTHS
    assert summary["slope"] == pytest.approx(np.polyfit(np.log2(LENGTHS), losses, 1)[0], abs=1e-9)
    assert summary["change"] == pytest.approx(losses[-1] - losses[0], abs=1e-9)
    assert summary["slope_low"] <= summary["slope"] <= summary["slope_high"]


def test_one_length_has_a_summary_without_a_slope(tiny, documents):
    assert "slope" not in length_curve(OwnModel(tiny), documents, [64])[-1]


def test_the_junk_curve_runs_over_document_borders(tiny, split):
    stream = junk_stream(split, 256, 250, 2)
    np.testing.assert_array_equal(stream.tokens.ravel(), split.stream[1:501])
    assert (stream.tokens == 256).sum() == 2
    rows = length_curve(OwnModel(tiny), stream, [64, 250], "junk")
    assert [row["kind"] for row in rows] == ["junk", "junk", "summary"]


def test_chosen_documents_are_real_and_the_same_every_time(split):
    first, again = choose_documents(split, 256, 150, 8, seed=5), choose_documents(split, 256, 150, 8, seed=5)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    starts = {tuple(text[1:151].tolist()) for text in split.texts if len(text) > 150}
    assert {tuple(row) for row in first.tokens.tolist()} == starts
    assert first.joined == 0


def test_joined_documents_fill_up_what_is_missing_and_are_counted(split):
    found = choose_documents(split, 256, 200, 5, joined=True)
    assert len(found.tokens) == 4 and found.joined == 1
    short = [text[1:] for text in split.texts if len(text) <= 200]
    np.testing.assert_array_equal(found.tokens[-1], np.concatenate(short)[:200])
    assert not (found.tokens == 256).any()


def test_a_length_longer_than_any_document_is_refused_with_the_mend(split):
    with pytest.raises(ValueError, match="no document has 401 tokens; choose shorter"):
        choose_documents(split, 256, 401, 4)


@pytest.mark.parametrize("lengths", [[], [0, 4], [8, 4], [4, 4], [4, 129]])
def test_lengths_must_increase_within_the_documents(tiny, documents, lengths):
    with pytest.raises(ValueError, match="length"):
        length_curve(OwnModel(tiny), documents, lengths)


@pytest.mark.parametrize("targets", [0, 17])
def test_targets_must_fit_the_first_length(tiny, documents, targets):
    with pytest.raises(ValueError, match=f"{targets} target tokens do not fit length 16"):
        fixed_targets(OwnModel(tiny), documents, LENGTHS, targets)


def test_a_model_without_tokenizer_is_refused(tiny, documents):
    with pytest.raises(ValueError, match="no tokenizer"):
        length_curve(OwnModel(tiny._replace(tokenizer=None)), documents, LENGTHS)
