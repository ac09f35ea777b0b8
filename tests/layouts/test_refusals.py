"""What a checkpoint has that we do not have is named and refused, never ignored."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from atma.config import ModelConfig
from atma.layouts import export_checkpoint, import_checkpoint
from atma.model import Model
from tests.layouts.checkpoints import change, checkpoint

SETTINGS = [
    ({"model_type": "bert"}, "model_type 'bert' is no architecture that atma has; it has llama"),
    ({"model_type": None}, "model_type None"),
    ({"quantization_config": {"bits": 4}}, "'quantization_config'.*quantised weights"),
    ({"num_local_experts": 8}, "'num_local_experts' is 8: a mixture of experts"),
    ({"attention_sinks": True}, "attention sinks"),
    ({"hidden_act": "relu"}, "'hidden_act' is 'relu'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "positions of the kind 'dynamic'"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "'partial_rotary_factor' is 0.5"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "do not say 'rotary_slow'"),
    ({"rope_scaling": {"type": "longrope"}, "rope_parameters": None}, "positions of the kind 'longrope'"),
    ({"is_causal": False}, "'is_causal' is False: attention that looks ahead"),
    ({"no_such": 0}, "'no_such' is 0, a setting that atma does not know"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "both 'rope_parameters' and 'rope_scaling'"),
    ({"rope_parameters": {"rope_theta": 9.0, "factor": 2.0}}, "'factor' is 2.0, which atma does not know"),
    ({"sandwich": 3}, "'sandwich' is 3, a setting that atma does not know"),
    ({"hidden_size": 0}, "'hidden_size' must be a whole number of at least 1, not 0"),
    ({"rms_norm_eps": "small"}, "'rms_norm_eps' must be a positive number, not 'small'"),
    ({"attention_bias": 1}, "'attention_bias' must be true or false, not 1"),
    ({"vocab_size": 98}, "says"),
]


@pytest.mark.parametrize(("values", "told"), SETTINGS)
def test_a_setting_that_we_lack_is_named(tmp_path, values, told):
    checkpoint(tmp_path / "theirs", "llama")
    change(tmp_path / "theirs", **values)
    with pytest.raises(ValueError, match=told):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("form", "values", "told"),
    [
        ("gemma3", {"attn_logit_softcapping": 50.0}, "a cap on attention's scores"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "a tanh cap on the logits"),
        ("gemma3", {"use_bidirectional_attention": True}, "looks ahead"),
        ("lfm2", {"conv_bias": True}, "'conv_bias' is True"),
        ("lfm2", {"layer_types": ["conv", "mamba", "conv"]}, "'layer_types' has 'mamba'"),
        ("qwen3.5", {"hidden_act": "gelu_pytorch_tanh"}, "'hidden_act' is 'gelu_pytorch_tanh'"),
        ("qwen3.5", {"attn_output_gate": False}, "attention without its gate"),
        ("smollm3", {"no_rope_layers": [1]}, "'no_rope_layers' must tell of each of 3 layers"),
        ("qwen2", {"layer_types": ["full_attention"]}, "must name each of 3 layers"),
    ],
)
def test_a_setting_of_an_architecture_that_we_lack_is_named(tmp_path, form, values, told):
    checkpoint(tmp_path / "theirs", form)
    change(tmp_path / "theirs", **values)
    with pytest.raises(ValueError, match=told):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_the_older_way_to_write_rotary_positions_is_read(tmp_path):
    checkpoint(tmp_path / "theirs", "llama 3")
    first = import_checkpoint(tmp_path / "theirs", tmp_path / "first")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    (tmp_path / "theirs/config.json").write_text(json.dumps(config | {"rope_scaling": rope, "rope_theta": theta}))
    assert import_checkpoint(tmp_path / "theirs", tmp_path / "second").config == first.config


def test_a_missing_shard_is_named(tmp_path):
    checkpoint(tmp_path / "theirs", "llama", shard="40kB")
    first = min((tmp_path / "theirs").glob("model-*"))
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name}: missing, though model.safetensors.index.json names it"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_a_truncated_shard_is_named(tmp_path):
    checkpoint(tmp_path / "theirs", "llama", shard="40kB")
    first = min((tmp_path / "theirs").glob("model-*"))
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{first.name}: not a readable safetensors file"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize(("what", "told"), [("unlisted", "does not list"), ("lost", "lacks 'model.lost', which")])
def test_an_index_and_its_files_that_disagree_are_refused(tmp_path, what, told):
    checkpoint(tmp_path / "theirs", "llama", shard="40kB")
    path = tmp_path / "theirs/model.safetensors.index.json"
    index = json.loads(path.read_text())
    if what == "unlisted":
        index["weight_map"].pop("model.norm.weight")
    else:
        index["weight_map"]["model.lost"] = min(index["weight_map"].values())
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=told):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("what", ["missing", "unexpected"])
def test_weights_of_another_model_are_refused(tmp_path, what):
    checkpoint(tmp_path / "theirs", "llama")
    path = tmp_path / "theirs/model.safetensors"
    tensors = load_file(path)
    if what == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"is {what}"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_a_head_that_only_claims_to_be_tied_is_refused(tmp_path):
    checkpoint(tmp_path / "theirs", "llama")
    change(tmp_path / "theirs", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is not 'model\.embed_tokens\.weight'"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_pickled_weights_are_not_read(tmp_path):
    checkpoint(tmp_path / "theirs", "llama")
    (tmp_path / "theirs/model.safetensors").rename(tmp_path / "theirs/pytorch_model.bin")
    with pytest.raises(ValueError, match="weights as a pickle"):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_a_model_that_was_never_a_checkpoint_of_transformers_has_no_such_layout(tmp_path):
    from atma.checkpoint import save_model

    save_model(tmp_path / "ours", Model(ModelConfig(16, 16, 1, query_heads=2, key_value_heads=1, head_width=8)), None)
    with pytest.raises(ValueError, match="not imported from transformers"):
        export_checkpoint(tmp_path / "ours", tmp_path / "back")


def test_a_model_that_has_become_another_is_not_written_as_what_it_was(tmp_path):
    checkpoint(tmp_path / "theirs", "llama")
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    path = tmp_path / "ours/config.json"
    config = json.loads(path.read_text())
    config["model"]["mixers"]["full_attention"]["window"] = 5
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'mixers' is no longer as it was imported"):
        export_checkpoint(tmp_path / "ours", tmp_path / "back")
