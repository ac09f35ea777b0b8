"""--device and --threads: the same in every command that computes."""

from typing import cast

import pytest
import torch

from atma.checkpoint import save_model
from atma.cli import main
from atma.commands import diagnose
from atma.commands.generate import begin
from atma.commands.machine import Machine
from atma.commands.reading import Reading
from atma.eval.language_model import OwnModel
from atma.eval.measured import Measured
from atma.loading import load
from atma.narrow import width_in
from atma.settings import Settings
from atma.threads import take
from tests.test_arguments import EVERY
from tests.test_help_text import helped

DEVICE = "cpu, cuda or a certain GPU such as cuda:1; a GPU if there is one by default."
COMPUTE = ("train", "generate", "chat", "diagnose", "extend", "compress", "bench", "sweep run", "sweep work")
COMPUTE += ("compare run", "compare work", "eval lengths", "eval likelihood", "eval tasks", "eval retrieval")
COMPUTE += ("eval reasoning", "eval recall")


@pytest.mark.parametrize("words", COMPUTE)
def test_the_device_is_told_in_the_same_words_everywhere(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = " ".join(helped(*words.split()).replace("│", " ").split())
    assert f"--device STR {DEVICE}" in said
    assert "--threads INT" in said
    assert words in EVERY


@pytest.mark.parametrize(
    "line",
    ["generate x", "eval lengths", "eval retrieval", "diagnose", "compress nano out --texts x", "eval recall"],
)
def test_a_device_that_is_not_there_is_one_line_that_says_what_is(line, capsys):
    assert main([*line.split(), "--device", "cuda:99"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("atma: error: --device cuda:99: not on this machine; here there is cpu")
    assert told.count("\n") == 1


def test_the_server_refuses_what_it_cannot_compute_on(capsys):
    assert main(["serve", "--device", "cuda"]) == 2
    assert "--device cuda: the server computes on the processor alone so far" in capsys.readouterr().err


def test_threads_are_taken_or_left_and_never_below_one():
    before = torch.get_num_threads()
    try:
        take(2)
        assert torch.get_num_threads() == 2
        assert Machine("cpu").take() == torch.device("cpu")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="--threads -1: at least 1, or leave it out"):
        take(-1)


def test_narrow_weights_are_on_the_cpu_where_a_machine_has_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    floats, narrow = (load("nano", weights=weights).model for weights in (None, "int8"))
    assert Machine().of(floats) == Machine("cuda").of(floats) == torch.device("cuda")
    assert Machine().of(narrow) == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: weights in int8 are read on the CPU; leave --device out"):
        Machine("cuda").of(narrow)


def test_narrow_weights_are_generated_from_measured_and_diagnosed_there(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cpu = torch.device("cpu")
    generation = begin("nano", Settings(max_tokens=1), machine=Machine(), reading=Reading(weights="int8"))
    assert cast(OwnModel, Measured(weights="int8").load()).loaded.model.embed.weight.device == cpu
    assert generation.model.embed.weight.device == cpu
    save_model(tmp_path / "narrow", generation.model, generation.tokenizer)
    found = diagnose._loaded(str(tmp_path / "narrow"), "float32", Machine(), None).model
    assert width_in(found) == "int8" and found.embed.weight.device == cpu
