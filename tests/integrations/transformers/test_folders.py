"""One folder for both: what atma saves transformers loads, what transformers saves atma loads, and so on and back."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import atma
from atma.checkpoint import load_info, load_model, save_model
from atma.hub_files import SHIM
from atma.info import model_facts
from atma.integrations.transformers import AtmaConfig, AtmaForCausalLM, AtmaModel
from atma.integrations.transformers.saving import card
from atma.model import Model
from atma.stop_tokens import declared
from atma.tokenizer import byte_tokenizer, train_bpe
from tests.integrations.transformers.conftest import EVERY, NAMES, configuration, some_tokens, wrapped
from tests.laws.conftest import randomise

BYTES = 257
ROUNDING = 1e-4
"""Of float32, whose products depend on where in memory a weight lies."""


def saved(folder: Path, **changes) -> tuple[Path, Model]:
    """A model folder of atma, and its model."""
    model = Model(configuration("atma", vocab_size=BYTES, **changes), torch.Generator().manual_seed(0))
    model = randomise(model).float().eval()
    save_model(folder, model, byte_tokenizer(), {"name": "small", "tokens": 12})
    return folder, model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "model")[0]


@pytest.mark.parametrize(("name", "i"), EVERY, ids=NAMES)
@torch.no_grad()
def test_every_mixer_goes_through_a_folder_of_either_to_the_other(tmp_path, name, i):
    first, tokens = randomise(Model(configuration(name, i))).float().eval(), some_tokens(2, 9)
    expected = first.logits(first(tokens)[0])
    save_model(tmp_path / "atma", first, None)
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "atma")
    assert (second(tokens, use_cache=False).logits - expected).abs().max() < ROUNDING
    second.save_pretrained(tmp_path / "theirs")
    third = atma.load(tmp_path / "theirs").model
    assert (third.logits(third(tokens)[0]) - expected).abs().max() < ROUNDING
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_nothing_is_missing_and_nothing_unexpected(folder):
    for cls in (AutoModelForCausalLM, AutoModel):
        _, told = cls.from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"] and not told["mismatched_keys"] and not told["unexpected_keys"]


def test_the_auto_classes_give_ours(folder):
    assert type(AutoConfig.from_pretrained(folder)) is AtmaConfig
    assert type(AutoModel.from_pretrained(folder)) is AtmaModel
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is AtmaForCausalLM


def test_a_tied_head_is_in_the_file_once_and_is_tied_again(tmp_path):
    folder, model = saved(tmp_path / "model", tied_head=True)
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.head.weight is found.model.embed.weight
    found.save_pretrained(tmp_path / "again")
    again, _ = load_model(tmp_path / "again")
    assert again.head.weight is again.embed.weight
    assert torch.equal(again.embed.weight, model.embed.weight)


def test_a_head_that_is_untied_is_a_weight_of_its_own(tmp_path):
    folder, _ = saved(tmp_path / "model", tied_head=True)
    found = AutoModelForCausalLM.from_pretrained(folder)
    found.config.tie_word_embeddings = False
    found.head.weight = torch.nn.Parameter(found.head.weight.detach() * 2)
    found.save_pretrained(tmp_path / "again")
    again, _ = load_model(tmp_path / "again")
    assert not again.config.tied_head and torch.equal(again.head.weight, 2 * again.embed.weight)


@pytest.mark.parametrize("how", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}])
def test_a_type_and_a_place_may_be_asked_for(folder, how):
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    assert model.dtype == how.get("dtype", torch.float32) and model.device.type == "cpu"
    assert torch.isfinite(model(some_tokens(1, 5)).logits).all()


def test_weights_that_no_file_has_are_initialised_and_the_others_stay(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    gone = "blocks.1.mixer.out_proj.weight"
    save_file({name: value for name, value in tensors.items() if name != gone}, folder / "model.safetensors")
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert told["missing_keys"] == {f"model.{gone}"}
    held = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    assert not held.pop(gone).any() and all(torch.equal(value, tensors[name]) for name, value in held.items())


def test_shards_are_read_by_atma(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    names = sorted(path.name for path in (tmp_path / "parts").glob("model*"))
    assert len(names) > 3 and "model.safetensors" not in names
    read, _ = load_model(tmp_path / "parts")
    assert torch.equal(read.embed.weight, model.model.embed.weight)
    assert model_facts(tmp_path / "parts")["parameters"] == f"{sum(p.numel() for p in read.parameters()):,}"
    (tmp_path / "parts" / names[1]).unlink()
    with pytest.raises(ValueError, match=rf"{names[1]}: missing"):
        load_model(tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other"}}')
    with pytest.raises(ValueError, match=r"names '\.\./other', which is no part of a model's weights"):
        load_model(tmp_path / "parts")


def test_saving_into_the_folder_of_atma_leaves_one_that_atma_reads(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.head.weight.mul_(2)
    model.save_pretrained(folder)
    read, tokenizer = load_model(folder)
    assert torch.equal(read.head.weight, model.head.weight) and tokenizer.name == "bytes"
    assert load_info(folder)["extra"] == {"name": "small", "tokens": 12}


def test_config_json_names_our_classes_and_leads_to_them_through_a_file_of_a_few_lines(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    for place in (folder, tmp_path / "theirs"):
        told = json.loads((place / "config.json").read_text())
        assert told["model_type"] == "atma" and told["architectures"] == ["AtmaForCausalLM"]
        assert told["auto_map"]["AutoModelForCausalLM"] == "modeling_atma.AtmaForCausalLM"
        assert told["format"] == "atma-1" and "vocab_size" not in told and told["model"]["vocab_size"] == BYTES
        assert "final_logit_softcapping" not in told
        names: dict = {}
        exec((place / SHIM).read_text(), names)
        assert names["AtmaForCausalLM"] is AtmaForCausalLM


def test_the_code_of_a_folder_may_be_trusted_without_the_import(folder, monkeypatch, tmp_path):
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    found = get_class_from_dynamic_module("modeling_atma.AtmaForCausalLM", str(folder))
    assert found is AtmaForCausalLM


def test_a_folder_from_before_transformers_was_known_is_loaded_by_name(folder):
    told = json.loads((folder / "config.json").read_text())
    old = {key: told[key] for key in ("format", "model", "extra")}
    (folder / "config.json").write_text(json.dumps(old))
    (folder / "manifest.json").unlink()
    for name in (SHIM, "tokenizer_config.json"):
        (folder / name).unlink()
    found, read = AtmaForCausalLM.from_pretrained(folder), load_model(folder)[0]
    assert torch.equal(found.head.weight, read.head.weight)


def test_a_tokenizer_arrives_with_its_special_tokens_and_begins_texts_as_atma_does(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == 256 and tokenizer.padding_side == "left"
    assert tokenizer("hé").input_ids == [256, *"hé".encode()]
    assert tokenizer("a", add_special_tokens=False).input_ids == [97]
    assert tokenizer.decode(tokenizer("a  b ?").input_ids, skip_special_tokens=True) == "a  b ?"
    both = tokenizer(["abc", "a"], padding=True)
    assert both.input_ids[1] == [256, 256, 256, 97] and both.attention_mask[1] == [0, 0, 1, 1]


def test_tokenizers_of_both_stay_the_same_one(folder, tmp_path):
    own = load_model(folder)[1]
    assert own.hash() == byte_tokenizer().hash()
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    again = atma.load(tmp_path / "theirs").tokenizer
    assert again.hash() == own.hash() and again.encode("x <|endoftext|>") == own.encode("x <|endoftext|>")
    assert AutoTokenizer.from_pretrained(tmp_path / "theirs")("a").input_ids == [256, 97]


def test_a_bpe_tokenizer_encodes_the_same_in_both(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat with the other cat " * 20], 270)
    model = Model(configuration("atma", vocab_size=270))
    save_model(tmp_path / "model", model, tokenizer)
    text = "The cat's 123 mats\n\n sat  on <them> é"
    found = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert found(text).input_ids == [tokenizer.eot, *tokenizer.encode(text)]


def test_a_chat_template_in_the_folder_is_that_of_both(folder):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<user>hi<|endoftext|>"
    load_model(folder)


def test_ends_of_turns_end_generation_in_both(tmp_path):
    from tokenizers import AddedToken

    from atma.tokenizer import Tokenizer

    backend = byte_tokenizer().backend
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    tokenizer = Tokenizer(backend, 256)
    save_model(tmp_path / "model", Model(configuration("atma", vocab_size=258)), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id == [256, 257]
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "theirs")
    for place in ("model", "theirs"):
        assert declared(tmp_path / place, load_model(tmp_path / place)[1]) == (257,)


def test_what_somebody_wrote_is_not_replaced(folder):
    model, tokenizer = load_model(folder)
    save_model(folder, model, tokenizer)
    for name, text in (("README.md", "mine"), ("chat_template.jinja", "x"), ("tokenizer_config.json", None)):
        before = (folder / name).read_text() if (folder / name).exists() else None
        (folder / name).write_text(text or json.dumps({"chat_template": "x"}))
        with pytest.raises(ValueError, match=rf"holds something other than a model \('{name}'\)"):
            save_model(folder, model, tokenizer)
        (folder / name).write_text(before) if before else (folder / name).unlink()


def test_the_files_of_shards_are_a_model_s_and_may_be_replaced(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    (tmp_path / "parts" / "README.md").unlink()
    model, tokenizer = load_model(folder)
    save_model(tmp_path / "parts", model, tokenizer)
    assert sorted(p.name for p in (tmp_path / "parts").glob("model*")) == ["model.safetensors", "modeling_atma.py"]


def test_a_card_says_what_the_model_is_and_how_it_is_used(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text()
    assert text == card("mine", model.config)
    for part in ("library_name: transformers", "# mine", "| layers | 2 (atma) |", "| name | small |", "atma-lm[hf]"):
        assert part in text
    (tmp_path / "mine" / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own words"


def test_a_push_uploads_the_same_files_and_our_card(folder, monkeypatch, tmp_path):
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **_):
            for one in operations:
                shutil.copy(one.path_or_fileobj, tmp_path / "hub" / one.path_in_repo)

    def absent(*_, **__):
        raise EntryNotFoundError("no card")

    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub.ModelCard, "load", absent)
    AutoModelForCausalLM.from_pretrained(folder).push_to_hub("somebody/small")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "# small" in text and 'from_pretrained("somebody/small")' in text and "Information Needed" not in text
    assert load_model(tmp_path / "hub")[0].config == load_model(folder)[0].config


def test_a_configuration_is_that_of_atma_and_knows_what_changes():
    config = AtmaConfig.of(configuration("atma"))
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 2, 23)
    assert AtmaConfig.from_dict(config.to_dict()).model_config() == config.model_config()
    assert AtmaConfig.from_dict(config.to_dict(), vocab_size=40).model_config().vocab_size == 40
    assert not hasattr(config, "final_logit_softcapping") and config.get_text_config() is config
    assert AtmaConfig().model_config().width == 1024
    with pytest.raises(ValueError, match=r"unknown key 'wdith'; did you mean 'width'"):
        AtmaConfig(model={"wdith": 3})


def test_saved_weights_are_those_of_the_state_dict_that_is_given(tmp_path):
    model = wrapped(configuration("atma"))
    given = {name: value * 2 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "model", state_dict=given)
    assert torch.equal(load_model(tmp_path / "model")[0].norm.weight.double(), 2 * model.model.norm.weight)
