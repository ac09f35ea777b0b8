"""Low-rank adapters on any model: what they hit, what stays as it was, and what merging leaves."""

import dataclasses

import pytest
import torch
from torch import nn

from atma.config import ModelConfig, TrainConfig
from atma.decoding import Decoder
from atma.lora import (
    Adapted,
    LoraConfig,
    adapted_layers,
    adapter_tensors,
    attach,
    load_adapters,
    merge,
    merged_tensors,
    save_adapters,
)
from atma.mixers import names, small
from atma.model import Model
from atma.narrow import narrow
from atma.serve.exact import Served
from atma.train.optim import Optimisers
from tests.conftest import tiny

EVERYTHING = LoraConfig(rank=2, targets=("blocks", "head"))


def moved(model, seed=0):
    """Every number away from where it starts, so that no adapter and no projection is hidden behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.ndim == 1 else 0.5 * parameter.shape[-1] ** -0.5))
    return model


def adapted(config: ModelConfig | None = None, lora: LoraConfig = EVERYTHING, dtype: torch.dtype = torch.float32):
    model = moved(Model(config or tiny(), torch.Generator().manual_seed(9))).to(dtype)
    attached = attach(model, lora, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_b.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return model, attached


def fresh(seed=0):
    """The base of `adapted`."""
    return moved(Model(tiny(), torch.Generator().manual_seed(9)), seed)


def scores(model, tokens):
    return model.logits(model(tokens)[0]).detach()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 23, (2, 21), generator=torch.Generator().manual_seed(3))


def test_a_fresh_adapter_changes_nothing(tokens):
    model = fresh()
    before = scores(model, tokens)
    attach(model, EVERYTHING)
    assert torch.equal(scores(model, tokens), before)


def test_by_default_every_projection_of_every_block_is_adapted_and_the_head_is_not():
    model = Model(tiny())
    attached = attach(model)
    wanted = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "head"}
    assert {part.name for part in attached.adapted} == wanted == set(adapted_layers(model))
    assert attached.trainable == sum(parameter.numel() for parameter in adapter_tensors(model).values())


def test_the_report_tells_each_kind_of_layer_its_shape_and_its_numbers():
    attached = attach(Model(tiny()), LoraConfig(rank=2, targets=("q_proj", "mlp.in_proj"), train=("norm_*",)))
    told = "\n".join(attached.lines())
    assert "blocks.*.mlp.in_proj" in told and "64 × 16" in told and "layers 0-3" in told
    assert "adapter   blocks.2.mixer.q_proj" in told.replace("*", "2") and "blocks.*.norm_mlp.weight" in told
    assert told.endswith(f"of the model's {attached.total:,}")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (LoraConfig(targets=("q_prj",)), r"'lora.targets': 'q_prj' hits no linear layer .* 'q_proj'"),
        (LoraConfig(targets=("blocks.9",)), r"'blocks.9' hits no linear layer"),
        (LoraConfig(train=("norm_mixr",)), r"'lora.train': 'norm_mixr' hits no parameter .* 'norm_mixer'"),
    ],
)
def test_a_pattern_that_hits_nothing_names_the_nearest_that_would(config, told):
    model = Model(tiny())
    with pytest.raises(ValueError, match=told):
        attach(model, config)
    assert not adapted_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 0}, "'rank'"),
        ({"alpha": 0.0}, "'alpha'"),
        ({"targets": ()}, "'targets'"),
        ({"train": ("",)}, "'train'"),
    ],
)
def test_a_configuration_without_sense_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        LoraConfig(**changes)


def test_training_leaves_every_number_of_the_base_and_keeps_no_optimiser_state_for_it(tokens):
    model = fresh()
    attach(model, LoraConfig(rank=2, train=("norm_mixer", "memory.beta_proj")))
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    started = {name: value.detach().clone() for name, value in adapter_tensors(model).items()}
    optimisers = Optimisers(model, TrainConfig(lora_rate=0.01))
    for _ in range(3):
        hidden, _ = model(tokens[:, :-1])
        model.loss(hidden, tokens[:, 1:]).mean().backward()
        optimisers.step(1.0)
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())
    assert all(not torch.equal(value, started[name]) for name, value in adapter_tensors(model).items())
    assert {key.split("/")[1] for key in optimisers.tensors()} == set(adapter_tensors(model))


@pytest.mark.parametrize("kind", names())
def test_any_mixer_is_merged_to_the_outputs_it_had(kind, tokens):
    config = ModelConfig(23, width=16, depth=2, pattern=(kind,), mlp_multiple=2, **small(kind)[0])
    model, attached = adapted(config, dtype=torch.float64)
    before = scores(model, tokens)
    assert attached.adapted
    model(tokens)[0].square().mean().backward()
    merge(model)
    after = scores(model, tokens)
    assert not adapted_layers(model) and set(model.state_dict()) == set(Model(config).state_dict())
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_in_float32_merging_moves_the_outputs_by_rounding_alone(tokens):
    model, _ = adapted()
    before, plain = scores(model, tokens), scores(fresh(), tokens)
    merge(model)
    assert (before - plain).abs().max() > 0.01
    torch.testing.assert_close(scores(model, tokens), before, rtol=1e-5, atol=1e-5)


def test_what_would_be_merged_is_told_without_merging(tokens):
    model, _ = adapted()
    told = merged_tensors(model)
    before = scores(model, tokens)
    assert torch.equal(before, scores(model, tokens)) and adapted_layers(model)
    merge(model)
    assert told.keys() == model.state_dict().keys()
    assert all(torch.equal(value, told[name]) for name, value in model.state_dict().items())


def test_with_a_state_token_by_token_an_adapted_model_gives_what_it_gives_at_once(tokens):
    model, _ = adapted()
    whole = scores(model, tokens)
    with torch.inference_mode():
        _, state = model(tokens[:, :7], model.init_state(2, 32))
    decoder = Decoder(model, state)
    for at in range(7, tokens.shape[1]):
        torch.testing.assert_close(decoder.step(tokens[:, at : at + 1]), whole[:, at], rtol=0, atol=1e-4)


@pytest.mark.parametrize("merged", [True, False])
def test_served_with_packed_weights_the_adapters_count(merged, tokens):
    model, _ = adapted()
    whole = scores(model, tokens)
    if merged:
        merge(model)
    served = Served(model.eval())
    with torch.inference_mode():
        hidden, _ = served(tokens, model.init_state(2, 32))
        told = served.logits(hidden.flatten(0, 1)).view_as(whole)
    torch.testing.assert_close(told, whole, rtol=0, atol=1e-4)


def test_with_a_tied_head_the_blocks_are_adapted_and_the_head_is_refused(tokens):
    config = dataclasses.replace(tiny(), tied_head=True)
    model, _ = adapted(config, LoraConfig(rank=2), torch.float64)
    before = scores(model, tokens)
    merge(model)
    torch.testing.assert_close(scores(model, tokens), before, rtol=0, atol=1e-9)
    assert model.head.weight is model.embed.weight
    with pytest.raises(ValueError, match="the head, which is the embedding"):
        attach(model, EVERYTHING)


def test_a_layer_that_is_trained_itself_gets_no_adapter():
    attached = attach(Model(tiny()), LoraConfig(train=("memory",)))
    assert not any(".memory." in part.name for part in attached.adapted)
    assert any(part.name.endswith("memory.out_proj.weight") for part in attached.trained)
    assert set(attached.left.values()) == {"trained itself"}


def test_adapters_of_a_half_precision_model_are_float32_and_train(tokens):
    model = fresh().bfloat16()
    attach(model, LoraConfig(rank=2))
    model(tokens)[0].float().square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in adapter_tensors(model).values())


def test_a_model_with_adapters_takes_no_second_set():
    model, _ = adapted()
    with pytest.raises(ValueError, match="has adapters already"):
        attach(model)


def test_saved_adapters_are_read_back_by_the_model_they_belong_to(tmp_path, tokens):
    model, attached = adapted(lora=LoraConfig(rank=2, train=("norm_mixer",)))
    with torch.no_grad():
        dict(model.named_parameters())["blocks.0.norm_mixer.weight"].add_(0.5)
    save_adapters(tmp_path / "mine", model, attached)
    again = fresh()
    read = load_adapters(again, tmp_path / "mine")
    assert torch.equal(scores(again, tokens), scores(model, tokens))
    assert read.config == attached.config and isinstance(again.get_submodule("blocks.0.mlp.in_proj"), Adapted)


def test_adapters_of_another_model_are_refused_and_leave_it_as_it_was(tmp_path, tokens):
    model, attached = adapted()
    save_adapters(tmp_path / "mine", model, attached, "models/base")
    other = fresh(seed=7)
    before = scores(other, tokens)
    with pytest.raises(ValueError, match=r"trained on another model than this one \(it was models/base\)"):
        load_adapters(other, tmp_path / "mine")
    assert torch.equal(scores(other, tokens), before) and not adapted_layers(other)


def test_a_damaged_folder_and_one_that_holds_no_adapters_are_told(tmp_path):
    model, attached = adapted()
    with pytest.raises(ValueError, match=r"no adapters here: no adapters.json"):
        load_adapters(fresh(), tmp_path)
    save_adapters(tmp_path / "mine", model, attached)
    path = tmp_path / "mine" / "adapters.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\1\0")
    with pytest.raises(ValueError, match="contents differ"):
        load_adapters(fresh(), tmp_path / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="something other than adapters"):
        save_adapters(tmp_path / "other", model, attached)


def test_narrow_weights_take_no_adapter():
    model = Model(tiny())
    narrow(model, "int8")
    with pytest.raises(ValueError, match="an adapter needs weights in floats, not in int8: load them with"):
        attach(model)
    assert not adapted_layers(model) and all(parameter.requires_grad for parameter in model.parameters())
