"""Published checkpoints compute the same after import as before."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from atma.checkpoint import fill_model, load_model
from atma.config import ModelConfig
from atma.importer import convert, import_model, published_names
from atma.model import Model

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
FILES = sorted(GOLDEN.glob("model_*.safetensors"))
needs_golden = pytest.mark.skipif(not FILES, reason=f"no golden models in {GOLDEN}")
TOLERANCE = 2e-5
CONFIG = {"hidden_size": 32, "head_dim": 8, "num_hidden_layers": 4, "vocab_size": 50, "mem_enabled": True}


def read_golden(path):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    return weights, config, tensors["input_ids"], tensors["logits"]


def published(core="polar"):
    """A small model under its published names, and its config.json."""
    shape = {"vocab_size": 50, "width": 32, "depth": 4, "query_heads": 4, "key_value_heads": 2, "head_width": 8}
    form = {"core": core, "direction_radius": 1.0, "canon_init": "uniform", "share_query_key_init": False}
    model = Model(ModelConfig(**shape, **form), torch.Generator().manual_seed(0))
    ours = model.state_dict()
    names = published_names(model.config)
    tensors = {theirs: ours[name].clone() for name, theirs in names.items()}
    for name, tensor in tensors.items():
        if "canon" in name or "conv" in name:
            tensors[name] = tensor[:, None]
    return model, tensors, CONFIG | {"attn_type": core}


def write(folder, tensors, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"model": tensors}, folder / "weights.pt")
    return folder


@needs_golden
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("chunk", [75, 16, 1], ids=["whole", "chunks", "token by token"])
def test_golden_logits_come_out_the_same(path, chunk):
    weights, config, tokens, expected = read_golden(path)
    ours, tensors = convert(weights, config)
    model = Model(ours)
    fill_model(model, tensors, path)
    with torch.inference_mode():
        state = model.init_state(tokens.shape[0], tokens.shape[1])
        parts = []
        for part in tokens.split(chunk, 1):
            hidden, state = model(part, state)
            parts.append(model.logits(hidden))
    assert (torch.cat(parts, 1) - expected).abs().max() <= TOLERANCE


@needs_golden
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_golden_model_survives_weights_pt_and_our_folder(path, tmp_path):
    weights, config, tokens, expected = read_golden(path)
    import_model(write(tmp_path / "source", weights, config), tmp_path / "out")
    model, tokenizer = load_model(tmp_path / "out")
    with torch.inference_mode():
        logits = model.logits(model(tokens)[0])
    assert (logits - expected).abs().max() <= TOLERANCE
    assert tokenizer is None


@pytest.mark.parametrize("core", ["polar", "nope", "rope"])
def test_every_core_comes_back_bit_for_bit(core, tmp_path):
    model, tensors, config = published(core)
    imported = import_model(write(tmp_path / "source", tensors, config), tmp_path / "out")
    assert imported.config == model.config
    loaded = load_model(tmp_path / "out")[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_safetensors_serve_as_well_as_weights_pt(tmp_path):
    model, tensors, config = published()
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    assert import_model(folder, tmp_path / "out").config == model.config


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_of_wrapped_models_are_unwrapped(prefix):
    _, tensors, config = published()
    assert (
        convert({prefix + name: tensor for name, tensor in tensors.items()}, config)[0] == convert(tensors, config)[0]
    )


def test_half_precision_becomes_float32():
    _, tensors, config = published()
    ours = convert({name: tensor.bfloat16() for name, tensor in tensors.items()}, config)[1]
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


def test_a_padded_vocabulary_keeps_its_padding():
    _, tensors, config = published()
    assert convert(tensors, config | {"vocab_size": 47})[0].vocab_size == 50
    with pytest.raises(ValueError, match="vocab_size is 51, but the embedding has only 50 rows"):
        convert(tensors, config | {"vocab_size": 51})


def test_missing_and_unexpected_tensors_are_listed():
    _, tensors, config = published()
    tensors["blocks.9.extra"] = tensors.pop("blocks.2.attn.v_null")
    with pytest.raises(ValueError, match=r"missing: blocks\.2\.attn\.v_null; unexpected: blocks\.9\.extra"):
        convert(tensors, config)


def test_other_rotary_frequencies_are_refused():
    _, tensors, config = published("rope")
    name = "blocks.2.attn.rotary.angular_freq"
    tensors[name] = torch.tensor([1.0, 1 / 1024, 0.0, 0.0])
    assert name not in convert(tensors, config)[1]
    tensors[name] = torch.tensor([1.0, 1 / 10000, 0.0, 0.0])
    with pytest.raises(ValueError, match="other rotary frequencies"):
        convert(tensors, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_type": "alibi"}, "attn_type 'alibi' is none of polar, nope, rope"),
        ({"hidden_size": None}, "'hidden_size' must be a positive number, not None"),
        ({"head_dim": 7}, "a multiple of 14"),
        ({"attn_window": "8"}, "'attn_window' must be of type int, not '8'"),
        ({"attn_kernel_size": 2.5}, "'attn_kernel_size' must be of type int, not 2.5"),
        ({"mem_enabled": "no"}, "'mem_enabled' must be of type bool, not 'no'"),
        ({"rms_norm_eps": "x"}, "'rms_norm_eps' must be of type float, not 'x'"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000, but there are only"),
        ({"num_hidden_layers": "4"}, "'num_hidden_layers' must be a positive number, not '4'"),
    ],
)
def test_an_impossible_configuration_is_named(change, message):
    _, tensors, config = published()
    with pytest.raises(ValueError, match=message):
        convert(tensors, config | change)


def test_a_truncated_weights_file_is_one_clear_error(tmp_path):
    _, tensors, config = published()
    folder = write(tmp_path / "source", tensors, config)
    whole = (folder / "weights.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 100):
        (folder / "weights.pt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"weights\.pt: not a readable PyTorch file"):
            import_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_code_inside_weights_is_not_run(tmp_path):
    _, _, config = published()
    folder = write(tmp_path / "source", {}, config)
    torch.save({"model": Path}, folder / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt: not a readable PyTorch file of plain tensors"):
        import_model(folder, tmp_path / "out")


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        import_model(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.safetensors: missing"):
        import_model(tmp_path, tmp_path / "out")


def test_one_flipped_bit_in_weights_is_found(tmp_path):
    _, tensors, config = published()
    folder = write(tmp_path / "source", tensors, config)
    whole = bytearray((folder / "weights.pt").read_bytes())
    whole[len(whole) // 2] ^= 1
    (folder / "weights.pt").write_bytes(whole)
    with pytest.raises(ValueError, match=r"weights\.pt: not a readable PyTorch file .* damaged"):
        import_model(folder, tmp_path / "out")


def test_an_import_replaces_a_model_and_nothing_else(tmp_path):
    _, tensors, config = published()
    source = write(tmp_path / "source", tensors, config)
    import_model(source, tmp_path / "out")
    import_model(source, tmp_path / "out")
    note = tmp_path / "out" / "thesis.txt"
    note.write_text("years of work")
    for out in (tmp_path / "out", note, source):
        with pytest.raises(ValueError, match=r"something other than a model|is a file|is the source"):
            import_model(source, out)
    assert note.read_text() == "years of work"
    assert (source / "weights.pt").exists()
