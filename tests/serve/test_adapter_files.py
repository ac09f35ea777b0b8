"""Folders of adapters for a served model: our own, PEFT's, and those that are refused."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atma.checkpoint import load_model, save_model
from atma.layouts import import_checkpoint
from atma.loading import load
from atma.lora import LoraConfig, adapted_layers, attach, load_adapters, merge, save_adapters
from atma.serve.adapter_files import MOST_RANK, read_adapters
from atma.serve.adapter_names import named_folders
from atma.serve.engine import Engine
from atma.tokenizer import byte_tokenizer
from tests.serve.conftest import random_model
from tests.serve.test_adapters import LARGER, answers, ask

EVERYTHING = LoraConfig(rank=4, targets=("blocks", "head"))


def spoken(model, lora=EVERYTHING, seed=1):
    """A model with adapters that are no longer zero."""
    attached = attach(model, lora, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_b.normal_(std=0.1, generator=torch.Generator().manual_seed(seed + 1))
    return attached


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(folder, random_model(), byte_tokenizer())
    return folder


@pytest.fixture
def adapters(base, tmp_path):
    model, _ = load_model(base)
    attached = spoken(model)
    save_adapters(tmp_path / "own", model, attached, str(base))
    return tmp_path / "own"


def greedy(model, adapters=(), name=None):
    engine = Engine(model, byte_tokenizer(), LARGER, adapters=adapters)
    return answers(engine, ask(name))[0]


def same_as_merged(folder, base, whole):
    model = load(base).model
    (tokens, scores), (wanted, expected) = greedy(model, read_adapters({"x": folder}, base, model), "x"), greedy(whole)
    assert tokens == wanted != greedy(model)[0]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=0, atol=3e-4)


def test_a_folder_of_our_own_training_is_what_merging_it_gives(base, adapters):
    same_as_merged(adapters, base, load(adapters).model)


@pytest.mark.parametrize("how", [{"dtype": "bfloat16"}, {"weights": "int8"}, {"dtype": "bfloat16", "weights": "int4"}])
def test_the_hash_is_that_of_the_weights_in_floats_whatever_is_served(base, adapters, how):
    model = load(base, **how).model
    [found] = read_adapters({"x": adapters}, base, model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert set(found.layers) >= {"head", "blocks.0.mlp.in_proj"}
    assert greedy(model, [found], "x")[0] != greedy(model)[0]


def test_the_digest_is_of_the_numbers_and_not_of_the_name_or_the_place(base, adapters, tmp_path):
    model = load(base).model
    other, _ = load_model(base)
    save_adapters(tmp_path / "copy", other, spoken(other), "elsewhere")
    third, _ = load_model(base)
    save_adapters(tmp_path / "third", third, spoken(third, LoraConfig(4, 17.0, ("blocks", "head"))), str(base))
    found = read_adapters({"x": adapters, "y": tmp_path / "copy", "z": tmp_path / "third"}, base, model)
    assert found[0].digest == found[1].digest != found[2].digest


def test_an_adapter_on_adapters_that_are_merged_is_of_the_merged_model(base, adapters, tmp_path):
    middle = load(adapters).model
    save_adapters(tmp_path / "second", middle, spoken(middle, seed=5))
    merge(middle)
    same_as_merged(tmp_path / "second", adapters, middle)
    with pytest.raises(ValueError, match="trained on another model"):
        read_adapters({"x": tmp_path / "second"}, base, load(base).model)


def peft_of(folder, out, **settings):
    """An adapter of PEFT's on a model as transformers has it, and the folder of the model with it merged."""
    peft = pytest.importorskip("peft", reason="the extra [trl] is not installed")
    from transformers import AutoModelForCausalLM

    import atma.integrations.transformers  # noqa: F401

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **given))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(out / "adapter")
    wrapped.merge_and_unload().save_pretrained(out / "merged")
    return out / "adapter"


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.in_proj": 32, "k_proj": 1}}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, PATTERNS, {"target_modules": ["q_proj", "head"]}])
def test_a_folder_of_peft_is_what_merging_it_gives(base, tmp_path, settings):
    folder = peft_of(base, tmp_path, **settings)
    same_as_merged(folder, base, load(tmp_path / "merged").model)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A small Llama of transformers, and it as ours."""
    pytest.importorskip("peft", reason="the extra [trl] is not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=256)
    LlamaForCausalLM(config).save_pretrained(folder / "theirs")
    byte_tokenizer().save(folder / "theirs" / "tokenizer.json")
    import_checkpoint(folder / "theirs", folder / "ours")
    return folder


@pytest.mark.parametrize("targets", ["all-linear", ["up_proj", "q_proj"], ["gate_proj", "o_proj"]])
def test_peft_of_the_checkpoint_that_a_model_was_imported_from(imported, tmp_path, targets):
    folder = peft_of(imported / "theirs", tmp_path, target_modules=targets)
    import_checkpoint(tmp_path / "merged", tmp_path / "whole")
    same_as_merged(folder, imported / "ours", load(tmp_path / "whole").model)


def refused(folder, base, match, model=None):
    with pytest.raises(ValueError, match=match) as told:
        read_adapters({"x": folder}, base, model or load(base).model)
    assert "\n" not in str(told.value)
    assert str(folder) in str(told.value)


def test_what_is_no_adapter_of_this_model_is_refused_with_the_reason(base, adapters, tmp_path):
    refused(tmp_path / "nowhere", base, r"no adapters here: neither adapters\.json.* nor adapter_config\.json")
    other = tmp_path / "other"
    save_model(other, random_model(seed=3), byte_tokenizer())
    refused(adapters, other, f"trained on another model than this one .it was {base}.; the weights differ")
    model, _ = load_model(base)
    save_adapters(tmp_path / "more", model, spoken(model, LoraConfig(train=("norm_*",))), str(base))
    refused(tmp_path / "more", base, r"'blocks\.0\.norm_mixer\.weight' was trained itself.*atma merge BASE")
    (adapters / "adapters.safetensors").unlink()
    refused(adapters, base, "missing")


def changed(folder, change):
    """The tensors of a folder of PEFT's, and its settings, changed in place."""
    path, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, told = load_file(path), json.loads(settings.read_text())
    change(tensors, told)
    save_file(tensors, path)
    settings.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, s: x.pop(min(x)), "one factor is missing"),
        (lambda x, s: x.update({"base_model.model.model.embed.lora_embedding_A": torch.ones(2)}), "is no factor"),
        (lambda x, s: x[min(x)].fill_(torch.nan), "is not finite; take an earlier checkpoint"),
        (lambda x, s: x.update({min(x): torch.ones(4, 33)}), r"factors \(4, 33\) and .* adapters of another model"),
        (lambda x, s: x.update({min(x): torch.ones(4)}), r"not \(r, I\) and \(O, r\)"),
        (lambda x, s: x.clear(), "adapters of no layer"),
        (
            lambda x, s: x.update({k.replace("blocks.0", "blocks.9"): x[k].clone() for k in list(x)}),
            "of which this model has no",
        ),
        (lambda x, s: s.update(use_dora=True), "'use_dora' is True, which is not served beside others; merge it"),
        (lambda x, s: s.update(peft_type="IA3"), "'peft_type' is 'IA3', not 'LORA'"),
        (lambda x, s: s.update(bias="all"), "'bias' is 'all'"),
        (lambda x, s: s.update(init_lora_weights="pissa_niter_4"), "changed the model's own weights"),
        (lambda x, s: s.update(lora_alpha="x"), "'lora_alpha' or 'alpha_pattern' is no number"),
    ],
)
def test_a_folder_of_peft_that_does_not_fit_is_refused(base, tmp_path, change, match):
    folder = peft_of(base, tmp_path, target_modules=["q_proj", "out_proj"])
    changed(folder, change)
    refused(folder, base, match)


def test_a_rank_that_is_too_large_is_refused(base, tmp_path):
    folder = peft_of(base, tmp_path, r=MOST_RANK + 1, target_modules=["q_proj"])
    refused(folder, base, f"has rank {MOST_RANK + 1}, at most {MOST_RANK} are served; merge it")


def test_names_and_folders_on_a_command_line():
    found = named_folders(("a=some/place", "b=c=d"))
    assert {name: str(folder) for name, folder in found.items()} == {"a": "some/place", "b": "c=d"}
    for text in ("a", "=b", "a=", " =b"):
        with pytest.raises(ValueError, match="must be like NAME=FOLDER"):
            named_folders((text,))
    with pytest.raises(ValueError, match="another adapter is called 'a'"):
        named_folders(("a=b", "a=c"))


def test_attached_adapters_are_the_merged_ones(base, adapters):
    """`load_adapters`, of training, and the engine agree on what a folder holds."""
    model, _ = load_model(base)
    load_adapters(model, adapters)
    merge(model)
    same_as_merged(adapters, base, model)
