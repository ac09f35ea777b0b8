"""Completion, asked of the shells themselves: the script is sourced and what it offers is looked at."""

import shutil
import subprocess

import pytest

from atma.cli import VERBS, main
from atma.completion.facts import table
from atma.completion.scripts import script
from tests.test_arguments import EVERY

ASKED = {
    ("atma", "tr"): {"train"},
    ("atma", "eval", "le"): {"lengths"},
    ("atma", "eval", "lengths", "--da"): {"--data"},
    ("atma", "eval", "lengths", "--data", "x", "--model", "nano-r"): {"nano-rope", "nano-rope-canon"},
    ("atma", "chat", "nano-rope-"): {"nano-rope-canon"},
    ("atma", "chat", "--mod"): {"--model"},
    ("atma", "chat", "runs/"): {"runs/mine"},
    ("atma", "train", "r.toml", "--set", "train.tokens=5", "train.muon"): {"train.muon_rate"},
    ("atma", "train", "own"): {"own.toml", "own-data"},
    ("atma", "train", "own.toml", "--track", "wandb", "ml"): {"mlflow"},
    ("atma", "runs", "--sort", "val"): {"validation"},
    ("atma", "runs", "x", "te"): {"texts"},
    ("atma", "completion", "f"): {"fish"},
    ("atma", "generate", "x", "--device", "c"): {"cpu", "cuda"},
    ("atma", "sweep", "run", "--launch", "s"): {"slurm"},
}
SOURCED = {
    "bash": """
source SCRIPT
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_atma
printf '%s\\n' "${COMPREPLY[@]}"
""",
    "zsh": """
compadd() {  # as the shell's own: what begins with what is typed
  while [[ $1 != -- ]]; do shift; done
  shift
  print -rl -- ${(M)@:#${words[CURRENT]}*}
}
_files() { print -rl -- ${words[CURRENT]}*(N) }
source SCRIPT
words=("$@") CURRENT=$#
_atma
""",
    "fish": """
source SCRIPT
complete -C "$(string join ' ' -- $argv)"
""",
}


@pytest.fixture(scope="module")
def facts():
    return table(VERBS)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with a finished run, texts and a recipe."""
    (tmp_path / "runs/mine/final").mkdir(parents=True)
    (tmp_path / "texts").mkdir()
    (tmp_path / "own.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def offered(shell, facts, folder, words):
    """What the shell offers for the last of the words."""
    path, asking = folder / f"atma.{shell}", folder / f"ask.{shell}"
    path.write_text(script(shell, facts, "0"))
    asking.write_text(SOURCED[shell].replace("SCRIPT", str(path)))
    plain = ["--no-config"] if shell == "fish" else ["--norc"] if shell == "bash" else ["-f"]
    ran = subprocess.run([shell, *plain, str(asking), *words], capture_output=True, text=True, timeout=60, cwd=folder)
    assert ran.stderr == ""
    return {line.split("\t")[0].rstrip("=/") for line in ran.stdout.splitlines() if line}


@pytest.mark.parametrize("shell", SOURCED)
def test_a_shell_offers_what_can_stand_there(shell, facts, reader):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for words, wanted in ASKED.items():
        assert offered(shell, facts, reader, words) == wanted, words


def test_the_table_knows_every_verb_with_every_option(facts):
    from atma.arguments import options

    assert facts["verbs:"].split() == list(VERBS)
    assert {key.removeprefix("options:") for key in facts if key.startswith("options:")} == set(EVERY)
    for words, run in EVERY.items():
        known = {name for name in options(run) if ".no-" not in name and not name.startswith("--no-")}
        listed = set(facts[f"options:{words}"].split()) - {"--help", "--model"}
        assert listed <= known
        assert all(f"option:{words} {name}" in facts for name in listed)


def test_nothing_in_the_table_ends_the_text_that_a_script_holds_it_in(facts):
    assert not [text for pair in facts.items() for text in pair if set(text) & set("\"'`$\\")]


NAMES = ["two words", "*", "$(touch ran)", "a 'quote'"]


@pytest.mark.parametrize("before", ["", "enable -n compopt\n"], ids=["bash", "bash 3 of macOS"])
def test_bash_offers_names_of_any_characters_whole(before, facts, reader, monkeypatch):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    for name in NAMES:
        (reader / f"runs/{name}/final").mkdir(parents=True)
    monkeypatch.setitem(SOURCED, "bash", before + SOURCED["bash"])
    two = "runs/two\\ words"
    quoted = {two, r"runs/\*", r"runs/\$\(touch\ ran\)", r"runs/a\ \'quote\'"}
    wanted = {"runs/mine"} | (quoted if before else {f"runs/{name}" for name in NAMES})
    for words in (["chat", "runs/"], ["train", "runs/"], ["runs", "x", "runs/"]):
        assert offered("bash", facts, reader, ["atma", *words]) == wanted
    assert offered("bash", facts, reader, ["atma", "chat", "runs/two\\ w"]) == {two if before else "runs/two words"}


@pytest.mark.parametrize("shell", SOURCED)
def test_a_table_with_any_characters_runs_nothing_and_comes_out_as_it_went_in(shell, facts, reader):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    odd = facts | {"recipes:": "zz-`touch${IFS}ran` zz-$(touch${IFS}ran) zz-'\"\\ zz-*"}
    (reader / "zz-file").write_text("")
    assert offered(shell, odd, reader, ["atma", "train", "zz-"]) - {"zz-file"} == set(odd["recipes:"].split())
    assert not (reader / "ran").exists()


def test_the_command_prints_the_script_and_another_shell_is_told(capsys):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("complete -F _atma atma")
    assert main(["completion", "tcsh"]) == 2
    assert "bash" in capsys.readouterr().err


def test_completing_runs_no_python(facts):
    for shell in SOURCED:
        assert "python" not in script(shell, facts, "0").replace("no Python", "")
