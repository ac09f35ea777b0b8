"""Which tensors of a checkpoint are which of ours: the same, several side by side, or of another shape."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """One tensor of ours, and where it is in the checkpoint."""

    ours: str
    theirs: tuple[str, ...]
    """Several are the rows of ours, one after another."""
    taps: bool = False
    """Whether theirs is the weight (C, 1, W) of a depthwise convolution, of which ours is (C, W)."""

    def taken(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Ours, of theirs. ValueError where pieces of it are of different types."""
        found = [tensors[name] for name in self.theirs]
        if len({x.dtype for x in found}) > 1:
            raise ValueError(f"'{self.theirs[0]}' and '{self.theirs[1]}' are of different types, but belong together")
        whole = found[0] if len(found) == 1 else torch.cat(found)
        return whole.squeeze(1) if self.taps and whole.ndim == 3 else whole

    def given(self, ours: Tensor) -> dict[str, Tensor]:
        """Theirs, of ours."""
        whole = ours.unsqueeze(1) if self.taps else ours
        return dict(zip(self.theirs, whole.chunk(len(self.theirs)), strict=True))


def same(pairs: Mapping[str, str], biases: Iterable[str] = ()) -> list[Part]:
    """Parts of one tensor each: weights, and the biases of those in `biases`. Names without `.weight` and `.bias`."""
    told = [Part(f"{ours}.weight", (f"{theirs}.weight",)) for ours, theirs in pairs.items()]
    return told + [Part(f"{ours}.bias", (f"{pairs[ours]}.bias",)) for ours in biases]


def within(ours: str, theirs: str, parts: Iterable[Part]) -> list[Part]:
    """The parts of a module, of the whole model."""
    return [Part(ours + part.ours, tuple(theirs + name for name in part.theirs), part.taps) for part in parts]
