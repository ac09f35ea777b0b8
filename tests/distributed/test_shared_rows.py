"""Rows that several processes share: losses and gradients are those of one process, for every mixer."""

import json

import pytest
import torch

from atma.mixers.stretches import edges_of, stretch_of
from atma.mixers.stretches_prefix import composes
from atma.mixers.table import names
from tests.harness.processes import group

OFTEN = ("gated_conv", "atma", "polar", "rope", "gla", "titans", "polar_pages")
QUARTERS = [tuple(names())[i::4] for i in range(4)]
"""Of all mixers: a group of processes for each."""
SLOW = [(*sizes, some) for sizes in ((2, 2, 1), (3, 3, 1), (2, 1, 2), (2, 2, 2)) for some in QUARTERS]
SLOW += [(4, 4, 1, OFTEN), (4, 2, 1, OFTEN), (4, 2, 2, OFTEN), (4, 4, 2, OFTEN), (4, 2, 4, OFTEN), (4, 1, 2, OFTEN)]


def _named(x: object) -> str:
    return f"{x[0]} and {len(x) - 1} more" if isinstance(x, tuple) else str(x)


@pytest.mark.parametrize(
    ("world", "context", "shard", "kinds"),
    [
        (2, 2, 1, ("gated_conv-0", "atma", "titans", "low_rank-0")),
        (3, 3, 1, ("gla-0",)),
        (2, 2, 2, ("atma", "glu")),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW),
    ],
    ids=_named,
)
def test_losses_and_gradients_are_those_of_one_process(world, context, shard, kinds, tmp_path):
    """Rows shared by `context` processes, weights by `shard`: in float64 to 1e-10. Documents that are whole rows, that
    end inside, at and next to edges, and short ones; the chain, and the prefix form where a mixer has it."""
    path = tmp_path / "told.json"
    group(world, ["-m", "tests.distributed.shared_rows", str(path), str(context), str(shard), *kinds])
    told = json.loads(path.read_text())
    assert {name.split("-")[0] for name in told} == {kind.split("-")[0] for kind in kinds}
    assert {name: error for name, error in told.items() if not error <= 1e-10} == {}


@pytest.mark.parametrize(
    ("context", "kinds"),
    [(1, ("atma", "titans")), *((context, some) for context in (1, 2) for some in QUARTERS)],
    ids=_named,
)
@pytest.mark.slow
def test_weights_that_travel_in_bfloat16_change_not_a_bit(context, kinds, tmp_path):
    """Losses and gradients of steps in bfloat16, by two processes, are those of float32 weights gathered."""
    path = tmp_path / "told.json"
    group(2, ["-m", "tests.distributed.travelling", str(path), str(context), *kinds])
    told = json.loads(path.read_text())
    assert {name.split("-")[0] for name in told} == set(kinds)
    assert {name: differing for name, differing in told.items() if differing} == {}


def parts(segments, index, world=2):
    found = stretch_of(index, range(world), torch.tensor(segments), (len(segments), len(segments[0]))).parts
    return [(part.rows.tolist(), part.begun, part.open) for part in found]


def test_where_documents_begin_and_end_in_a_stretch():
    rows = [[0] * 8, [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]]
    assert parts(rows, 0) == [([0, 3], 0, 0), ([2], 0, 3), ([1], 0, 4)]
    assert parts(rows, 1) == [([1], 0, 4), ([3], 1, 4), ([0, 2], 4, 4)]
    assert parts([[0] * 9, [0, 1, 1, 1, 2, 2, 2, 2, 2]], 1, 3) == [([1], 1, 1), ([0], 3, 3)]


def test_shares_make_stretches_of_unequal_length():
    assert edges_of(24, 2, (5, 3)) == [0, 15, 24] and edges_of(24, 2) == [0, 12, 24] and edges_of(7, 1) == [0, 7]
    made = stretch_of(1, range(2), None, (1, 24), (5, 3))
    assert (made.start, made.tokens, made.seen) == (15, 9, 24)
    with pytest.raises(ValueError, match=r"shares \[1, 1e-06\] of 10 tokens leave a process none"):
        edges_of(10, 2, [1, 1e-6])


def test_the_form_is_chosen_by_layers_and_processes():
    assert [composes(layers, 2) for layers in (1, 2, 3, 48)] == [True, True, False, False]
    assert composes(6, 4) and not composes(7, 4) and not composes(1, 1)


def test_a_length_that_cannot_be_shared_is_told():
    with pytest.raises(ValueError, match="rows of 10 tokens cannot be shared by 3 processes"):
        stretch_of(0, range(3), None, (1, 10))
