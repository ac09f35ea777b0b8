"""Block-wise secant gain: how much a block makes of a small disturbance of its input, by length.

‖f(x + δ) − f(x)‖ / ‖δ‖ of each block f, where x (L, D) is what it is given on the first L tokens of a document and δ is
a random direction with rms(δ) = 0.02 rms(x) at every token (maths.md, section 7). Both run through states of their own,
chunk by chunk: memory is those states, at any length.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from atma.diagnose.texts import Laid
from atma.eval.stream import Advance
from atma.mixers import Call
from atma.model import Model
from atma.statistics import mean_interval

Row = dict[str, Any]
DISTURBANCE = 0.02


@torch.inference_mode()
def gains(
    model: Model, text: Laid, lengths: Sequence[int], seed: int, chunk: int, progress: Advance | None = None
) -> list[list[float]]:
    """Of one text and one random direction (fixed by the seed): the gain of each block (by row) at each length."""
    tokens = text.tokens[None, : lengths[-1]].to(next(model.parameters()).device)
    generator = torch.Generator().manual_seed(seed)
    plain, disturbed = (list(model.init_state(1, lengths[-1]).blocks) for _ in range(2))
    moved, pushed = (torch.zeros(len(model.blocks), dtype=torch.float64) for _ in range(2))
    found: list[Tensor] = []
    edges = sorted({*range(0, lengths[-1], chunk), *lengths})
    for start, stop in pairwise(edges):
        x = model.enter(tokens[:, start:stop])
        call = Call(x)
        for i, block in enumerate(model.blocks):
            delta = direction(x, generator)
            left = Call(
                call.embedding, dict(call.left)
            )  # a copy: what the disturbed block leaves is not for the blocks behind it
            other, disturbed[i] = block(x + delta, disturbed[i], call=left)
            pushed[i] += delta.double().square().sum().cpu()
            x, plain[i] = block(x, plain[i], call=call)
            moved[i] += (other - x).double().square().sum().cpu()
        if progress is not None:
            progress(stop - start)
        if stop in lengths:
            found.append((moved / pushed).sqrt())
    return torch.stack(found, 1).tolist()


def direction(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random δ like x (1, T, D), each token's root mean square `DISTURBANCE` times that of x."""
    noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
    return noise * (DISTURBANCE * _rms(x) / _rms(noise))


def gain_rows(model: Model, measured: Sequence[Sequence[list[list[float]]]], lengths: Sequence[int]) -> list[Row]:
    """One row a block and length. measured: of each document, of each direction, what `gains` returned.

    A document counts once, with the mean over its directions.
    """
    by_document = torch.tensor(measured, dtype=torch.float64).mean(1)
    rows: list[Row] = []
    for layer, kind in enumerate(model.config.layers):
        for i, length in enumerate(lengths):
            values = by_document[:, layer, i].tolist()
            found = mean_interval(values)
            row: Row = {"kind": "gain", "layer": layer, "mixer": kind, "length": length, "gain": found.value}
            row |= {"gain_low": found.t_low, "gain_high": found.t_high, "values": values}
            rows.append(row | {"documents": len(values), "directions": len(measured[0])})
    return rows


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()
