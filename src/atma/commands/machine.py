"""Where a command computes: the options --device and --threads, the same in every command that computes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from atma.model import Model


@dataclass(frozen=True)
class Machine:
    """Where to compute."""

    device: str | None = None
    """cpu, cuda or a certain GPU such as cuda:1; a GPU if there is one by default."""
    threads: int = 0
    """Processor threads; OMP_NUM_THREADS, or else PyTorch's own number, by default."""

    def take(self) -> "torch.device":
        """The device, threads set. ValueError: there is no such device, or no such number."""
        from atma.device import device_of
        from atma.threads import take

        take(self.threads)
        return device_of(self.device)

    def of(self, model: "Model") -> "torch.device":
        """The device of a model: by default the CPU where its weights are narrow. ValueError: it cannot be there."""
        from atma.narrow import home

        return home(model, self.device)
