"""What evaluation asks of a model: little memory at once, whatever the vocabulary, and as many rows as it is told."""

import numpy as np
import torch

from atma.eval import language_model
from atma.eval.continuations import shared
from atma.eval.language_model import OwnModel
from atma.eval.ragged import together
from atma.eval.stream import Streaming
from atma.model import Model


def test_logits_are_computed_no_more_at_once_than_memory_is_meant_for(tiny, monkeypatch):
    model, logits, most = OwnModel(tiny, Streaming(chunk=16)), Model.logits, []
    tokens = torch.randint(0, 256, (3, 41), generator=torch.Generator().manual_seed(1))
    context = tokens[0].tolist()
    whole, after = model.predict(tokens, 30), shared(model, context, [context[:9], context[:5]])
    monkeypatch.setattr(Model, "logits", lambda net, hidden: most.append(hidden.shape.numel()) or logits(net, hidden))
    monkeypatch.setattr(language_model, "LOGITS", 7 * 257)
    found = model.predict(tokens, 30)
    again = shared(model, context, [context[:9], context[:5]])
    for one, other in zip([found, *again], [whole, *after], strict=True):
        np.testing.assert_allclose(one.nats, other.nats, rtol=1e-5)
        assert (one.right == other.right).all()
    assert max(most) == 7 * tiny.model.config.width and len(most) > 1


def test_sequences_go_together_as_far_as_the_models_batch_tokens_hold(tiny):
    sequences = [np.zeros(1000, np.int64)] * 40
    for batch_tokens, rows in ((2000, 2), (8192, 8), (20_000, 20)):
        model = OwnModel(tiny, Streaming(batch_tokens=batch_tokens))
        sizes = [len(padded.rows) for padded in together(sequences, [1] * 40, model)]
        assert sizes == [rows] * (40 // rows)
