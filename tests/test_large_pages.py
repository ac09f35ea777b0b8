"""Weights in large pages: the same model, each tensor with a storage of its own."""

import mmap

import pytest
import torch
from safetensors.torch import save_model

import atma
from atma import large_pages
from atma.large_pages import PAGE, in_large_pages

linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for")


class Some(torch.nn.Module):
    """Tied weights, a transposed one, a view of a larger storage, numbers of other kinds, and nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.large = torch.nn.Parameter(torch.randn(600, 1000))
        self.tied = self.large
        self.turned = torch.nn.Parameter(torch.randn(30, 70).T)
        self.part = torch.nn.Parameter(torch.randn(10, 10)[3:])
        self.low = torch.nn.Parameter(torch.randn(7).bfloat16())
        self.register_buffer("whole", torch.arange(5))
        self.register_buffer("none", torch.empty(0))
        self.register_buffer("yes", torch.tensor([True, False, True]))


def mapped(x: torch.Tensor, beside: torch.Tensor) -> bool:
    """Whether both lie in one mapping of Some's size."""
    return abs(x.data_ptr() - beside.data_ptr()) < 2 * PAGE


@linux
def test_numbers_shapes_strides_and_what_is_tied_stay():
    torch.manual_seed(0)
    model = Some()
    before = {name: (x.clone(), x.stride(), x.data_ptr()) for name, x in model.state_dict(keep_vars=True).items()}
    in_large_pages([*model.parameters(), *model.buffers()])
    for name, x in model.state_dict(keep_vars=True).items():
        numbers, strides, place = before[name]
        assert torch.equal(x, numbers) and x.stride() == strides and x.dtype == numbers.dtype
        assert x.data_ptr() != place or not x.numel()
        assert not x.numel() or mapped(x, model.large)
    assert model.tied is model.large and model.large.data_ptr() % PAGE == 0
    assert model.large.untyped_storage().nbytes() == model.large.nbytes
    with torch.no_grad():
        model.large.add_(1)
    assert torch.equal(model.tied, before["large"][0] + 1)


@linux
def test_it_is_saved_copied_and_trained_as_before(tmp_path):
    model = Some()
    del model.part  # which is none that could be saved
    in_large_pages([*model.parameters(), *model.buffers()])
    save_model(model, str(tmp_path / "x.safetensors"))
    assert (tmp_path / "x.safetensors").stat().st_size < 2 * sum(x.nbytes for x in model.parameters())
    model.large.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert model.large.grad is not None and torch.equal(model.large.grad, torch.ones(600, 1000))


@linux
def test_memory_lives_as_long_as_a_tensor_of_it():
    model = Some()
    in_large_pages([*model.parameters(), *model.buffers()])
    wanted, kept = model.turned.detach().clone(), model.turned
    del model
    assert torch.equal(kept, wanted)


@pytest.mark.parametrize("lacks", ["system", "kernel", "bytes"])
def test_a_model_stays_where_it_is_where_there_are_no_such_pages(monkeypatch, lacks):
    class Refused(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    if lacks == "system":
        monkeypatch.delattr(large_pages.mmap, "MADV_HUGEPAGE", raising=False)
    elif lacks == "kernel":
        monkeypatch.setattr(large_pages.mmap, "mmap", Refused)
    model = torch.nn.Linear(8, 8) if lacks == "bytes" else Some()
    places = [x.data_ptr() for x in model.parameters()]
    in_large_pages([*model.parameters(), *model.buffers()])
    assert [x.data_ptr() for x in model.parameters()] == places


@linux
@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_loaded_model_lies_in_them(weights):
    model = atma.load("nano", weights=weights).model
    places = [x.data_ptr() for x in (*model.parameters(), *model.buffers()) if x.numel()]
    total = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    assert min(places) % PAGE == 0 and max(places) - min(places) < 2 * total
