"""Adapters of a run are a model wherever a model is asked for, and merge into a folder of their own."""

import dataclasses
import json

import pytest
import torch

import atma
from atma.checkpoint import save_model
from atma.cli import main
from atma.commands.generate import begin
from atma.config import Recipe, TrainConfig
from atma.loading import base_folder, model_folder
from atma.lora import LoraConfig, adapter_tensors, attach, save_adapters
from atma.model import Model
from atma.serve.llm import LLM
from atma.settings import Settings
from atma.tokenizer import byte_tokenizer
from atma.train.start import filled, resolved
from atma.weights import load_tensors
from tests.conftest import tiny


@pytest.fixture
def trained(tmp_path):
    """A base, and adapters on it that are no longer zero."""
    model = Model(dataclasses.replace(tiny(), vocab_size=300), torch.Generator().manual_seed(0))
    save_model(tmp_path / "base", model, None)
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    attached = attach(model, LoraConfig(rank=2), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, value in adapter_tensors(model).items():
            value.add_(0.1 if name.endswith("lora_b") else 0.0)
    save_adapters(tmp_path / "adapters", model, attached, str(tmp_path / "base"))
    return tmp_path, model


def test_merged_they_are_a_model_folder_that_is_talked_to_as_the_base(trained, capsys):
    folder, model = trained
    assert main(["merge", str(folder / "base"), str(folder / "adapters"), str(folder / "out")]) == 0
    assert "adapted layers" in capsys.readouterr().out
    assert (folder / "out" / "chat_template.jinja").is_file()
    tokens = torch.arange(20)[None]
    loaded = atma.load(folder / "out").model
    torch.testing.assert_close(loaded(tokens)[0], model(tokens)[0], rtol=0, atol=1e-5)
    assert main(["merge", str(folder / "base"), str(folder / "adapters"), str(folder / "out")]) == 0


def test_their_folder_is_the_name_of_a_model(trained):
    folder, model = trained
    loaded = atma.load(folder / "adapters")
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(loaded.model(tokens)[0], model(tokens)[0], rtol=0, atol=1e-5)
    assert loaded.path == folder / "adapters" and loaded.model.state_dict().keys() == Model(tiny()).state_dict().keys()


def test_their_turns_end_as_those_of_the_base(trained):
    folder, _ = trained
    (folder / "base" / "manifest.json").unlink()
    byte_tokenizer().save(folder / "base" / "tokenizer.json")
    (folder / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(257))}))
    answer = LLM(folder / "adapters").generate(["ab"], Settings(max_tokens=5))[0]
    assert (len(answer.tokens), answer.finish_reason) == (1, "stop")
    assert set(begin(str(folder / "adapters"), Settings()).settings.stop_tokens) == set(range(256))


def test_where_weights_of_their_own_are_needed_adapters_are_refused_and_not_taken_as_their_base(trained, capsys):
    folder, _ = trained
    adapters, told = str(folder / "adapters"), f"adapters: adapters, not a whole model; .*atma merge BASE {folder}"
    assert base_folder(adapters) == atma.load(adapters).base == folder / "base"
    for asked in (
        lambda: model_folder(adapters),
        lambda: filled({"train": {"init_from": adapters}}),
        lambda: resolved(Recipe(train=TrainConfig(init_from=adapters))),
    ):
        with pytest.raises(ValueError, match=told):
            asked()
    for words in (["export", adapters, str(folder / "out")], ["merge", adapters, adapters, str(folder / "out")]):
        assert main(words) == 2
        assert "merge them first" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_without_their_base_the_command_that_takes_another_place_is_told(trained, capsys):
    folder, _ = trained
    (folder / "base").rename(folder / "moved")
    with pytest.raises(ValueError, match=r"adapters of a model that is not there: .*atma merge BASE"):
        atma.load(folder / "adapters")
    assert main(["merge", str(folder / "moved"), str(folder / "adapters"), str(folder / "out")]) == 0
    assert load_tensors(folder / "out" / "model.safetensors")


def test_another_base_and_a_folder_without_adapters_are_refused(trained, capsys):
    folder, _ = trained
    assert main(["merge", "nano", str(folder / "adapters"), str(folder / "out")]) == 2
    assert "adapters" in capsys.readouterr().err
    assert main(["merge", str(folder / "base"), str(folder / "base"), str(folder / "out")]) == 2
    assert "no adapters here" in capsys.readouterr().err
    assert not (folder / "out").exists()
