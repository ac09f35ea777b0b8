"""Matrices that are gathered in bfloat16: which they are, what of them is kept, and who may read them."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_run import rows, tiny_model
from torch import nn

from atma.lora import LoraConfig, attach
from atma.model import Model
from atma.train.parallel import join
from atma.train.shards import divide, mesh_of
from atma.train.step import computing
from atma.train.travel import Gathered, Rows, low_names

CPU = torch.device("cpu")


class Mesh:
    def size(self) -> int:
        return 2


class Curved(nn.Module):
    """Reads a weight that it keeps in float32, and one that is no layer's."""

    exact = ("rate.weight",)

    def __init__(self):
        super().__init__()
        self.rate, self.gate, self.table = nn.Linear(24, 4), nn.Linear(24, 4), nn.Embedding(4, 24)


def test_weights_of_linear_layers_travel_that_nothing_else_reads():
    model = Model(tiny_model())
    model.blocks[0].mixer.added = Curved()
    found = low_names(model)
    assert "blocks.0.mixer.added.gate.weight" in found and "head.weight" in found
    assert not found & {"blocks.0.mixer.added.rate.weight", "blocks.0.mixer.added.table.weight", "embed.weight"}
    assert all(name.endswith(".weight") and "norm" not in name for name in found)
    assert "head.weight" not in low_names(Model(tiny_model(tied_head=True)))
    assert not low_names(model.double())


def test_layers_with_adapters_travel_unless_states_are_made_of_them():
    model = Model(tiny_model())
    attach(model, LoraConfig(rank=2, targets=("blocks.0.mixer.*",)))
    adapted = low_names(model) - low_names(model, states=True)
    assert adapted and all(name.startswith("blocks.0.mixer.") for name in adapted)


def test_rows_are_rounded_and_filled_up_before_they_are_sent_wherever_they_lie():
    part = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).as_subclass(Rows)
    (sent,), _ = part.fsdp_pre_all_gather(Mesh(), torch.Size((5, 4)), None, nn.Identity(), None)
    assert torch.equal(sent, F.pad(torch.tensor(part.tolist()), (0, 0, 0, 1)).bfloat16()) and type(sent) is torch.Tensor
    (sent,), _ = part.to("meta", non_blocking=True).fsdp_pre_all_gather(Mesh(), sent.shape, None, nn.Identity(), None)
    assert sent.device.type == "meta" and sent.dtype == torch.bfloat16


def test_a_gathered_weight_is_read_in_bfloat16_alone():
    weight = nn.Parameter(Gathered(torch.ones(3, 4, dtype=torch.bfloat16)))
    x = torch.ones(2, 4)
    with computing(CPU, torch.bfloat16):
        F.linear(x, weight).float().sum().backward()
    assert weight.dtype == weight.grad.dtype == torch.float32 and torch.equal(weight.grad, torch.full((3, 4), 2.0))
    assert weight.new_zeros(2).dtype == torch.float32 and weight[:2].mT.shape == (4, 2)
    for read in (lambda: F.linear(x, weight), lambda: x @ weight.t(), lambda: weight.float() + 1):
        with pytest.raises(
            ValueError, match=r"a weight \(\d, \d\) that travels in bfloat16 is read in float32 by aten"
        ):
            read()


@pytest.fixture
def alone():
    yield join(CPU, offload=True)
    dist.destroy_process_group()


def test_no_copy_of_a_weight_is_kept_for_the_backward_pass(alone):
    model = Model(tiny_model(vocab_size=37))
    names = {name for name in low_names(model) if name.startswith("blocks.")}
    shapes = {tuple(sorted(parameter.shape)) for name, parameter in model.named_parameters() if name in names}
    divide(model, alone, mesh_of(alone, CPU, 60), torch.bfloat16)
    kept, batch = [], rows(0)

    def keep(x):
        if x.dtype == torch.bfloat16 and tuple(sorted(x.shape)) in shapes:
            kept.append(x.untyped_storage())
        return x

    with computing(CPU, torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model.loss(model(batch.tokens)[0], batch.targets).sum()
    left = [storage.nbytes() for storage in kept]
    assert len(left) == len(names) and set(left) == {0}
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
