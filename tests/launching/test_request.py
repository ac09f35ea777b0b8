"""What is asked of a cluster, told in words that are read or refused in one line."""

import importlib.util
import re

import pytest

from atma.cli import main
from atma.launching import Request, Work, read, start


def test_options_are_toml_or_text_and_counts_are_taken_out():
    written = ("timeout_min=30", "slurm_partition=long", 'cluster="local"', "nodes=2", "processes_per_node=8")
    asked = read("slurm", written)
    assert asked == Request("slurm", 2, 8, options={"timeout_min": 30, "slurm_partition": "long", "cluster": "local"})
    assert asked.processes == 16
    assert read("ray", ("max_failures=0", "num_gpus=1")) == Request("ray", max_failures=0, options={"num_gpus": 1})


def test_where_nothing_is_said_slurm_starts_a_process_for_each_gpu():
    asked = read("slurm", ("gpus_per_node=4",))
    assert asked.processes_per_node == 4 and asked.options == {"gpus_per_node": 4}
    assert read("slurm", ("gpus_per_node=4", "processes_per_node=1")).processes == 1
    assert read("slurm", ("gpus_per_node=a100:4",)).processes == 1  # a kind and a number are not read


def test_nothing_is_asked_for_what_runs_here():
    assert read("here", ()) is None


MISTAKES = [
    (["--job", "nodes=2"], "--job nodes=2: what to ask a cluster for; add --launch slurm or --launch ray"),
    (["--launch", "slurm", "--job", "partition"], "--job partition: write KEY=VALUE, such as timeout_min=600"),
    (["--launch", "ray", "--job", "nodes=two"], "--job nodes=two: write a whole number, 1 or more"),
    (["--launch", "ray", "--job", "processes_per_node=0"], "--job processes_per_node=0: write a whole number, 1 or"),
    (["--launch", "ray", "--job", "max_failures=-1"], "--job max_failures=-1: write a whole number, 0 or more"),
    (["--launch", "slurm", "--job", "tasks_per_node=8"], "--job tasks_per_node: say processes_per_node"),
    (["--launch", "slurm", "--job", "nodes=1", "nodes=2"], "--job nodes=2: 'nodes' is given twice"),
]


@pytest.mark.parametrize("verb", [["train", "nano"], ["sweep", "run", "sweep-nano"]])
@pytest.mark.parametrize(("words", "told"), MISTAKES)
def test_mistakes_are_told_in_one_line(verb, words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*verb, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"atma: error: {told}") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["slurm", "ray"])
def test_a_launcher_that_is_not_installed_says_what_to_install(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'atma-lm[cluster]'")):
        start(Request(kind), Work("w", [["--version"]], tmp_path / "logs"))
    assert not (tmp_path / "logs").exists()
