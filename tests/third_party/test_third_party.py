"""A mixer that an installed package brings: everything there is works with it, and nothing else was touched for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from atma.eval.results import read_rows
from tests.harness.processes import forked

PACKAGE = Path(__file__).parent / "package"
ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
[model]
vocab_size = 257
width = 32
depth = 3
mlp_multiple = 2
pattern = ["gated_conv", "echo", "near"]

[model.mixers.near]
kind = "polar"
query_heads = 2
key_value_heads = 1
head_width = 8

[data]
path = "DATA"

[train]
length = 32
batch_tokens = 128
tokens = 5120
checkpoint_every = 4
evaluation_tokens = 256

[evaluation]
lengths = [32, 64]
documents = 2
target_tokens = 16
needle_trials = 0
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package as pip installs it, in a folder of its own."""
    place = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "package"
    source.mkdir()
    for file in PACKAGE.iterdir():
        if file.is_file():
            (source / file.name).write_text(file.read_text())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", place, source], check=True)
    return place


@pytest.fixture(scope="module")
def atma(installed):
    """Runs a command where the package is installed; its output. Fails where the command does, unless it should."""

    def run(*words: object, fails: bool = False, at: Path | None = installed) -> str:
        done = forked(["-m", "atma", *map(str, words)], [environment(at)], [] if at is None else [at])[0]
        assert done.status == (2 if fails else 0), done.err[-3000:]
        return done.err if fails else done.out

    return run


def environment(at: Path | None) -> dict[str, str]:
    """Of a command that sees the packages in a folder."""
    paths = [str(at)] * (at is not None) + [path for path in [os.environ.get("PYTHONPATH")] if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, atma) -> Path:
    folder = tmp_path_factory.mktemp("echo")
    (folder / "text").mkdir()
    for i in range(12):
        (folder / "text" / f"{i}.txt").write_text(f"The cat of number {i} sat on mat {i * 7}, and ran.\n" * (30 + i))
    atma("prepare", folder / "text", "--out", folder / "data", "--validation-share", "0.3")
    path = folder / "echo.toml"
    path.write_text(RECIPE.replace("DATA", str(folder / "data")))
    return path


@pytest.fixture(scope="module")
def trained(recipe, atma) -> Path:
    folder = recipe.parent / "run"
    atma("train", recipe, "--out", folder)
    return folder


@pytest.mark.slow
def test_the_laws_run_over_it(installed):
    laws = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/laws", "-k", "echo and not none"]
    done = subprocess.run(laws, cwd=ROOT, env=environment(installed), text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "100%" in done.stdout


@pytest.mark.slow
def test_training_that_was_killed_ends_with_the_same_weights(recipe, trained, atma, installed):
    folder = recipe.parent / "killed"
    words = [sys.executable, "-m", "atma", "train", recipe, "--out", folder]
    running = subprocess.Popen(list(map(str, words)), env=environment(installed), stdout=subprocess.DEVNULL)
    while running.poll() is None and not list((folder / "checkpoints").glob("step-*")):
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    atma("train", "--resume", "--out", folder)
    one, other = (run / "final" / "model.safetensors" for run in (trained, folder))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_text_that_was_saved_goes_on_as_if_it_had_not_been(trained, atma, tmp_path):
    state = tmp_path / "state"
    common = ["generate", "--model", trained, "--temperature", "0", "--ignore-end"]
    whole = atma(*common, "--max-tokens", 24, "The cat")
    first = atma(*common, "--max-tokens", 12, "The cat", "--save-state", state)
    rest = atma(*common, "--max-tokens", 12, "--continue-from", state)
    assert whole.rstrip("\n") == first.rstrip("\n") + rest.rstrip("\n")


@pytest.mark.slow
def test_it_is_served_with_kept_states_and_finds_them_again_after_a_restart(trained, installed, tmp_path):
    prompt, answers = "The cat of number 3 sat on mat 21, and ran.\n" * 3, []
    for _ in range(2):
        with Server(trained, installed, tmp_path / "kept") as server:
            answers += [server.complete(prompt), server.complete(prompt)]
    texts = {answer["choices"][0]["text"] for answer in answers}
    assert len(texts) == 1
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached[0] == 0 and min(cached[1:]) > 0


class Server:
    """`atma serve` with one model, while it is entered."""

    def __init__(self, model: Path, site: Path, kept: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = ["serve", model, "--port", self.port, "--cache-dir", kept]
        self.words = [sys.executable, "-m", "atma", *map(str, words)]
        self.site = site

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(self.words, env=environment(self.site), stdout=subprocess.DEVNULL)
        while True:
            assert self.process.poll() is None
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health").read()
            except OSError:
                time.sleep(0.1)
            else:
                return self

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait()

    def complete(self, prompt: str) -> dict:
        body = json.dumps({"prompt": prompt, "max_tokens": 8, "temperature": 0}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())


@pytest.mark.slow
def test_it_is_diagnosed(trained, atma, tmp_path):
    out = tmp_path / "rows.jsonl"
    options = ["--lengths", 128, 192, "--documents", 2, "--records", 1, "--stress", 1, "--page", tmp_path / "page.html"]
    atma("diagnose", trained, "--data", trained.parent / "data", "--out", out, *options)
    rows = read_rows(out)
    held = {(row["layer"], row["head"]) for row in rows if row["kind"] == "retention"}
    assert held == {(1, 0), (1, 1)}
    changes = {row["change"] for row in rows if row["kind"] == "loss"}
    assert "without the near of layer 1" in changes and "without the far of layer 1" in changes
    assert {row["mixer"] for row in rows if row["kind"] == "gain"} == {"gated_conv", "echo", "near"}


def test_it_is_measured(trained, atma, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat of number 5 sat on mat 35, and ran.\n" * 20)
    rows = tmp_path / "rows.jsonl"
    options = ["--lengths", 32, 64, "--documents", 1, "--text-bytes", 400, "--target-bytes", 16]
    atma("eval", "likelihood", "--model", trained, "--texts", text, "--out", rows, *options)
    assert all(row["loss"] > 0 for row in read_rows(rows) if "loss" in row)


@pytest.mark.slow
def test_a_sweep_goes_over_one_of_its_options(recipe, atma, tmp_path):
    path, out = tmp_path / "sweep.toml", tmp_path / "sweep"
    path.write_text(
        recipe.read_text().replace("tokens = 5120", "tokens = 512")
        + '\n[sweep.factors]\nfade = { field = "model.fade_bias", values = [0.0, 3.0] }\n'
    )
    atma("sweep", "run", path, "--out", out)
    cells = [json.loads(file.read_text()) for file in sorted(out.rglob("result.json"))]
    assert {cell["config"]["model"]["mixers"]["echo"]["fade_bias"] for cell in cells} == {0.0, 3.0}


def test_without_the_package_its_folder_says_what_is_missing(trained, atma):
    told = atma("generate", "--model", trained, "x", fails=True, at=None)
    assert "no mixer 'echo' is installed here: it came with atma-echo 0.1; install that package" in told
    assert len(told.strip().splitlines()) == 1


def test_a_folder_imports_nothing_that_is_not_a_mixer_of_a_package(trained, atma, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (trained / "final").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["model"]["pattern"] = ["own", "near"]
    config["model"]["mixers"]["own"] = {"kind": "antigravity:Echo", "package": "antigravity 1"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "no mixer 'antigravity:Echo' is installed here" in atma("generate", "--model", folder, "x", fails=True)
