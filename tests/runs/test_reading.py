"""Run folders read as they stand: whole, half-written, foreign, held by a process."""

import fcntl
import json
import os
import struct

import pytest

from atma.cli import main
from atma.commands.trained import summary
from atma.runs import reading
from atma.runs.reading import find_runs, is_run, read_run

RECIPE = 'name = "r"\n[train]\ntokens = 1000\nbatch_tokens = 100\n'


def row(kind, step, **values):
    return json.dumps({"kind": kind, "step": step, "tokens": 100 * step} | values) + "\n"


def make(folder, steps=10, recipe=RECIPE, final=None, losses=None):
    """A run folder of so many steps, 50 tokens a second."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe)
    lines = [row("event", 0, event="begins")]
    for step in range(1, steps + 1):
        lines.append(row("train", step, loss=5.0 - step / 10, tokens_per_second=50.0))
    lines.append(row("validation", steps, loss=4.25))
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / ".lock").write_text("{}")
    if final is not None:
        (folder / "final").mkdir()
        (folder / "final/config.json").write_text(json.dumps({"extra": {"step": final}}))
    return folder


def test_the_names_of_files_are_those_of_training():
    from atma.train import folder, record

    assert (reading.RECIPE, reading.METRICS, reading.LOCK) == (folder.RECIPE, record.NAME, folder._LOCK)


def test_a_finished_run_is_told_by_its_record(tmp_path):
    run = read_run(make(tmp_path / "a", final=10))
    assert (run.name, run.state, run.steps, run.of, run.tokens) == ("a", "finished", 10, 10, 1000)
    assert (run.loss, run.validation, run.seconds, run.rate) == (4.0, 4.25, 20.0, 50.0)
    assert run.as_dict()["tokens_per_second"] == 50.0
    json.dumps(run.as_dict(), allow_nan=False)


def test_a_run_without_a_final_model_is_stopped_and_so_is_one_that_went_on_beyond_it(tmp_path):
    assert read_run(make(tmp_path / "a", steps=4)).state == "stopped"
    assert read_run(make(tmp_path / "b", steps=9, final=5)).state == "stopped"


def test_a_run_that_has_no_step_yet_is_begun(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/recipe.toml").write_text(RECIPE)
    (tmp_path / "a/.lock").write_text("")
    run = read_run(tmp_path / "a")
    assert (run.state, run.loss, run.rate, run.parameters) == ("begun", None, 0.0, None)


def test_a_run_is_running_as_long_as_its_lock_is_held_and_looking_takes_it_from_nobody(tmp_path):
    make(tmp_path / "a")
    handle = os.open(tmp_path / "a/.lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert read_run(tmp_path / "a").state == "running"
    os.close(handle)
    assert read_run(tmp_path / "a").state == "stopped"
    shared = os.open(tmp_path / "a/.lock", os.O_RDONLY)
    fcntl.flock(shared, fcntl.LOCK_SH)  # as another who looks
    assert read_run(tmp_path / "a").state == "stopped"
    os.close(shared)


@pytest.mark.parametrize("recipe", ["x = [", "train = 3", "\udcff", "[model]\nwidth = " + "[" * 2000])
def test_a_recipe_that_cannot_be_read_is_broken_and_says_why(recipe, tmp_path):
    make(tmp_path / "a")
    (tmp_path / "a/recipe.toml").write_bytes(recipe.encode("utf-8", "surrogateescape"))
    run = read_run(tmp_path / "a")
    assert run.state == "broken" and run.why.startswith("recipe.toml: ")
    assert run.loss == 4.0


def test_a_record_of_nothing_is_broken_and_lines_that_are_no_rows_are_passed_over(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "a/metrics.jsonl").write_text("x\n[]\n3\n")
    assert read_run(tmp_path / "a").why == "metrics.jsonl: none of its 3 lines is a row of a record"
    torn = make(tmp_path / "b")
    with open(torn / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "step": 11, "lo')
    assert (read_run(torn).steps, read_run(torn).skipped) == (10, 0)
    with open(torn / "metrics.jsonl", "ab") as file:
        file.write(b"\n\x00\x00\n" + row("train", 12, loss=None, tokens_per_second=1.0).encode())
        file.write(row("train", 13, loss=1.5, tokens_per_second=100.0).encode())
    run = read_run(torn)
    assert (run.steps, run.loss, run.skipped) == (13, 1.5, 2)


def test_the_size_is_that_of_the_weights_heads_and_a_damaged_head_is_no_size(tmp_path):
    folder = make(tmp_path / "a", final=10)
    head = json.dumps({"__metadata__": {}, "w": {"shape": [3, 4]}, "b": {"shape": []}}).encode()
    weights = folder / "final/model.safetensors"
    weights.write_bytes(struct.pack("<Q", len(head)) + head)
    assert read_run(folder).parameters == 13
    for damaged in (b"", b"123", struct.pack("<Q", 1 << 60), struct.pack("<Q", 3) + b"abc"):
        weights.write_bytes(damaged)
        assert read_run(folder).parameters is None


ODD = [
    {"tokens": int("9" * 400)},
    {"tokens_per_second": 1e-320},
    {"loss": float("nan")},
    {"loss": float("inf")},
    {"step": int("9" * 4000)},
    {"step": -1},
    {"tokens_per_second": float("inf"), "tokens": 10**18},
]


@pytest.mark.parametrize("odd", ODD, ids=[next(iter(one)) for one in ODD])
def test_an_odd_line_of_a_record_hinders_neither_the_table_nor_json_nor_the_page(odd, tmp_path, capsys):
    folder = make(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(json.loads(row("train", 11, loss=3.0, tokens_per_second=50.0)) | odd) + "\n")
    assert main(["runs", str(folder), "--json", "--page", str(tmp_path / "page.html")]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["steps"] in (10, 11) and 0 < told["seconds"] < 100
    assert main(["runs", str(folder)]) == 0
    assert "a: loss " in summary(folder)


def test_heads_of_weights_that_are_odd_are_no_size(tmp_path):
    folder = make(tmp_path / "a", final=10)
    for shape in ("[" * 100_000, "[1e308, 10]", f"[{'9' * 400}]", f"[{2**62}, {2**62}]", "[-1]", "3"):
        head = f'{{"w": {{"shape": {shape}}}}}'.encode()
        (folder / "final/model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
        assert read_run(folder).parameters is None


def test_pipes_in_place_of_files_are_not_waited_for(tmp_path):
    folder = make(tmp_path / "a", final=10)
    for name in ("metrics.jsonl", ".lock", "final/config.json", "final/model.safetensors"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    run = read_run(folder)
    assert (run.state, run.why, run.parameters) == ("broken", "metrics.jsonl: not a file", None)


def test_a_folder_that_may_not_be_read_hides_no_other(tmp_path, monkeypatch):
    make(tmp_path / "runs/a")
    make(tmp_path / "runs/shut/b")
    shut, real = str(tmp_path / "runs/shut"), os.stat

    def stat(path, *args, **kwargs):
        if str(path).startswith(shut):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)  # as for a user who is not root
    assert find_runs([tmp_path / "runs"]) == [tmp_path / "runs/a"]
    assert not is_run(tmp_path / "runs/shut/b")
    assert read_run(tmp_path / "runs/shut/b").started == 0.0


def test_runs_are_found_below_folders_each_once_and_foreign_ones_are_left_out(tmp_path):
    for name in ("runs/a", "runs/sweep/cells/b", "runs/.hidden/c", "runs/1/2/3/4/deep"):
        make(tmp_path / name)
    (tmp_path / "runs/foreign").mkdir()
    (tmp_path / "runs/foreign/recipe.toml").write_text("")
    assert not is_run(tmp_path / "runs/foreign")
    (tmp_path / "runs/link").symlink_to(tmp_path / "runs/a")
    found = find_runs([tmp_path / "runs", tmp_path / "runs/a"])
    assert sorted(path.name for path in found) == ["a", "b"]
    with pytest.raises(ValueError, match="no such folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no run in it"):
        find_runs([tmp_path / "runs/foreign"])
