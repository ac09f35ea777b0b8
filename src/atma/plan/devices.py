"""What devices can do at most, from their vendors' data sheets, by name.

Rates are of one device. A link's rate is in one direction, half of what data sheets sum over both.
"""

import difflib
from typing import NamedTuple

GB, TB, TERA = 1e9, 1e12, 1e12
HERE = "cpu"
"""This machine's processor, which is measured."""


class Device(NamedTuple):
    """One device and its place in a machine of `per_node`."""

    name: str
    operations: float
    """Dense bfloat16 operations a second, an addition and a multiplication counted as two."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second from and to its memory."""
    within: float
    """Bytes a second to another device of the same machine."""
    between: float
    """Bytes a second to a device of another machine."""
    per_node: int


_ALL = (
    # NVIDIA B200: DGX B200 data sheet (8 GPUs: 36 PFLOP/s sparse, 1,440 GB, 64 TB/s), fifth NVLink 1.8 TB/s both ways,
    # ConnectX-7 400 Gb/s a GPU.
    Device("b200", 2250 * TERA, 180 * GB, 8 * TB, 900 * GB, 50 * GB, 8),
    # NVIDIA H200 SXM: H200 data sheet (1,979 TFLOP/s sparse, 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways); DGX H200:
    # ConnectX-7 400 Gb/s a GPU.
    Device("h200", 989.5 * TERA, 141 * GB, 4.8 * TB, 450 * GB, 50 * GB, 8),
    # NVIDIA H100 SXM: H100 data sheet (1,979 TFLOP/s sparse, 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways); DGX H100:
    # ConnectX-7 400 Gb/s a GPU.
    Device("h100", 989.5 * TERA, 80 * GB, 3.35 * TB, 450 * GB, 50 * GB, 8),
    # NVIDIA A100 80GB SXM: A100 data sheet (312 TFLOP/s dense, 80 GB, 2,039 GB/s, NVLink 600 GB/s both ways); DGX A100:
    # ConnectX-6 200 Gb/s a GPU.
    Device("a100-80", 312 * TERA, 80 * GB, 2.039 * TB, 300 * GB, 25 * GB, 8),
    # NVIDIA L40S: L40S data sheet (362 TFLOP/s dense, 48 GB, 864 GB/s, PCIe 4 ×16 64 GB/s both ways). Between machines
    # 200 Gb/s for two GPUs are assumed: no data sheet fixes it.
    Device("l40s", 362 * TERA, 48 * GB, 864 * GB, 32 * GB, 12.5 * GB, 8),
    # NVIDIA GeForce RTX 4090: Ada architecture paper (165.2 TFLOP/s dense with float32 sums, 24 GB, 1,008 GB/s), PCIe 4
    # ×16. Between machines 10 Gb/s are assumed.
    Device("rtx-4090", 165.2 * TERA, 24 * GB, 1.008 * TB, 32 * GB, 1.25 * GB, 4),
    # AMD Instinct MI300X: data sheet (1,307.4 TFLOP/s dense, 192 GB, 5.3 TB/s, seven links of 128 GB/s both ways).
    # Between machines 400 Gb/s a GPU are assumed.
    Device("mi300x", 1307.4 * TERA, 192 * GB, 5.3 * TB, 448 * GB, 50 * GB, 8),
)
DEVICES = {one.name: one for one in _ALL}


def device_named(name: str) -> Device:
    """The device of a data sheet. ValueError names the nearest and all."""
    wanted = name.lower().strip()
    if wanted in DEVICES:
        return DEVICES[wanted]
    known = (HERE, *DEVICES)
    near = difflib.get_close_matches(wanted, known, 1, 0.3)
    meant = f"did you mean '{near[0]}'? " if near else ""
    raise ValueError(f"--device {name}: no such device; {meant}known: {', '.join(known)} ({HERE}: this machine)")
