"""The device that an option names."""

import torch


def device_of(name: str | None, option: str = "--device") -> torch.device:
    """The device of that name (None: a GPU if there is one). ValueError, behind `option`, if this machine lacks it."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{option} {name}: no such kind of device; take cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{option} {name}: models run on cpu or cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"{option} {name}: this machine has {count} GPUs that PyTorch can use; take cpu")
    return device
