"""The command line: what a user types, sees and is told when something is wrong."""

import dataclasses
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import atma
from atma.checkpoint import save_model
from atma.cli import VERBS, main
from atma.commands import generate
from atma.commands.chat import converse
from atma.commands.generate import begin
from atma.commands.train import override
from atma.config import Recipe, preset
from atma.generation import Generation, Settings
from atma.loading import load, model_folder, packaged
from atma.model import Model
from atma.tokenizer import byte_tokenizer

RECIPE = """
[model]
preset = "nano-test"
[data]
path = "{data}"
[train]
length = 16
batch_tokens = 64
tokens = 128
evaluate_every = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a byte tokenizer; the model has never learned anything."""
    path = tmp_path_factory.mktemp("models") / "fresh"
    model = Model(preset("nano-test"), torch.Generator().manual_seed(0))
    save_model(path, model, byte_tokenizer(), {"note": "fresh"})
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Token shards of a little text."""
    root = tmp_path_factory.mktemp("text")
    for i in range(40):
        (root / f"{i}.txt").write_text(f"Document {i}: " + " ".join(str(i * j) for j in range(100)))
    out = tmp_path_factory.mktemp("data") / "shards"
    assert main(["prepare", str(root), "--out", str(out), "--validation-share", "0.3"]) == 0
    return out


def failing(capsys, *arguments):
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("atma: error: ")
    assert told.count("\n") == 1
    return told


def run_apart(*arguments, **options):
    command = [sys.executable, "-m", "atma", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, **options)


def test_help_lists_every_verb_and_loads_nothing_heavy():
    code = (
        "import sys, atma.cli; atma.cli.main(['--help']); print({'torch', 'numpy', 'tyro', 'rich'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f"  {verb} " in said for verb in VERBS)
    assert said.endswith("set()\n")


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: atma VERB")


def test_version_is_the_package_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"atma {atma.__version__}\n"


def commands(verbs, *before):
    """Every verb that is a function, as the words that call it."""
    for verb, (name, _) in verbs.items():
        module, _, function = name.partition(".")
        table = None if function else getattr(importlib.import_module(f"atma.commands.{module}"), "VERBS", None)
        yield from [(*before, verb)] if table is None else commands(table, *before, verb)


@pytest.mark.parametrize("words", list(commands(VERBS)), ids=" ".join)
def test_every_verb_explains_itself(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: atma {' '.join(words)}" in said
    assert "{None}" not in said


def test_a_table_of_verbs_explains_itself_and_names_a_mistake(capsys):
    assert main(["eval"]) == 0
    assert "usage: atma eval VERB" in capsys.readouterr().out
    assert "no verb 'nano'; known: lengths" in failing(capsys, "eval", "nano")


def test_an_unknown_verb_is_named(capsys):
    assert "no verb 'teach'; known: prepare, train" in failing(capsys, "teach")


def test_an_unknown_option_is_named_and_exits_2(capsys):
    assert "--temprature, 1" in failing(capsys, "generate", "x", "--temprature", "1")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["prepare"], "Missing from atma prepare: SOURCE (see atma prepare --help)"),
        (["prepare", "x", "--seed", "y"], "Error parsing --seed: invalid literal for int() with base 10: 'y'"),
        (["prepare", "x", "--tokeniser", "bpe"], "Perhaps you meant: --tokenizer STR (see atma prepare --help)"),
        (["generate", "x", "--temperature", "-1"], "'temperature' must be 0 or more, not -1.0"),
        (["generate", "x", "--seed", str(2**64)], "'seed' must be below 2 to the power 64"),
        (["eval", "lengths", "--seed", "-1"], "'seed' must be 0 or more, not -1"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(arguments, told, capsys):
    assert told in failing(capsys, *arguments)


@pytest.mark.parametrize("error", [MemoryError("8 GiB"), RuntimeError("can't allocate memory: you tried 102 bytes")])
def test_too_little_memory_is_one_line(error, monkeypatch, capsys):
    def fails(*_):
        raise error

    monkeypatch.setattr("atma.cli._dispatch", fails)
    assert "out of memory: " in failing(capsys, "info")


@pytest.mark.parametrize(("error", "status"), [(ValueError("first"), 2), (KeyboardInterrupt(), 130)])
def test_what_went_wrong_besides_is_told_in_the_same_line(error, status, monkeypatch, capsys):
    def failed(*_):
        error.add_note("besides: no room\non the disk")
        raise error

    monkeypatch.setattr("atma.cli._dispatch", failed)
    assert main([]) == status
    told = capsys.readouterr().err
    assert told.endswith("; besides: no room on the disk\n") and told.count("\n") == 1


def test_ctrl_c_ends_with_130_and_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("atma.cli._dispatch", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "atma: interrupted\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "runs/x"), "runs/x: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (ValueError("one\n  two"), "one two"),
        (ValueError(), "ValueError"),
    ],
)
def test_errors_a_user_can_mend_are_one_line(error, told, monkeypatch, capsys):
    def fails(*_):
        raise error

    monkeypatch.setattr("atma.cli._dispatch", fails)
    assert failing(capsys, "info") == f"atma: error: {told}\n"


def test_other_errors_keep_their_trace(monkeypatch):
    def fails(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr("atma.cli._dispatch", fails)
    with pytest.raises(RuntimeError):
        main(["info"])


def test_a_reader_that_closes_early_is_no_error(folder):
    command = f'"{sys.executable}" -m atma generate x --model "{folder}" --ignore-end --max-tokens 0 | head -c 10'
    ended = subprocess.run(
        command, shell=True, capture_output=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert ended.stderr == b""


def test_generate_streams_what_python_gives(folder, capsys):
    assert main(["generate", "x", "--model", str(folder), "--max-tokens", "20", "--seed", "3"]) == 0
    loaded = atma.load(folder)
    expected = atma.generate(loaded.model, loaded.tokenizer, "x", atma.Settings(max_tokens=20, seed=3))
    assert capsys.readouterr().out == expected + "\n"


def test_a_prompt_comes_from_a_file_or_standard_input(folder, tmp_path, capsys):
    options = ("--model", str(folder), "--max-tokens", "20")
    (tmp_path / "prompt").write_text("def f(é")
    assert main(["generate", "def f(é", *options]) == 0
    expected = capsys.readouterr().out
    assert main(["generate", "--file", str(tmp_path / "prompt"), *options]) == 0
    assert capsys.readouterr().out == expected
    assert run_apart("generate", "--file", "-", *options, input="def f(é").stdout == expected


def test_bad_prompts_are_told(folder, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    model = ("--model", folder)
    assert "the prompt has no tokens" in failing(capsys, "generate", "", *model)
    assert "the prompt has no tokens" in failing(capsys, "generate", "--file", tmp_path / "empty", *model)
    assert "binary: not UTF-8 text" in failing(capsys, "generate", "--file", tmp_path / "binary", *model)
    assert "nowhere: No such file" in failing(capsys, "generate", "--file", tmp_path / "nowhere", *model)
    assert "no prompt" in failing(capsys, "generate", *model)
    assert "two prompts" in failing(capsys, "generate", "x", "--file", tmp_path / "empty", *model)


def test_a_saved_state_goes_on_from_the_command_line(folder, tmp_path, capsys):
    state, options = tmp_path / "text.state", ("--model", folder, "--ignore-end")
    main(["generate", "x", *map(str, options), "--max-tokens", "30"])
    whole = capsys.readouterr().out
    main(["generate", "x", *map(str, options), "--max-tokens", "10", "--save-state", str(state)])
    first = capsys.readouterr().out
    main(["generate", *map(str, options), "--max-tokens", "20", "--continue-from", str(state)])
    assert first[:-1] + capsys.readouterr().out == whole


def interrupt_when_it_writes(*arguments):
    """Run a command apart, press Ctrl-C once text has come, and wait for its end."""
    command = [sys.executable, "-m", "atma", *map(str, arguments)]
    pipe = subprocess.PIPE
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit it as ignored
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        signal.signal(signal.SIGINT, before)
        assert process.stdout is not None
        process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        try:
            error = process.communicate(timeout=600)[1]
        finally:
            process.kill()
    return process.returncode, error.decode()


def test_ctrl_c_ends_an_endless_text(folder):
    status, error = interrupt_when_it_writes("generate", "x", "--model", folder, "--ignore-end", "--max-tokens", 0)
    assert (status, error) == (130, "atma: interrupted\n")


def test_ctrl_c_ends_and_saves_a_text_that_is_to_be_saved(folder, tmp_path, capsys):
    state, options = tmp_path / "text.state", ("--model", folder, "--ignore-end", "--max-tokens")
    status, error = interrupt_when_it_writes("generate", "x", *options, 0, "--save-state", state)
    assert (status, error) == (0, f"[saved: {state}]\n")
    assert main(["generate", "--continue-from", str(state), *map(str, options), "3"]) == 0


def test_a_model_that_does_not_exist_is_told_with_those_that_do(capsys):
    told = failing(capsys, "generate", "x", "--model", "nonexistent")
    assert "nonexistent: no such model folder; packaged models: " in told


def test_a_folder_without_a_model_is_told(tmp_path, capsys):
    assert "no model here" in failing(capsys, "info", tmp_path)
    (tmp_path / "checkpoints" / "step-00000200").mkdir(parents=True)
    told = failing(capsys, "info", tmp_path)
    assert (
        f"an unfinished run; finish it with `atma train --resume --out {tmp_path}`" in told and "step-00000200" in told
    )


def test_a_damaged_model_is_told(folder, tmp_path, capsys):
    import shutil

    shutil.copytree(folder, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in failing(capsys, "generate", "x", "--model", tmp_path / "m")


def test_a_run_folder_stands_for_its_final_model(folder, tmp_path):
    (tmp_path / "final").symlink_to(folder)
    assert model_folder(tmp_path) == tmp_path / "final"


def test_packaged_models_load_by_name():
    if not packaged():
        pytest.skip("no packaged models yet")
    for name, path in packaged().items():
        loaded = load(name)
        assert loaded.path == path
        assert loaded.tokenizer is not None


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_info_tells_damaged_weights(folder, kept, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert f"{weights}: not a readable safetensors file" in failing(capsys, "info", str(tmp_path / "cut"))


def test_a_state_that_cannot_be_kept_is_told_before_any_text(folder, tmp_path, capsys):
    for where, told in ((tmp_path, "is a folder"), (tmp_path / "no" / "state", "no folder")):
        assert told in failing(capsys, "generate", "x", "--model", str(folder), "--save-state", str(where))
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_told_and_begins_no_run(device, data, tmp_path, capsys):
    (tmp_path / "a.toml").write_text(RECIPE.format(data=data))
    line = failing(capsys, "train", str(tmp_path / "a.toml"), "--out", str(tmp_path / "run"), "--device", device)
    assert f"--device {device}: " in line
    assert not (tmp_path / "run").exists()


def test_info_shows_versions_and_machine(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert atma.__version__ in said
    assert torch.__version__ in said
    assert "packaged models" in said


def test_info_of_a_model_shows_its_configuration_and_hashes(folder, capsys):
    assert main(["info", str(folder)]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    parameters = sum(parameter.numel() for parameter in load(folder).model.parameters())
    assert said["parameters"] == f"{parameters:,}"
    assert said["core"] == "polar"
    assert said["extra"].split() == ["note", "fresh"]


def test_prepare_says_what_it_made(data):
    manifest = json.loads((data / "manifest.json").read_text())
    assert set(manifest["splits"]) == {"train", "validation"}


def test_prepare_tells_bad_sources(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    assert "no such file or folder" in failing(capsys, "prepare", tmp_path / "nowhere")
    assert "empty" in failing(capsys, "prepare", tmp_path / "empty.txt", "--out", tmp_path / "d")


def test_eval_prints_a_table_and_keeps_rows(folder, data, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    options = ["--data", data, "--lengths", 64, 128, 1 << 20, "--documents", 2, "--target-tokens", 16]
    assert (
        main(["eval", "lengths", "--model", str(folder), *map(str, options), "--needle-trials", "0", "--out", str(out)])
        == 0
    )
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    fixed = {row["length"]: row["loss"] for row in rows if row["kind"] == "fixed"}
    assert set(fixed) == {64, 128}
    assert all(f"{loss:.3f}" in said for loss in fixed.values())
    assert "too little text for losses at 1,048,576 tokens" in said


def test_train_runs_a_recipe_and_the_result_generates(data, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(RECIPE.format(data=data))
    run = tmp_path / "run"
    arguments = ["train", str(tmp_path / "recipe.toml"), "--out", str(run), "--device", "cpu"]
    assert main([*arguments, "--set", "train.tokens=192", "train.seed=7"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 3
    assert main(["generate", "x", "--model", str(run), "--max-tokens", "3"]) == 0
    assert "holds a run already" in failing(capsys, *arguments, "--set", "train.tokens=192", "train.seed=7")


def test_train_tells_a_bad_recipe(tmp_path, capsys):
    assert "no such recipe" in failing(capsys, "train", tmp_path / "none.toml")
    (tmp_path / "r.toml").write_text("[train]\nlenght = 3")
    assert "did you mean 'train.length'" in failing(capsys, "train", tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text("")
    for setting, told in {
        "train.tokns=5": "did you mean 'train.tokens'",
        "train.tokens=five": "'train.tokens' must be of type int, not 'five'",
        "tokens": "write KEY=VALUE",
        "name.x=1": "'name' is no table",
        "model.core=ropes": "'model.core': no core 'ropes'; did you mean 'rope'?",
    }.items():
        assert told in failing(capsys, "train", tmp_path / "r.toml", "--set", setting)


def test_overriding_settings_changes_those_alone():
    changed = override(
        Recipe(), ("train.tokens=100", "model.core=rope", "evaluation.lengths=[8, 16]", "name=a b", "model.window=32")
    )
    expected = dataclasses.replace(
        Recipe(),
        name="a b",
        train=dataclasses.replace(Recipe().train, tokens=100),
        model=dataclasses.replace(Recipe().model, core="rope", window=32),
        evaluation=dataclasses.replace(Recipe().evaluation, lengths=(8, 16)),
    )
    assert changed == expected
    assert override(Recipe(), ()) == Recipe()


def test_chat_keeps_one_state_over_all_turns(folder):
    loaded = load(folder)
    assert loaded.tokenizer is not None
    generation = Generation(loaded.model, loaded.tokenizer, Settings(max_tokens=5, ignore_end=True, stop=("\nUser:",)))
    said = "".join(converse(generation, ["hello", "more"]))
    read = loaded.tokenizer.decode(generation.tokens[1:])
    assert said.startswith("Assistant:")
    assert read.startswith("User: hello\nAssistant:")
    assert "\nUser: more\nAssistant:" in read


def test_what_the_folder_ends_a_turn_with_ends_what_commands_write(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "generation_config.json").write_text('{"eos_token_id": [65, 256]}')
    assert begin(str(own), Settings(stop_tokens=(7,))).settings.stop_tokens == (7, 65)
    assert begin(str(own), Settings(ignore_end=True)).settings.stop_tokens == ()


def test_chat_ends_with_the_input(folder):
    ended = run_apart("chat", folder, "--max-tokens", "3", input="hello\n")
    assert ended.returncode == 0
    assert ended.stdout.startswith("User: Assistant:")


def test_lazy_names_of_the_package_are_what_they_say():
    assert atma.Model is Model
    assert atma.load is load
    assert set(atma.__all__) <= set(dir(atma))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = atma.lode


def narrow(monkeypatch, encoding: str, errors: str = "strict", typed: bytes = b"") -> io.BytesIO:
    """A terminal that can show little, and what is typed there; returns what it is sent."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding, errors))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8", "strict"))
    return shown


@pytest.mark.parametrize(
    ("encoding", "errors"), [("ascii", "strict"), ("ascii", "surrogateescape"), ("latin-1", "strict")]
)
def test_what_a_terminal_cannot_show_is_substituted_whatever_command_writes_it(monkeypatch, encoding, errors):
    said = {"a": lambda: print("a \u2013 \u6f22 \ud800 z"), "b": lambda: Console().print("b \u2013 \u6f22 z")}
    for verb, run in said.items():
        shown = narrow(monkeypatch, encoding, errors)
        monkeypatch.setattr("atma.cli._dispatch", lambda _, run=run: run())
        assert main([verb]) == 0
        assert shown.getvalue().decode(encoding).split()[:2] == [verb, "?"]
        assert shown.getvalue().decode(encoding).split()[-1] == "z"


def test_generate_goes_on_where_its_text_cannot_be_shown(monkeypatch, tmp_path):
    shown = narrow(monkeypatch, "ascii")
    asked = ["generate", "x = '\u6f22\u5b57'; y = '", "--max-tokens", "8", "--save-state", str(tmp_path / "s")]
    assert main([*asked, "--temperature", "0"]) == 0
    assert (tmp_path / "s").is_file()
    assert shown.getvalue().isascii()


def test_a_chat_reads_what_is_typed_in_any_bytes(monkeypatch):
    shown = narrow(monkeypatch, "utf-8", typed=b"h\xff\xedllo\n")
    assert main(["chat", "--max-tokens", "2"]) == 0
    assert b"Assistant:" in shown.getvalue()


def test_a_prompt_that_the_locale_could_not_read_is_read_by_its_bytes():
    assert generate._argument("\udcc3\udca9") == "\u00e9"
    with pytest.raises(ValueError, match="not UTF-8 text"):
        generate._argument("\udcff")


def test_a_command_without_an_output_ends_well(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["info"]) == 0


def test_a_byte_order_mark_is_no_part_of_a_prompt_or_of_a_folder_s_settings(tmp_path, folder):
    from atma.commands.generate import _prompt

    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfOnce")
    assert _prompt(None, tmp_path / "prompt.txt") == "Once"
    marked = shutil.copytree(folder, tmp_path / "marked")
    (marked / "manifest.json").unlink()
    (marked / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    assert load(marked).model.config == load(folder).model.config
