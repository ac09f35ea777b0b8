"""Shared fixtures: uninitialised memory is NaN, the golden vectors, and one tiny model of every kind."""

from pathlib import Path

import pytest
import torch

from atma.config import ModelConfig

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """`torch.empty` returns NaN: whatever reads before it writes shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def golden():
    """The folder of golden vectors; the test skips where it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip("the golden vectors (../shared/golden) are not beside this checkout")
    return GOLDEN


def tiny(core: str = "polar", memory: bool = True, window: int | None = None) -> ModelConfig:
    """Four layers, width 16, two query heads on one key/value head of width 8, vocabulary 23."""
    return ModelConfig(
        vocab_size=23,
        width=16,
        depth=4,
        query_heads=2,
        key_value_heads=1,
        head_width=8,
        mlp_multiple=2,
        core=core,
        memory=memory,
        window=window,
        max_half_life=256,
    )
