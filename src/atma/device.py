"""The device that an option names."""

import torch


def device_of(name: str | None, option: str = "--device") -> torch.device:
    """The device of that name (None: a GPU if there is one). ValueError, behind `option`, if this machine lacks it."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{option} {name}: no such kind of device; here there is {there()}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{option} {name}: models run on cpu or cuda; here there is {there()}")
    if device.type == "cuda" and (device.index or 0) >= _gpus():
        raise ValueError(f"{option} {name}: not on this machine; here there is {there()}")
    return device


def there() -> str:
    """What this machine has to compute on, in words."""
    names = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(_gpus())]
    return ", ".join(["cpu", *names]) if names else "cpu alone, and no GPU that PyTorch can use"


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
