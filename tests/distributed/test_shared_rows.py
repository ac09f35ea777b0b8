"""Rows that several processes share: losses and gradients are those of one process, for every mixer."""

import json

import pytest
import torch

from atma.mixers.stretches import stretch_of
from atma.mixers.table import names
from tests.harness.processes import group

OFTEN = ("gated_conv", "atma", "polar", "rope", "gla", "titans", "polar_pages")


@pytest.mark.parametrize(
    ("world", "kinds"),
    [
        (2, OFTEN),
        pytest.param(2, tuple(names()), marks=pytest.mark.slow),
        pytest.param(3, tuple(names()), marks=pytest.mark.slow),
        pytest.param(4, OFTEN, marks=pytest.mark.slow),
    ],
    ids=lambda x: str(x) if isinstance(x, int) else f"{len(x)} mixers",
)
def test_shared_rows_have_the_loss_and_the_gradients_of_whole_ones(world, kinds, tmp_path):
    """In float64 to 1e-10; documents that are whole rows, that end inside, at and next to edges, and short ones."""
    path = tmp_path / "told.json"
    group(world, ["-m", "tests.distributed.shared_rows", str(path), *kinds])
    told = json.loads(path.read_text())
    assert {name.split("-")[0] for name in told} == set(kinds)
    assert {name: error for name, error in told.items() if not error <= 1e-10} == {}


def parts(segments, index, world=2):
    found = stretch_of(index, range(world), torch.tensor(segments), (len(segments), len(segments[0]))).parts
    return [(part.rows.tolist(), part.begun, part.open) for part in found]


def test_where_documents_begin_and_end_in_a_stretch():
    rows = [[0] * 8, [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]]
    assert parts(rows, 0) == [([0, 3], 0, 0), ([2], 0, 3), ([1], 0, 4)]
    assert parts(rows, 1) == [([1], 0, 4), ([3], 1, 4), ([0, 2], 4, 4)]
    assert parts([[0] * 9, [0, 1, 1, 1, 2, 2, 2, 2, 2]], 1, 3) == [([1], 1, 1), ([0], 3, 3)]


def test_a_length_that_cannot_be_shared_is_told():
    with pytest.raises(ValueError, match="rows of 10 tokens cannot be shared by 3 processes"):
        stretch_of(0, range(3), None, (1, 10))
