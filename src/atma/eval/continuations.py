"""What continuations of contexts cost: how multiple choice is scored.

The choices of one question share its context. Our models read a long one once and go on from copies of the state; a
short one is cheaper read again with every choice, many questions at a time, and so it is with other models.
"""

from collections.abc import Sequence

import numpy as np
import torch

from atma import state as states
from atma.eval.language_model import LanguageModel, OwnModel, Scored, finite, scored
from atma.eval.ragged import predict_each

SHARED_FROM = 128
"""Context tokens from which reading once is the faster way (docs/tasks.md)."""


def predict_continuations(
    model: LanguageModel, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
) -> list[Scored]:
    """Cost and rank of each token of continuation i after context i, as `LanguageModel.predict` tells them.

    ValueError: a context or continuation without a token, or longer together than the model can read.
    """
    for i, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        if not context or not continuation:
            given = f"{len(context)} and {len(continuation)} tokens"
            raise ValueError(f"request {i}: a context and a continuation need a token each, not {given}")
    found: dict[int, Scored] = {}
    if isinstance(model, OwnModel):
        for rows in _sharing(contexts):
            told = shared(model, contexts[rows[0]], [continuations[i] for i in rows])
            found |= dict(zip(rows, told, strict=True))
    rest = [i for i in range(len(contexts)) if i not in found]
    sequences = [np.array([*contexts[i], *continuations[i]]) for i in rest]
    found |= dict(zip(rest, predict_each(model, sequences, [len(continuations[i]) for i in rest]), strict=True))
    return [found[i] for i in range(len(contexts))]


@torch.inference_mode()
def shared(model: OwnModel, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Scored]:
    """`predict_continuations` of one context, which is read once."""
    net, device, longest = model.loaded.model, model.device, max(map(len, continuations))
    state = model.read(context[:-1], 1 + longest)
    found: list[Scored] = []
    group = max(1, model.streaming.batch_tokens // longest)
    for start in range(0, len(continuations), group):
        some = continuations[start : start + group]
        inputs = torch.full((len(some), longest), model.tokenizer.eot, dtype=torch.long, device=device)
        for row, continuation in enumerate(some):
            inputs[row, : len(continuation)] = torch.tensor([context[-1], *continuation[:-1]])
        hidden, _ = net(inputs, states.rows(state, [0] * len(some)))
        for row, continuation in enumerate(some):
            nats, right = scored(hidden[row, : len(continuation)], torch.tensor(list(continuation)), net)
            found.append(Scored(finite(nats[None])[0], right))
    return found


def _sharing(contexts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Requests whose context is long and not theirs alone."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, context in enumerate(contexts):
        if len(context) >= SHARED_FROM:
            found.setdefault(tuple(context), []).append(i)
    return [rows for rows in found.values() if len(rows) > 1]
