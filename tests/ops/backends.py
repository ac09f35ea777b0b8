"""The backends that this machine has, as parameters of tests."""

import pytest
import torch

from atma.ops import native

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(not native.available(torch.float64), reason=native.status().reason)
)
FAST = ["cpu", NATIVE]
ALL = [*FAST, "reference"]
