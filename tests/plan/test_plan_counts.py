"""What is counted of a recipe: against the tensors of real models and optimisers, and against arithmetic."""

from dataclasses import replace

import pytest
import torch
from tiny_plan import costs, tiny

from atma.config import LoraConfig, preset
from atma.model import Model
from atma.plan.activations import layer_bytes, layer_saved
from atma.plan.costs import costs_of
from atma.plan.work import Curve, layer_of, layer_works, outline, size_of
from atma.train.optim import Optimisers
from atma.train.start import adapters


def moved(recipe):
    """A model of the recipe and its optimisers after one update."""
    model = Model(recipe.model)
    adapters(recipe, model)
    optimisers = Optimisers(model, recipe.train)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimisers.step(1.0)
    return model, optimisers


@pytest.mark.parametrize(
    "recipe",
    [
        tiny(),
        tiny(("local", "global")),
        tiny(("rope",), tied_head=True),
        tiny(("gated_deltanet", "rope"), optimiser="adamw"),
        tiny(lora=LoraConfig(rank=2), init_from="nano", init_hash="0" * 64),
    ],
    ids=["rope", "global", "tied", "adamw", "adapters"],
)
def test_numbers_of_weights_and_optimisers_are_those_of_the_real_ones(recipe):
    model, optimisers = moved(recipe)
    size = size_of(recipe, outline(recipe))
    assert size.total == sum(p.numel() for p in model.parameters())
    assert size.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size.moments + size.scalars == sum(tensor.numel() for tensor in optimisers.tensors().values())
    assert sum(rows * columns for rows, columns in size.matrices) == sum(
        tensor.numel() for name, tensor in optimisers.tensors().items() if name.startswith("muon/")
    )


def test_parts_are_those_of_the_model_and_of_its_layers_by_name():
    parts = size_of(tiny(), outline(tiny())).parameters
    assert set(parts) == {"embedding", "mixers: local", "mixers: rope", "MLPs", "norms", "head"}
    assert parts["embedding"] == 96 * 32 and parts["head"] == 96 * 32 + 96


@pytest.mark.parametrize("name", ["local", "rope", "global", "gated_deltanet", "landmark"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_activations_of_another_batch_are_within_a_tenth_of_what_is_counted_of_it(name, compute):
    config = preset("nano").changed({"pattern": (name,), "depth": 1})
    saved, block = layer_saved(config, name, compute), layer_of(config, name)
    for rows, length in ((3, 256), (2, 640)):
        counted = layer_bytes(block, config.width, rows, length, compute)
        assert saved.at(rows * length, length) == pytest.approx(counted, rel=0.1)


def test_attention_multiplies_every_query_with_half_the_keys_and_their_weights_with_half_the_values():
    config = preset("nano").changed({"pattern": ("rope",), "depth": 1})
    work = layer_works(config)["rope"]
    assert work.attention(2048) == pytest.approx(2 * 64 * 2048, rel=0.02)
    assert work.attention(1 << 20) == pytest.approx(2 * 64 * (1 << 20), rel=0.02)
    assert work.dense == sum(m.weight.numel() for m in layer_of(config, "rope").modules() if hasattr(m, "in_features"))


def test_a_window_is_bounded_work():
    config = preset("nano").changed({"pattern": ("rope",), "depth": 1, "window": 64})
    work = layer_works(config)["rope"]
    assert work.mixing.at(1 << 20) < 1.05 * work.mixing.at(2048)
    model = costs(pattern=("rope",), window=16)
    assert model.overtakes() is None


def test_a_state_gathers_keys_and_values_and_a_recurrence_carries_what_it_knows():
    works = layer_works(tiny(("rope", "gated_deltanet")).model)
    assert works["rope"].gathered == 2 * 2 * 8
    assert works["gated_deltanet"].gathered == 0 < works["gated_deltanet"].carried


def test_where_attention_overtakes_it_is_as_much_work_as_the_dense_products():
    found = costs()
    length = found.overtakes()
    assert length is not None
    for at, over in ((length, True), (length - 1, False)):
        parts = found.products(at)
        assert (parts["attention"] >= parts["dense products"] + parts["head"]) is over


def test_a_quantity_goes_on_as_it_grew():
    line = Curve((256, 512, 1024), (1.0 + 256, 1.0 + 512, 1.0 + 1024))
    assert line.grows and line.at(384) == 385 and line.at(1 << 20) == 1 + (1 << 20)
    window = Curve((256, 512, 1024), tuple(100 - 1000 / length for length in (256, 512, 1024)))
    assert not window.grows and window.at(1 << 20) == pytest.approx(100 - 1000 / (1 << 20))
    flat = Curve((256, 512, 1024), (7.0, 7.0, 7.0))
    assert not flat.grows and flat.at(1 << 20) == 7


def test_a_recipe_in_epochs_asks_for_its_tokens():
    with pytest.raises(ValueError, match=r"a plan reads no data.*train\.tokens=NUMBER"):
        costs_of(replace(tiny(), train=replace(tiny().train, epochs=2.0)), torch.float32)
