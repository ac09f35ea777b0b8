"""A model whose large weights are in 8 or 4 bits: beside floats, decoded, saved and loaded, and what it refuses."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import nn

from atma.checkpoint import load_info, load_model, save_model
from atma.cli import main
from atma.compress import compress
from atma.config import ModelConfig
from atma.decoding import Decoder
from atma.generation import Generation
from atma.hashes import model_hash
from atma.loading import load, load_floats
from atma.mixers import names, small
from atma.model import Model
from atma.narrow import LEAST, Narrow, NarrowLinear, narrow, narrow_bytes, narrow_layers, numbers_in, width_in
from atma.ops import native, use_backend
from atma.ops.narrow import WIDTHS, widened
from atma.ops.narrow.reference import rounded
from atma.settings import Settings
from atma.tokenizer import byte_tokenizer
from atma.weights import load_weights
from tests.conftest import tiny

needs_kernels = pytest.mark.skipif(not native.available(torch.float32), reason="needs the compiled kernels")


def _nats(model: Model, tokens: list[int]) -> float:
    row = torch.tensor(tokens)[None]
    with torch.inference_mode():
        return float(model.loss(model(row[:, :-1])[0], row[:, 1:]).mean())


@pytest.fixture(scope="module")
def nano():
    return load("nano")


@pytest.fixture(scope="module")
def text(nano):
    with open(torch.__file__) as file:
        return nano.tokenizer.encode(file.read())[:513]


@pytest.mark.parametrize(("width", "most"), [("int8", 0.005), ("int4", 0.02)])
def test_the_loss_of_nano_changes_little(nano, text, width, most) -> None:
    found, before = _nats(load("nano", weights=width).model, text), _nats(nano.model, text)
    assert found != before
    assert abs(found / before - 1) < most


@pytest.mark.parametrize("width", WIDTHS)
def test_large_layers_are_narrow_and_small_ones_stay(nano, width) -> None:
    model = load("nano", weights=width).model
    layers = narrow_layers(model)
    linear = [name for name, one in nano.model.named_modules() if isinstance(one, torch.nn.Linear)]
    large = [name for name in linear if nano.model.get_submodule(name).out_features >= LEAST]
    assert set(layers) == {"embed", *large}
    assert len(linear) > len(large)
    assert {layer.width for name, layer in layers.items() if name in ("embed", "head")} == {"int8"}
    assert width_in(model) == width
    assert numbers_in(model) == numbers_in(nano.model)
    whole = sum(parameter.nbytes for parameter in nano.model.parameters())
    assert narrow_bytes(model) < whole * (0.27 if width == "int8" else 0.17)
    assert f"{width} and float32" in model.facts()["parameters"]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_compiled_kernels_read_what_plain_pytorch_reads(text, width) -> None:
    with use_backend("reference"):
        plain = load("nano", weights=width).model
        expected = _nats(plain, text[:129])
    assert _nats(load("nano", weights=width).model, text[:129]) == pytest.approx(expected, rel=3e-3)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_steps_are_recorded_and_give_what_the_model_gives(text, width, dtype) -> None:
    model = load("nano", dtype=dtype, weights=width).model
    tokens = torch.tensor(text[:12])[None]
    with torch.inference_mode():
        _, state = model(tokens[:, :4], model.init_state(1, 64))
        decoder, other = Decoder(model, copy.deepcopy(state)), state
        for at in range(4, 12):
            found = decoder.step(tokens[:, at : at + 1]).clone()
            hidden, other = model(tokens[:, at : at + 1], other)
            torch.testing.assert_close(found, model.logits(hidden[:, -1]), rtol=0, atol=0.05 if at else 0)
    assert decoder.how.startswith("recorded")


def _rounding(_layer, given):
    codes, scale = rounded(given[0])
    return (codes * scale[..., None],)


@pytest.mark.parametrize("kind", names())
def test_every_mixer_reads_what_floats_of_so_few_bits_would(kind, monkeypatch) -> None:
    monkeypatch.setattr("atma.narrow.LEAST", 1)
    config = ModelConfig(32, width=16, depth=2, pattern=(kind,), **small(kind)[0])
    model, draw = Model(config, torch.Generator().manual_seed(0)).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    floats, tokens = copy.deepcopy(model), torch.randint(0, 32, (2, 24), generator=draw)
    narrow(model, "int8")
    layers = narrow_layers(model)
    for name, layer in layers.items():
        own = cast(nn.Linear, floats.get_submodule(name))
        with torch.no_grad():
            own.weight.copy_(widened(layer.codes_held))
        if name != "embed":
            own.register_forward_pre_hook(_rounding)
    with torch.inference_mode():
        found, expected = model(tokens)[0], floats(tokens)[0]
    assert len(layers) > 2
    # A number next to a tie may be rounded the other way after a last bit, and moves by 1/127 then; few do.
    assert float((found - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_the_same_and_trains_from_its_floats(tmp_path, width, tied) -> None:
    config = ModelConfig(vocab_size=70, width=48, depth=2, query_heads=2, key_value_heads=1, head_width=16,
                         tied_head=tied)  # fmt: skip
    model = Model(config, torch.Generator().manual_seed(0)).eval()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    narrow(model, width)
    save_model(tmp_path / "m", model, None)
    assert load_info(tmp_path / "m")["weights"] == width
    again, tokens = load(tmp_path / "m").model, torch.arange(20)[None]
    assert model_hash(again) == model_hash(model)
    with torch.inference_mode():
        assert torch.equal(again.logits(again(tokens)[0]), model.logits(model(tokens)[0]))
    assert isinstance(again.head, NarrowLinear)
    ends = [cast(Narrow, module).held.scale.data_ptr() for module in (again.head, again.embed)]
    assert (ends[0] == ends[1]) is tied
    floats, _ = load_model(tmp_path / "m")
    assert width_in(floats) is None
    for name, layer in narrow_layers(model).items():
        assert torch.equal(cast(nn.Linear, floats.get_submodule(name)).weight, widened(layer.codes_held))
    assert all(parameter.requires_grad for parameter in floats.parameters())


def test_what_is_saved_narrow_has_names_that_no_float_model_takes(tmp_path) -> None:
    made, plain = Model(tiny("nope")), Model(tiny("nope"))
    narrow(made, "int8")
    assert "embed.weight_codes" in made.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        plain.load_state_dict(made.state_dict())
    save_model(tmp_path / "m", made, None)
    assert not {f"{name}.weight" for name in narrow_layers(made)} & load_weights(tmp_path / "m").keys()


def test_the_command_writes_a_folder_that_generates_what_weights_would(tmp_path, capsys) -> None:
    assert main(["narrow", "nano", str(tmp_path / "small"), "--weights", "int4"]) == 0
    assert "in int4" in capsys.readouterr().out
    words = ["def area(", "--temperature", "0", "--max-tokens", "12", "--device", "cpu"]
    assert main(["generate", *words, "--model", str(tmp_path / "small")]) == 0
    saved = capsys.readouterr().out
    assert main(["generate", *words, "--weights", "int4"]) == 0
    assert capsys.readouterr().out == saved
    assert main(["generate", *words, "--model", str(tmp_path / "small"), "--weights", "int8"]) == 2
    assert "are in int4 already" in capsys.readouterr().err


def test_a_saved_text_belongs_to_its_width(tmp_path, nano) -> None:
    narrowed = load("nano", weights="int8")
    generation = Generation(narrowed.model, nano.tokenizer, Settings(temperature=0, max_tokens=4))
    generation.feed("import os")
    "".join(generation.write())
    generation.save(tmp_path / "text")
    Generation.resume(tmp_path / "text", load("nano", weights="int8").model, nano.tokenizer, Settings())
    with pytest.raises(ValueError, match="another model"):
        Generation.resume(tmp_path / "text", nano.model, nano.tokenizer, Settings())


def test_what_narrow_weights_cannot_do_is_told(tmp_path) -> None:
    with pytest.raises(ValueError, match="'weights' must be one of int8, int4, not 'int2'"):
        load("nano", weights="int2")
    model = load("nano", weights="int8").model
    for change in ({"dtype": torch.float64}, {"device": "meta"}, {"dtype": torch.float16}):
        with pytest.raises(ValueError, match="weights in int8 are read in float32 or bfloat16 on the CPU"):
            cast(Any, copy.deepcopy(model)).to(**change)
    with pytest.raises(ValueError, match="already"):
        narrow(model, "int4")
    save_model(tmp_path / "m", model, None)
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace("atma-1-narrow", "atma-2"))
    with pytest.raises(ValueError, match="format 'atma-2'"):
        load(tmp_path / "m")


def test_a_narrow_folder_is_compressed_as_the_floats_that_it_stands_for(tmp_path, capsys) -> None:
    made = Model(tiny("nope", memory=False).changed({"vocab_size": 300}), torch.Generator().manual_seed(0))
    torch.nn.init.normal_(made.head.weight, generator=torch.Generator().manual_seed(1))
    narrow(made, "int8")
    save_model(tmp_path / "m", made, byte_tokenizer())
    (tmp_path / "texts.txt").write_text("To be, or not to be, that is the question. " * 3)
    words = ["compress", str(tmp_path / "m"), str(tmp_path / "out"), "--texts", str(tmp_path / "texts.txt")]
    assert main([*words, "--tolerance", "0", "--tokens", "64", "--device", "cpu"]) == 0, capsys.readouterr().err
    found, floats = load(tmp_path / "out").model, load_floats(tmp_path / "m").model
    assert width_in(found) is width_in(floats) is None
    with torch.inference_mode():
        torch.testing.assert_close(*(one.logits(one(torch.arange(20)[None])[0]) for one in (found, floats)))
    with pytest.raises(ValueError, match="compressing needs weights in floats, not in int8"):
        compress(made, {})
