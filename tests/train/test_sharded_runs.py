"""Runs of processes that share the weights: checkpoints in parts, models in one piece, and others that go on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from sharded import SAMPLES, recipe, run
from tiny_run import tiny_model, tiny_recipe, tiny_source

from atma.checkpoint import load_model, save_model
from atma.folders import verify_folder
from atma.model import Model
from atma.tokenizer import byte_tokenizer
from atma.train.loop import fit
from atma.train.parallel import Ranks
from atma.train.resume import newest_checkpoint, place_of
from atma.train.samples import read_samples, written
from atma.weights import load_weights
from tests.harness.processes import group

HERE = Path(__file__).parent
WITHIN = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    save_model(folder, Model(tiny_model(), torch.Generator().manual_seed(5)), None)
    return str(folder)


def sharded(out: Path, world: int, stop: int, *more: str) -> None:
    group(world, ["sharded.py", str(out), str(world), str(stop), *more], HERE)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run by two that was stopped at step 6; to be copied."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    sharded(folder, 2, 6)
    return folder


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["all", "adapters"])
def test_a_run_stopped_by_two_goes_on_with_one_and_with_two(lora, base, stopped, tmp_path):
    more = [base] if lora else []
    alone = run(tmp_path / "alone", Ranks(), 0, *more)
    if lora:
        sharded(tmp_path / "two", 2, 6, *more)
    else:
        shutil.copytree(stopped, tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    checkpoint, problems = newest_checkpoint(tmp_path / "two")
    assert checkpoint is not None and checkpoint.name == "step-00000006" and not problems
    assert run(tmp_path / "one", Ranks(), 0, *more) == tmp_path / "one" / "final"
    sharded(tmp_path / "two", 2, 0, *more)
    sharded(tmp_path / "whole", 2, 0, *more)
    wanted = load_weights(Path(alone))
    for name in ("one", "two", "whole"):
        found = load_weights(tmp_path / name / "final")
        assert found.keys() == wanted.keys() and (tmp_path / name / "best").is_dir()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, **WITHIN)
    first, second = (load_weights(tmp_path / name / "final") for name in ("two", "whole"))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert (tmp_path / "two" / "adapters").is_dir() == lora


def test_texts_of_shared_weights_are_written_once_and_are_those_of_the_whole_model(tmp_path):
    """By one model that is filled anew: what is written at a step are the texts of its checkpoint, in one process."""
    sharded(tmp_path / "run", 2, 0, SAMPLES)
    wanted = []
    for step in (4, 8, 12):
        model, _ = load_model(place_of(tmp_path / "run", step))
        wanted += written(model, byte_tokenizer(), recipe(1, SAMPLES).train, step)
    assert read_samples(tmp_path / "run") == wanted and len({one.text for one in wanted}) > 1


@pytest.mark.slow
def test_parts_of_four_are_gone_on_from_by_two_and_those_by_one(tmp_path):
    sharded(tmp_path / "run", 4, 4)
    sharded(tmp_path / "run", 2, 8)
    run(tmp_path / "run", Ranks(), 0)
    wanted = load_weights(Path(run(tmp_path / "alone", Ranks(), 0)))
    for key, value in load_weights(tmp_path / "run" / "final").items():
        torch.testing.assert_close(value, wanted[key], **WITHIN)


@pytest.mark.parametrize(
    ("ranks", "changes", "told"),
    [
        (Ranks(0, 2, 1, 2), {"shard_ranks": 2, "distractor_weight": 0.1}, "'distractor_weight' reads weights outside"),
        (Ranks(0, 2, 2), {"context_ranks": 2, "context_shares": (100.0, 1.0)}, "'context_shares': shares .* none"),
        (Ranks(0, 2), {"shard_ranks": 2}, "'shard_ranks' 2: processes share in `atma train` alone"),
    ],
)
def test_what_cannot_be_shared_is_told_before_a_run_begins(ranks, changes, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        fit(tiny_recipe(**changes), tmp_path / "run", tiny_source(), ranks=ranks)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_in_parts_is_a_model_folder_and_says_what_is_wrong_with_it(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run", ignore=shutil.ignore_patterns("step-00000004"))
    folder = tmp_path / "run" / "checkpoints" / "step-00000006"
    parts = sorted(path.name for path in folder.glob("*-of-*"))
    assert parts == [f"{stem}-0000{i}-of-00002.safetensors" for stem in ("model", "optimizer") for i in (1, 2)]
    assert not list(folder.parent.glob(".*"))
    model, _ = load_model(folder)
    assert model.config == tiny_model()
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["files"].pop("optimizer-00002-of-00002.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"optimizer-00002-of-00002.safetensors: manifest.json does not list it"):
        verify_folder(folder)
    manifest["files"]["optimizer-00002-of-00002.safetensors"] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors: missing, though"):
        verify_folder(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no good checkpoint to resume from: .*manifest.json: missing"):
        run(tmp_path / "run", Ranks(), 0)
