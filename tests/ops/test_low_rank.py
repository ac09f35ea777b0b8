"""What adapters add to rows: that of the matrices, for a row the same bits whatever is beside it."""

import pytest
import torch

from atma.ops import native, use_backend
from atma.ops.low_rank import Factors, Stack, add
from atma.ops.native.recorder import Recorder

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1.6e-2}
compiled = pytest.mark.skipif(not native.available(torch.float32), reason="needs the compiled kernels")


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(rank, inputs, outputs, seed):
    return Factors(drawn(rank, inputs, seed=seed) * inputs**-0.5, drawn(outputs, rank, seed=seed + 1) * rank**-0.5)


def stack_of(inputs, outputs, dtype):
    ranks = (3, None, 17, 64)
    found = [None if rank is None else factors(rank, inputs, outputs, rank) for rank in ranks]
    return found, Stack(found, dtype, CPU)


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=compiled)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 3), (64, 257), (130, 64)])
@torch.inference_mode()
def test_a_row_gets_what_its_adapter_adds_and_others_stay(inputs, outputs, dtype, backend):
    found, stack = stack_of(inputs, outputs, dtype)
    which = torch.tensor([2, -1, 0, 3, 1, 2, -1, 0], dtype=torch.int32)
    x, before = drawn(8, 5, inputs, seed=4).to(dtype), drawn(8, 5, outputs, seed=5).to(dtype)
    y = before.clone()
    with use_backend(backend):
        add(y, x, which, stack)
    for row, slot in enumerate(which.tolist()):
        one = found[slot] if slot >= 0 else None
        if one is None:
            assert torch.equal(y[row], before[row])
            continue
        expected = before[row].double() + x[row].double() @ one.a.T @ one.b.T
        torch.testing.assert_close(y[row].double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)
        assert not torch.equal(y[row], before[row])


@compiled
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@torch.inference_mode()
def test_the_bits_of_a_row_depend_on_no_other_row(dtype):
    _, stack = stack_of(130, 70, dtype)
    which = torch.randint(-1, 4, (61,), generator=torch.Generator().manual_seed(1)).int()
    x, before = drawn(61, 3, 130, dtype=dtype), drawn(61, 3, 70, seed=1, dtype=dtype)
    whole = before.clone()
    add(whole, x, which, stack)
    for some in (slice(0, 1), slice(7, 9), slice(20, 61)):
        part = before[some].clone()
        add(part, x[some], which[some], stack)
        assert torch.equal(part, whole[some])
    for row in range(0, 61, 7):
        for token in range(3):
            alone = before[row, token : token + 1].clone()
            add(alone, x[row, token : token + 1], which[row : row + 1], stack)
            assert torch.equal(alone[0], whole[row, token])


@compiled
@torch.inference_mode()
def test_the_number_of_threads_changes_no_bit():
    _, stack = stack_of(130, 70, torch.float32)
    which = torch.arange(40, dtype=torch.int32) % 4
    x, found = drawn(40, 30, 130, dtype=torch.float32), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(torch.zeros(40, 30, 70))
            add(found[-1], x, which, stack)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@compiled
def test_a_recorded_call_goes_by_the_adapters_of_its_replay():
    _, stack = stack_of(32, 24, torch.float32)
    which, x, y = torch.full((4,), -1, dtype=torch.int32), drawn(4, 1, 32, dtype=torch.float32), torch.zeros(4, 1, 24)
    with torch.no_grad(), Recorder([which, x, y]) as recorder:
        add(y, x, which, stack)
    assert not y.any()
    which[:] = torch.tensor([3, 0, -1, 2])
    recorder.program().replay()
    wanted = torch.zeros(4, 1, 24)
    add(wanted, x, which, stack)
    assert torch.equal(y, wanted)
    assert y[[0, 1, 3]].any(-1).all()


def test_rows_that_are_not_those_of_the_texts_are_refused():
    _, stack = stack_of(32, 24, torch.float32)
    with pytest.raises(ValueError, match="rows are not the texts'"):
        add(torch.zeros(6, 24), torch.zeros(6, 32), torch.zeros(3, dtype=torch.int32), stack)
