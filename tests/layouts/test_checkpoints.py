"""Checkpoints of transformers compute with us what they compute there, whole, in pieces and token by token."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from atma.layouts import export_checkpoint, import_checkpoint
from tests.layouts.checkpoints import FORMS, checkpoint
from tests.layouts.in_double import doubled

TOKENS = torch.randint(3, 99, (2, 40), generator=torch.Generator().manual_seed(1))


def read(model, tokens, cuts) -> torch.Tensor:
    """Logits (B, T, V) of tokens read in pieces of these sizes; one piece without a state where there is one alone."""
    if len(cuts) == 1:
        return model.logits(model(tokens)[0])
    state, found = model.init_state(*tokens.shape), []
    for piece in tokens.split(cuts, 1):
        hidden, state = model(piece, state)
        found.append(model.logits(hidden))
    return torch.cat(found, 1)


@pytest.mark.parametrize("cuts", [[40], [13, 26, 1], [1] * 40], ids=["whole", "chunks", "steps"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, form, cuts):
    theirs = checkpoint(tmp_path / "theirs", form)
    ours = import_checkpoint(tmp_path / "theirs", tmp_path / "ours").eval()
    wanted = theirs(TOKENS).logits
    assert (read(ours, TOKENS, cuts) - wanted).abs().max() <= 1e-4
    exact = doubled(theirs, TOKENS)
    assert (read(ours.double(), TOKENS, cuts) - exact).abs().max() <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["10GB", "40kB"])
@pytest.mark.parametrize("form", ["llama", "llama, tied", "lfm2", "qwen3.5"])
def test_what_comes_back_is_the_same_bits_in_the_same_files(tmp_path, form, shard, dtype):
    checkpoint(tmp_path / "theirs", form, dtype, shard)
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    names = {path.name for path in (tmp_path / "theirs").glob("*.safetensors*")}
    assert names == {path.name for path in (tmp_path / "back").glob("*.safetensors*")}
    for name in sorted(names):
        if name.endswith(".json"):
            first, second = (json.loads((tmp_path / at / name).read_text())["weight_map"] for at in ("theirs", "back"))
            assert first == second
        else:
            first, second = (load_file(tmp_path / at / name) for at in ("theirs", "back"))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[one], second[one]) and first[one].dtype == second[one].dtype for one in first)
            assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    assert json.loads((tmp_path / "theirs/config.json").read_text()) == json.loads(
        (tmp_path / "back/config.json").read_text()
    )


OLDER = [
    ("gemma3", {"rope_theta": 500.0, "rope_local_base_freq": 50.0}),
    ("gemma3", {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("olmo3", {"rope_theta": 300.0}),
    ("olmo3", {}),
    ("mistral", {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("qwen2, windows", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": None}}),
    ("llama", {}),
    ("smollm3", {}),
    ("lfm2", {"rope_theta": 300.0}),
    ("qwen3.5", {"attn_output_gate": True, "mlp_only_layers": [], "mamba_ssm_dtype": "float32"}),
]


@pytest.mark.parametrize(("form", "values"), OLDER, ids=str)
@torch.no_grad()
def test_settings_in_the_older_form_mean_what_transformers_takes_them_for(tmp_path, form, values):
    checkpoint(tmp_path / "theirs", form)
    path = tmp_path / "theirs/config.json"
    config = json.loads(path.read_text())
    if form != "qwen3.5":
        del config["rope_parameters"]
    path.write_text(json.dumps(config | values))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    ours = import_checkpoint(tmp_path / "theirs", tmp_path / "ours").eval()
    assert (read(ours, TOKENS, [40]) - theirs(TOKENS).logits).abs().max() <= 1e-4


def test_shards_may_list_frequencies_that_are_computed(tmp_path):
    checkpoint(tmp_path / "theirs", "llama", shard="40kB")
    path = tmp_path / "theirs/model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    index["weight_map"][name] = min(index["weight_map"].values())
    path.write_text(json.dumps(index))
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
