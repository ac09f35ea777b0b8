"""Which tensors of a checkpoint are which of ours: the same, one of several, or of another shape."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """Tensors of ours, and those of the checkpoint that are the same numbers: the rows of all of them, one after
    another."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    """Of each of ours, where there are several."""
    taps: bool = False
    """Whether theirs is the weight (C, 1, W) of a depthwise convolution, of which ours is (C, W)."""

    def taken(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ours, of theirs. ValueError where what belongs together is of different types, or has other rows."""
        found = [tensors[name] for name in self.theirs]
        if len({x.dtype for x in found}) > 1:
            raise ValueError(f"'{self.theirs[0]}' and '{self.theirs[1]}' are of different types, but belong together")
        whole = found[0] if len(found) == 1 else torch.cat(found)
        whole = whole.squeeze(1) if self.taps and whole.ndim == 3 else whole
        if self.rows and len(whole) != sum(self.rows):
            raise ValueError(f"'{self.theirs[0]}' has {len(whole)} rows, but config.json says {sum(self.rows)}")
        return dict(zip(self.ours, whole.split(list(self.rows)) if self.rows else [whole], strict=True))

    def given(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Theirs, of ours."""
        found = [tensors[name] for name in self.ours]
        whole = found[0] if len(found) == 1 else torch.cat(found)
        whole = whole.unsqueeze(1) if self.taps else whole
        return dict(zip(self.theirs, whole.chunk(len(self.theirs)), strict=True))


def same(pairs: Mapping[str, str], biases: Iterable[str] = ()) -> list[Part]:
    """Parts of one tensor each: weights, and the biases of those in `biases`. Names without `.weight` and `.bias`."""
    told = [Part((f"{ours}.weight",), (f"{theirs}.weight",)) for ours, theirs in pairs.items()]
    return told + [Part((f"{ours}.bias",), (f"{pairs[ours]}.bias",)) for ours in biases]


def within(ours: str, theirs: str, parts: Iterable[Part]) -> list[Part]:
    """The parts of a module, of the whole model."""

    def inside(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(prefix + name for name in names)

    return [part._replace(ours=inside(ours, part.ours), theirs=inside(theirs, part.theirs)) for part in parts]
