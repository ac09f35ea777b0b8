"""Secondary sinks of a model of transformers: the one figure of a diagnosis that asks nothing but hidden states."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atma.diagnose.plan import Plan
from atma.diagnose.sinks import THRESHOLD, Aligner, level_rows, sinks_row
from atma.eval.hugging_face import HuggingFace
from atma.eval.likelihood.prefixes import Documents
from atma.eval.stream import Advance
from atma.eval.suite import Measurement, Progress, run_measurements, sha256
from atma.eval.transformers_cache import cache_argument, cache_of
from atma.tokenizer import Tokenizer

Row = dict[str, Any]


class Theirs(NamedTuple):
    """What `open_text` asks of a model: what it is called, its tokenizer, and that no folder tells of its training."""

    path: Path
    tokenizer: Tokenizer
    info: Row


def diagnose_theirs(
    model: HuggingFace,
    documents: Documents,
    plan: Plan,
    results: Path | str | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """The rows of kind `sinks` and `sink level` of documents of the plan's longest length, as `diagnose` keeps them.

    ValueError: the model has learned fewer positions.
    """
    length = plan.extent.lengths[-1]
    if model.longest is not None and model.longest < length:
        raise ValueError(
            f"{length} tokens pass the {model.longest} positions of {model.name}; choose shorter --lengths"
        )
    texts = torch.from_numpy(documents.windows(length))[:, :length]
    texts[:, 0] = model.tokenizer.start

    def run(advance: Advance) -> list[Row]:
        rows = []
        for i, text in enumerate(texts):
            found = None
            for states in _states(model, text[None]):
                found = found or Aligner(len(states))
                for layer, state in enumerate(states):
                    found.take(layer, state[0])
                advance(states[0].shape[1])
            assert found is not None
            rows.append(sinks_row(i, text.tolist(), found.alignment()))
        return rows + level_rows(rows)

    spec = {"measure": "sinks", "lengths": [length], "documents": len(texts), "sinks": THRESHOLD}
    stamp = model.provenance() | {"texts_sha256": sha256(documents.tokens), "seed": plan.seed}
    measurements = [Measurement("secondary sinks", spec, texts.numel(), run)]
    return run_measurements("diagnose", measurements, stamp, results, progress)


@torch.inference_mode()
def _states(model: HuggingFace, tokens: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The states (1, n, D) behind each layer of pieces of tokens (1, T), the embedding's left out."""
    name = cache_argument(model.model) if model.pieces else None
    cache, size = None, model.streaming.chunk if model.pieces else tokens.shape[1]
    for piece in tokens.to(model.model.device).split(size, 1):
        given = {"use_cache": False} if name is None else {"use_cache": True, name: cache}
        out = model.model(input_ids=piece, output_hidden_states=True, logits_to_keep=1, **given)
        cache = cache_of(out) if model.pieces else None
        yield out.hidden_states[1:]


__all__ = ["Theirs", "diagnose_theirs"]
