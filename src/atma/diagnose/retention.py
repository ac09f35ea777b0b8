"""How long each memory head holds what it is given: its half-life from parameters alone, and on the tokens of a text.

Half-life = log(1/2) / log γ tokens (maths.md, section 5). Zero-input is the γ of an input of zeros: the biases alone,
within the configured bound.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atma.diagnose.parts import Head, bound_of, forgetting, zero_input
from atma.model import Model

Row = dict[str, Any]
QUANTILES = {"p01": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}
ROUNDING = 1e-4
"""A half-life is of γ in float32 or wider; one that is beyond a bound by less than this stands at it."""
KEPT = 65_536
"""Most tokens of one text whose γ are kept: a longer text is sampled at equal distances."""


def half_life(log_decay: float) -> float | None:
    """Tokens until half is left; None where nothing ever decays (log γ is zero in its precision)."""
    return -math.log(2) / log_decay if log_decay < 0 else None


def thinned(notes: Sequence[Tensor]) -> Tensor:
    """The log γ (H, tokens) of one text from its calls' (1, H, T), at most `KEPT` tokens of it."""
    whole = torch.cat([note[0] for note in notes], 1)
    return whole[:, :: -(-whole.shape[1] // KEPT)]


def retention_rows(model: Model, decays: Mapping[int, Tensor]) -> list[Row]:
    """One row a head: γ and half-life at zero input, the bound, and quantiles of the half-life over the tokens read.

    decays: of each layer the log γ (H, tokens) that it used. A half-life of None is endless.
    """
    rows: list[Row] = []
    for (layer, head), log_decay in zero_input(model).items():
        bound = bound_of(forgetting(model)[layer], head)
        row: Row = {"kind": "retention", "layer": layer, "head": head, "gamma": math.exp(log_decay)}
        row |= {"half_life": half_life(log_decay), "bound": bound if math.isfinite(bound) else None}
        used = decays[layer][head].double().numpy()
        found = np.quantile(used, [*QUANTILES.values()], method="nearest")
        row |= {f"half_life_{name}": half_life(float(value)) for name, value in zip(QUANTILES, found, strict=True)}
        rows.append(row | {"tokens": len(used)})
    return rows


def longest_held(rows: Sequence[Row], beyond: float, count: int | None = None) -> list[Head]:
    """The heads that hold for more than `beyond` tokens, longest first, at most `count`.

    A head counts as it holds on the text: by the median of its half-life, and by the ninth decile among equals.
    """

    def held(row: Row) -> tuple[float, float]:
        median, high = (row[key] if row[key] is not None else math.inf for key in ("half_life_p50", "half_life_p90"))
        return median, high

    long = sorted((row for row in rows if held(row)[1] > beyond * (1 + ROUNDING)), key=held, reverse=True)
    return [Head(row["layer"], row["head"]) for row in long[:count]]
