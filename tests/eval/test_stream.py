"""Streaming through the state gives what one full pass gives, whatever is batched or chunked."""

import pytest
import torch

from atma.eval.stream import Streaming, hidden_chunks, score

TOLERANCE = 1e-4  # float32: the law "split" as the whole model keeps it


@pytest.fixture
def tokens():
    return torch.randint(0, 257, (3, 131), generator=torch.Generator().manual_seed(1))


def direct(loaded, tokens):
    """Cross-entropy from all logits at once."""
    with torch.no_grad():
        logits = loaded.model.logits(loaded.model(tokens[:, :-1])[0])
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def test_scores_are_the_cross_entropies_of_all_logits(tiny, tokens):
    found = score(tiny.model, tokens)
    assert found.std() > 0.1
    torch.testing.assert_close(found, direct(tiny, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64, 130, 131])
@pytest.mark.parametrize("batch_tokens", [1, 260, 10_000])
def test_chunks_and_batches_do_not_change_scores(tiny, tokens, chunk, batch_tokens):
    found = score(tiny.model, tokens, streaming=Streaming(chunk, batch_tokens))
    torch.testing.assert_close(found, direct(tiny, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("last", [1, 5, 40, 130])
def test_the_last_scores_alone_are_the_last_of_all(tiny, tokens, last):
    found = score(tiny.model, tokens, last, Streaming(chunk=32))
    torch.testing.assert_close(found, direct(tiny, tokens)[:, -last:], atol=TOLERANCE, rtol=0)


def test_progress_counts_every_token_once(tiny, tokens):
    counted = []
    score(tiny.model, tokens, streaming=Streaming(50, 130), progress=counted.append)
    assert sum(counted) == 3 * 130


def test_no_tokens_is_refused(tiny):
    with pytest.raises(ValueError, match="at least one token"):
        next(hidden_chunks(tiny.model, torch.empty(1, 0, dtype=torch.int64)))
    with pytest.raises(ValueError, match="at least one token"):
        score(tiny.model, torch.tensor([[5]]))


def test_a_context_beyond_the_capacity_is_refused(tiny):
    state = tiny.model.init_state(1, 16)
    with pytest.raises(ValueError, match="16"):
        list(hidden_chunks(tiny.model, torch.zeros(1, 17, dtype=torch.int64), state, 8))


@pytest.mark.parametrize("wrong", [-1, 257])
def test_an_id_outside_the_vocabulary_is_named(tiny, wrong):
    with pytest.raises(ValueError, match=f"token id {wrong} .* 257"):
        score(tiny.model, torch.tensor([[5, wrong, 5]]))


def test_a_loss_that_is_not_finite_is_named(copier):
    copier.model.loss = lambda hidden, targets: torch.where(targets == 9, torch.nan, 1.0)
    with pytest.raises(ValueError, match="row 0: the loss at position 1 is not finite"):
        score(copier.model, torch.tensor([[1, 2, 9, 3]]))
