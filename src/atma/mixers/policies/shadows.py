"""Keys and values in 8 bits: with the exact ones behind them and a certificate, or alone (mixers.md, section 6.7).

`shadows`, for polar layers: every key and value is read in 8 bits, a quarter of the bytes of float32, and exactly where
the bound of what this changes would be above a tolerance. `int8`, for any core: the 8 bits are all that is held.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from atma.mixers.base import Call
from atma.mixers.policies.base import New, Policy, Read, Seat, new_rows
from atma.ops.certified import TOLERANCES, Shadows, check_tolerances, empty, hold, shadow_attention, shadow_statistics
from atma.ops.chosen import Held, Sums, hold_rows
from atma.strict import check_fields


@dataclass(frozen=True)
class ShadowsConfig:
    """How wrong a query's direction, a unit vector, and its magnitude, below 1, may be."""

    direction_tolerance: float = TOLERANCES[0]
    """0: everything is read exactly."""
    magnitude_tolerance: float = TOLERANCES[1]
    """0: everything is read exactly."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_tolerances((self.direction_tolerance, self.magnitude_tolerance))


@dataclass(frozen=True)
class EightBitsConfig:
    """There is nothing to choose."""


class ShadowedKeys(NamedTuple):
    """Keys and values, and their shadows."""

    keys: Held  # (B, G, capacity, K)
    values: Held
    shadows: Shadows

    grows = {"keys": 2, "values": 2}  # noqa: RUF012 (a field otherwise)
    pages = {"keys": 2, "values": 2}  # noqa: RUF012


class CertifiedShadows(Policy):
    """See the module. What is certain of the queries is among what is counted (`Counts`)."""

    Config = ShadowsConfig
    config: ShadowsConfig

    def __init__(self, config: ShadowsConfig, seat: Seat) -> None:
        super().__init__(config, seat)
        if not all(isinstance(getattr(seat.core, name, None), Tensor) for name in ("magnitude_slope", "null_value")):
            name = type(seat.core).__name__
            raise ValueError(f"policy 'shadows': of {name} nothing can be certified; take a polar layer, or int8")

    def init_cache(self, batch: int, capacity: int, like: Tensor) -> ShadowedKeys:
        """`Policy.init_cache`."""
        groups, width = self.seat.heads.groups, self.seat.heads.head_width
        keys, values = (new_rows(like.new_empty(batch), groups, capacity, width) for _ in range(2))
        return ShadowedKeys(keys, values, empty(batch, groups, capacity, width, like.device))

    def __call__(self, new: New, cache: ShadowedKeys, call: Call | None) -> Read:
        """`Policy.__call__`."""
        keys, values = hold_rows(cache.keys, new.k, new.start), hold_rows(cache.values, new.v, new.start)
        shadows = hold(cache.shadows, new.k, new.v, new.start)
        scale, null = self.core.scored(new.q, new.last)
        assert null is not None
        last, within = new.last, (self.config.direction_tolerance, self.config.magnitude_tolerance)
        # Read anew at each call: the model may have been moved or converted since.
        logits = (scale, null, self.core.get_parameter("magnitude_slope"), self.core.get_parameter("null_value"))
        direction, magnitude, certificate = shadow_attention(
            new.q, keys, values, shadows, *logits, torch.zeros_like(last), last, within
        )
        self.count(new, certificate.read)
        if self.counts is not None:
            errors = float(certificate.direction_error.max()), float(certificate.magnitude_error.max())
            self.counts.direction_error = max(errors[0], self.counts.direction_error or 0.0)
            self.counts.magnitude_error = max(errors[1], self.counts.magnitude_error or 0.0)
        return Read(*self.core.handed(direction, magnitude, new.q.dtype), ShadowedKeys(keys, values, shadows))


class EightBits(Policy):
    """See the module."""

    Config = EightBitsConfig

    def init_cache(self, batch: int, capacity: int, like: Tensor) -> Shadows:
        """`Policy.init_cache`."""
        return empty(batch, self.seat.heads.groups, capacity, self.seat.heads.head_width, like.device)

    def __call__(self, new: New, cache: Shadows, call: Call | None) -> Read:
        """`Policy.__call__`."""
        shadows = hold(cache, new.k, new.v, new.start)
        scale, null = self.core.scored(new.q, new.last)
        self.count(new, torch.zeros_like(scale, dtype=torch.int32))
        sums = shadow_statistics(new.q, shadows, scale, torch.zeros_like(new.last), new.last)
        return Read(*self.core.assemble(Sums(*sums), null, new.q.dtype), shadows)


SMALL = ({},)
