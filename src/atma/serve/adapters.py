"""Low-rank adapters beside a served model: every text is read and written with its own, or with none.

Each layer that some adapter is on adds to its rows what their texts' adapters add (atma.ops.low_rank). The layer's own
product is what it was, so a text without an adapter has the bits that it has in an engine without any; one with an
adapter has the same bits whatever is beside it. Which text has which is read from memory by the step, not built into
it, so one recorded step serves every mixture.
"""

import contextlib
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atma.ops import low_rank
from atma.ops.low_rank import Factors, Stack
from atma.serve.request import RequestError

HEAD = "head"


class Adapter(NamedTuple):
    """One adapter, as `atma.serve.adapter_files` reads it."""

    name: str
    """What requests ask for."""
    layers: Mapping[str, Factors]
    """By the names of the model's layers."""
    digest: str
    """SHA-256 of its numbers, in hexadecimal: kept states belong to it."""


class Worn(NamedTuple):
    """The adapter of a text: its place among the engine's, −1 for none, and its digest, "" for none."""

    slot: int
    digest: str


NONE = Worn(-1, "")


class Adapters:
    """Those of one engine. ValueError: two of one name."""

    def __init__(self, adapters: Many[Adapter], dtype: torch.dtype, device: torch.device) -> None:
        self._all, self._device = tuple(adapters), device
        self._worn = {one.name: Worn(i, one.digest) for i, one in enumerate(adapters)}
        if len(self._worn) < len(self._all):
            raise ValueError(f"adapters {', '.join(one.name for one in adapters)}: each needs a name of its own")
        names = dict.fromkeys(name for one in adapters for name in one.layers)
        self._stacks = {name: Stack([one.layers.get(name) for one in adapters], dtype, device) for name in names}
        self._hooks: dict[str, _Adding] = {}
        self._which: Tensor | None = None

    def __len__(self) -> int:
        return len(self._all)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._worn)

    @property
    def on_head(self) -> bool:
        """Whether logits are adapted too."""
        return HEAD in self._stacks

    @property
    def bytes(self) -> int:
        """Of their numbers as they are held."""
        return sum(stack.bytes for stack in self._stacks.values())

    def stats(self) -> dict[str, int]:
        """What is held, in plain numbers."""
        return {"adapters": len(self), "adapter_bytes": self.bytes}

    def worn(self, name: str | None) -> Worn:
        """The adapter of that name; None is none. RequestError: there is none of that name."""
        if name is None:
            return NONE
        if name not in self._worn:
            there = f"there are {', '.join(self._worn)}" if self._worn else "none is loaded"
            raise RequestError("invalid", f"'adapter' {name!r} is not loaded; {there}", "adapter")
        return self._worn[name]

    def put_on(self, layers: Mapping[str, nn.Module]) -> None:
        """Let the layers of a model, by their names, add from now on what adapters add. ValueError: one is missing."""
        for name, stack in self._stacks.items():
            if name not in layers:
                raise ValueError(f"an adapter is on '{name}', of which the model has no layer")
            self._hooks[name] = _Adding(self, stack)
            layers[name].register_forward_hook(self._hooks[name])

    def require_called(self) -> None:
        """ValueError, once the model has read: a layer with adapters is not called as a layer, and so adds nothing."""
        silent = next((name for name, hook in self._hooks.items() if not hook.called), None)
        if silent is not None:
            told = f"an adapter is on '{silent}', whose weight this model reads in another way than as a layer"
            raise ValueError(f"{told}; merge the adapter, or train it without that layer")

    @contextlib.contextmanager
    def rows(self, which: Tensor | Many[int] | None) -> Iterator[None]:
        """Within it, the rows that layers compute are those of texts with these adapters, by their places, (N,) int32;
        where N is 1 all rows are that text's. None does not say, which is an error where there are adapters."""
        if self._all and which is not None:
            given = isinstance(which, Tensor)
            self._which = which if given else torch.tensor(which, dtype=torch.int32, device=self._device)
        try:
            yield
        finally:
            self._which = None

    @property
    def which(self) -> Tensor:
        """The adapters of the rows that are computed now."""
        if self._which is None:
            raise RuntimeError("a model with adapters computes rows of which nobody has said whose they are")
        return self._which


class _Adding:
    """The hook of one layer."""

    def __init__(self, adapters: Adapters, stack: Stack) -> None:
        self._adapters, self._stack = adapters, stack
        self.called = False

    def __call__(self, _: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
        self.called = True
        low_rank.add(y, given[0], self._adapters.which, self._stack)
