"""How long things take: from a device's data sheet and an assumed utilisation, or from pieces measured here."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from atma.plan.costs import Costs
from atma.plan.devices import Device
from atma.plan.meshes import HOST, Sent

ASSUMED_MFU = 0.08
"""Share of the peak that training reaches, by the count of this module: that of the one figure measured of it, 207,474
tokens/s of the preset small on an H100 (benchmarks/results/2026-11-28-h100.md)."""
RESERVE = 0.08
"""Share of a GPU's memory that is left to its context, to buffers of communication and to gaps between blocks."""
BACKWARD = 2
"""Products of a backward pass for each of the forward pass: for the gradients of inputs, and of weights that are
trained."""


HOST_RATE = 20e9
"""Bytes a second between the processor's memory and a GPU, and of an update that the processor makes, for each rank;
assumed, measured nowhere."""


class Pace(Protocol):
    """Seconds, and the memory there is."""

    @property
    def apart(self) -> bool:
        """Whether a rank's memory is another than that of its processor."""
        ...

    @property
    def room(self) -> float:
        """Bytes that a rank may hold."""
        ...

    @property
    def program(self) -> float:
        """Bytes of a rank before it has a model."""
        ...

    def compute(self, tokens: float, length: int, checkpointing: bool) -> float:
        """Of forward and backward passes over so many tokens in rows of this length."""
        ...

    def update(self, share: float) -> float:
        """Of an update of this share of the parameters."""
        ...

    def send(self, message: Sent) -> float:
        """Of a message."""
        ...

    def assumptions(self) -> list[str]:
        """What is taken for granted, a sentence each."""
        ...


_OFFLOAD = (
    f"with train.offload, {HOST_RATE / 1e9:g} GB/s for each rank between its processor's memory and its GPU, and of "
    "the update that its processor makes; what processors send each other goes as fast as between GPUs"
)


class Sheet(NamedTuple):
    """A device of the table at an assumed share of its peak."""

    costs: Costs
    device: Device
    mfu: float

    @property
    def apart(self) -> bool:
        return True

    @property
    def room(self) -> float:
        return (1 - RESERVE) * self.device.memory

    @property
    def program(self) -> float:
        return 0.0

    def compute(self, tokens: float, length: int, checkpointing: bool) -> float:
        parts = self.costs.products(length)
        again = self.costs.again_share * (sum(parts.values()) - parts["head"]) if checkpointing else 0.0
        trained = self.costs.size.trained / self.costs.size.total
        operations = 2 * tokens * ((BACKWARD + trained) * sum(parts.values()) + again)
        return operations / (self.mfu * self.device.operations)

    def update(self, share: float) -> float:
        """Muon's products at the same share of the peak, and every number read and written once."""
        size = self.costs.size
        moved = 2 * 4 * (2 * size.trained + size.moments)
        rate = HOST_RATE if self.costs.recipe.train.offload else self.device.bandwidth
        return share * (self.costs.update() / (self.mfu * self.device.operations) + moved / rate)

    def send(self, message: Sent) -> float:
        if message.span == HOST:
            return message.bytes / HOST_RATE
        near = message.span <= self.device.per_node
        return message.bytes / (self.device.within if near else self.device.between)

    def assumptions(self) -> list[str]:
        one = self.device
        return [
            f"{one.name}: {one.operations / 1e12:,.4g} TFLOP/s dense bfloat16, {one.memory / 1e9:,.0f} GB at "
            f"{one.bandwidth / 1e12:.3g} TB/s; links {one.within / 1e9:,.3g} GB/s in a machine of {one.per_node}, "
            f"{one.between / 1e9:,.3g} GB/s between machines (data sheets)",
            f"utilisation: {self.mfu:.0%} of that peak in the model's products (--mfu), assumed, not measured on it",
            f"{RESERVE:.0%} of the memory is left to the device's context, buffers and gaps",
            *([_OFFLOAD] if self.costs.recipe.train.offload else []),
        ]


class Pieces(NamedTuple):
    """What was measured on this machine, by every one of so many processes at once."""

    layers: Mapping[str, Mapping[int, float]]
    """Seconds a token of forward and backward passes of a layer of each name, by length."""
    ends: float
    """Seconds a token of embedding, last norm, loss and clipping."""
    update: float
    """Seconds of an update of all parameters."""
    bytes: float
    """Bytes a second that a rank sends to owners and back; 0 where there was one process."""
    program: float
    """Bytes of a process that has made a step of a small model, without what that model is."""
    room: float
    """Bytes of memory there are for each."""
    processes: int
    told: str
    """What was measured, in words."""


class Measured(NamedTuple):
    """This machine."""

    costs: Costs
    pieces: Pieces

    @property
    def apart(self) -> bool:
        return False

    @property
    def room(self) -> float:
        return self.pieces.room

    @property
    def program(self) -> float:
        return self.pieces.program

    def compute(self, tokens: float, length: int, checkpointing: bool) -> float:
        again = self.costs.again if checkpointing else {}
        passes = {name: one.count + again.get(name, 0) / (1 + BACKWARD) for name, one in self.costs.layers.items()}
        return tokens * (self.pieces.ends + sum(n * self._layer(name, length) for name, n in passes.items()))

    def _layer(self, name: str, length: int) -> float:
        """Seconds a token, beyond the measured lengths on the line through the last two where the work grows."""
        found = sorted(self.pieces.layers[name].items())
        last, seconds = found[-1]
        if length <= last or len(found) < 2 or not self.costs.layers[name].mixing.grows:
            return min(found, key=lambda one: abs(one[0] - length))[1]
        before, fewer = found[-2]
        return seconds + max(0.0, seconds - fewer) / (last - before) * (length - last)

    def update(self, share: float) -> float:
        return share * self.pieces.update

    def send(self, message: Sent) -> float:
        return message.bytes / self.pieces.bytes if self.pieces.bytes and message.span != HOST else 0.0

    def assumptions(self) -> list[str]:
        return [self.pieces.told]
