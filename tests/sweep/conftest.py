"""A corpus of bytes and sweeps on it whose cells take moments."""

from pathlib import Path
from typing import Any

import pytest

from atma.data.prepare import Preparation, prepare
from atma.sweep.cells import Sweep, expand

TINY: dict[str, dict[str, Any]] = {
    "model": {"preset": "nano-test", "width": 16, "head_width": 8},
    "train": {
        "length": 32,
        "batch_tokens": 64,
        "tokens": 640,
        "checkpoint_every": 3,
        "evaluate_every": 1000,
        "evaluation_tokens": 64,
    },
    "evaluation": {"lengths": [32, 64], "documents": 2, "target_tokens": 16, "needle_trials": 0},
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of prepared bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text(f"the cat of number {number} sat on the mat\n" * (30 + number))
    prepare(folder / "text", folder / "data", Preparation(tokenizer="bytes"))
    return folder / "data"


def tiny_sweep(corpus: Path, table: dict[str, Any] | None = None) -> Sweep:
    """A sweep of tiny models, two cells unless `table` says otherwise."""
    chosen = table or {"factors": {"attention": {"field": "model.core", "values": ["polar", "rope"]}}}
    return expand(TINY | {"name": "tiny", "data": {"path": str(corpus)}, "sweep": chosen})
