"""Workers on cells: results, going on after a stop or a death, errors, takeovers, and the controller under SIGKILL."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atma.strict import toml_value
from atma.sweep.cell import run_cell, run_folder
from atma.sweep.ledger import Ledger, counts
from atma.sweep.task import Claim, Watch
from atma.sweep.worker import Worker
from tests.sweep.conftest import TINY, tiny_sweep

TIMED = ("train_seconds", "train_tokens_per_second")


def measured(result):
    return {key: value for key, value in result["metrics"].items() if key not in TIMED}


def worker(sweep, folder, run=run_cell):
    return Worker(sweep, Ledger.create(folder, sweep), "cpu", None, lambda text: None, run)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A sweep of two cells that nothing disturbed, and its folder."""
    sweep, folder = tiny_sweep(corpus), tmp_path_factory.mktemp("whole") / "sweep"
    assert worker(sweep, folder).go() == 2
    return sweep, folder


def write_recipe(path: Path, corpus: Path, table: str) -> Path:
    tables = TINY | {"data": {"path": str(corpus)}}
    sections = [
        "\n".join([f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in keys.items())])
        for name, keys in tables.items()
    ]
    path.write_text("\n".join([*sections, "[sweep]", table]))
    return path


def test_a_result_tells_all_that_was_agreed_on(whole):
    sweep, folder = whole
    for cell, result in zip(sweep.cells, Ledger.open(folder).results(), strict=True):
        assert result["cell"] == cell.id
        assert result["factors"] == cell.factors == {"attention": cell.recipe.model.core}
        assert result["seed"] == 0
        assert result["config"]["model"]["core"] == cell.recipe.model.core
        assert result["provenance"]["data_hash"]
        assert result["provenance"]["worker"]["pid"] == os.getpid()
        assert result["seconds"] >= result["metrics"]["train_seconds"] > 0
        rows = {(row["kind"], row.get("length")): row for row in result["rows"]}
        for length in (32, 64):
            assert result["metrics"][f"clean_nll_{length}"] == rows["nested", length]["loss"]
            assert result["metrics"][f"junk_nll_{length}"] == rows["junk", length]["loss"]
        assert {"final_val_loss_nats", "train_tokens_per_second", "params"} <= result["metrics"].keys()


def test_finished_cells_keep_their_model_and_nothing_else_is_left(whole):
    sweep, folder = whole
    for cell in sweep.cells:
        home = Ledger.open(folder).task(cell.id).folder
        assert sorted(path.name for path in home.iterdir()) == ["claims", "result.json", "run-000001"]
        assert (home / "run-000001" / "final" / "model.safetensors").is_file()
        assert not (home / "run-000001" / "checkpoints").exists()
    assert not list(folder.rglob(".new-*"))


def test_a_finished_sweep_has_nothing_to_do_and_a_longer_one_only_what_is_new(whole, corpus, tmp_path):
    sweep, folder = whole[0], tmp_path / "s"
    shutil.copytree(whole[1], folder)
    assert worker(sweep, folder).go() == 0
    ran = []

    def note(cell, claim, *rest):
        ran.append(cell.label)
        return {"seconds": 0.0}

    levels = {"field": "model.core", "values": ["nope", "rope", "polar"]}
    longer = tiny_sweep(corpus, {"factors": {"attention": levels}})
    assert worker(longer, folder, note).go() == 1
    assert ran == ["attention=nope seed=0"]


def test_a_stopped_cell_goes_on_from_its_checkpoint_and_ends_with_the_same_numbers(whole, corpus, tmp_path):
    sweep, folder = whole
    first = worker(sweep, tmp_path / "s")

    def stop_at_step_five(cell, claim, device, stop, told):
        def count(stage, done, of):
            told(stage, done, of)
            if (stage, done) == ("training", 5):
                os.kill(os.getpid(), signal.SIGTERM)

        return run_cell(cell, claim, device, stop, count)

    first.run = stop_at_step_five
    assert first.go() == 0
    assert first.why == "SIGTERM"
    cell = sweep.cells[0]
    task = first.ledger.task(cell.id)
    assert [attempt.end["how"] for attempt in task.attempts()] == ["released"]
    assert sorted(path.name for path in (run_folder(task.folder, 1) / "checkpoints").iterdir())[-1] == "step-00000005"
    assert worker(sweep, tmp_path / "s").go() == 2
    resumed = task.result()
    assert resumed["provenance"]["resumed"]
    assert resumed["provenance"]["attempt"] == 2
    undisturbed = Ledger.open(folder).task(cell.id).result()
    assert measured(resumed) == measured(undisturbed)
    assert resumed["provenance"]["weights_sha256"] == undisturbed["provenance"]["weights_sha256"]


def test_a_cell_that_fails_is_marked_and_the_others_go_on(corpus, tmp_path):
    factors = {"rate": {"good": {}, "bad": {"data.path": str(corpus / "not-there")}}}
    sweep = tiny_sweep(corpus, {"factors": factors, "attempts": 2})
    one = worker(sweep, tmp_path / "s")
    assert one.go() == 1
    good, bad = sweep.cells
    assert one.ledger.task(good.id).result() is not None
    failure = one.ledger.task(bad.id).failure()
    assert failure["attempts"] == 2
    assert "not-there" in failure["error"]
    assert counts(one.ledger.standings()) == {"done": 1, "failed": 1}
    assert one.ledger.retry() == 1
    assert counts(one.ledger.standings()) == {"done": 1, "waiting": 1}


def levels(count: int) -> dict:
    """A sweep's table of `count` cells."""
    return {"factors": {"train.clip": [1.0 + number for number in range(count)]}}


def failing(error: Exception, bad=lambda cell: True):
    """What fails instead of training, and otherwise ends at once."""

    def run(cell, claim, *rest):
        if bad(cell):
            raise error
        return {"cell": cell.id, "seconds": 0.0}

    return run


def ends(one: Worker) -> list[str | None]:
    """How each attempt ended that this worker made, in the order of the cells."""
    tasks = [one.ledger.task(cell.id) for cell in one.sweep.cells]
    return [attempt.end.get("how") for task in tasks for attempt in task.attempts()]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_sick_gpu_or_disk_ends_the_worker_and_gives_up_no_cell(error, corpus, tmp_path):
    sweep = tiny_sweep(corpus, levels(6))
    for number in range(1, 6):
        one = worker(sweep, tmp_path / "s", failing(error))
        with pytest.raises(ValueError, match="the machine may be at fault"):
            one.go()
        assert ends(one) == ["died"] * number, "each time another cell, and once"
    assert not one.ledger.failures()
    assert worker(sweep, tmp_path / "s", failing(error, lambda cell: False)).go() == 6


def test_a_cell_that_kills_every_process_is_given_up_as_one_whose_workers_died(corpus, tmp_path):
    sweep = tiny_sweep(corpus, levels(2) | {"deaths": 2})
    bad = sweep.cells[0].id
    run = failing(RuntimeError("CUDA error: device-side assert triggered"), lambda cell: cell.id == bad)
    for _ in range(2):
        one = worker(sweep, tmp_path / "s", run)
        with pytest.raises(ValueError, match=bad):
            one.go()
    assert worker(sweep, tmp_path / "s", run).go() == 0
    assert one.ledger.task(sweep.cells[1].id).result() is not None, "the others are done before it is tried again"
    [(_, failure)] = one.ledger.failures()
    assert failure["error"] == "its worker died 2 times (RuntimeError: CUDA error: device-side assert triggered)"


def test_three_new_cells_that_fail_one_after_another_end_the_worker(corpus, tmp_path):
    one = worker(tiny_sweep(corpus, levels(6)), tmp_path / "s", failing(RuntimeError("no idea")))
    with pytest.raises(ValueError, match="3 cells failed one after another: no idea"):
        one.go()
    assert ends(one) == ["failed"] * 3
    assert not one.ledger.failures()


def test_bad_cells_are_given_up_and_the_good_ones_done_first(corpus, tmp_path):
    sweep = tiny_sweep(corpus, levels(8))
    bad = {cell.id for cell in sweep.cells[:2]}
    ran = []

    def run(cell, *rest):
        ran.append(cell.id)
        return failing(RuntimeError("a bad level"), lambda cell: cell.id in bad)(cell, *rest)

    one = worker(sweep, tmp_path / "s", run)
    assert one.go() == 6
    assert counts(one.ledger.standings()) == {"done": 6, "failed": 2}
    assert {ran.index(cell.id) for cell in sweep.cells} == set(range(8)), "each is tried before any is tried again"
    assert [failure["attempts"] for _, failure in one.ledger.failures()] == [3, 3]


def test_a_result_that_is_no_json_is_the_cells_error(corpus, tmp_path):
    sweep = tiny_sweep(corpus, levels(1) | {"attempts": 1})
    one = worker(sweep, tmp_path / "s", lambda *_: {"seconds": 0.0, "loss": float("nan")})
    assert one.go() == 0
    assert "not JSON compliant" in one.ledger.failures()[0][1]["error"]


def test_the_model_of_the_attempt_that_was_first_stays_whoever_tidies_up(corpus, tmp_path):
    def trained(cell, claim, *rest):
        final = run_folder(claim.task.folder, claim.number) / "final"
        (final.parent / "checkpoints").mkdir(parents=True)
        final.mkdir()
        return {"cell": cell.id, "seconds": 0.0, "provenance": {"attempt": claim.number}}

    def overtaken(cell, claim, *rest):
        assert claim.task.publish(trained(cell, Claim(claim.task, claim.number + 1)))
        return trained(cell, claim)

    one = worker(tiny_sweep(corpus, levels(1)), tmp_path / "s", overtaken)
    assert one.go() == 0
    task = one.ledger.task(one.sweep.cells[0].id)
    assert [path.name for path in task.folder.glob("run-*")] == ["run-000002"]
    assert [path.name for path in run_folder(task.folder, 2).iterdir()] == ["final"]


def test_a_worker_taken_for_dead_stops_and_writes_nowhere_but_in_its_own_folder(whole, corpus, tmp_path):
    sweep, _ = whole
    slow = worker(sweep, tmp_path / "s")
    slow.ledger.limits = type(slow.ledger.limits)(lease=0.3)
    cell, seen = sweep.cells[0], []

    def overtaken(cell, claim, device, stop, told):
        if not seen:
            files = claim.task._path(claim.number + 1)
            files.write_text(json.dumps({"machine": "another", "host": "far", "pid": 1}))
            deadline = time.monotonic() + 300
            while not stop():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            seen.append(cell.id)
            slow.why = "the test has seen enough"
        return run_cell(cell, claim, device, stop, told)

    slow.run = overtaken
    assert slow.go() == 0
    assert seen == [cell.id]
    task = slow.ledger.task(cell.id)
    first, second = task.attempts()
    assert (first.end["how"], first.end["why"]) == ("released", "another worker took over")
    assert second.end == {}
    assert [path.name for path in task.folder.glob("run-*")] == ["run-000001"]


def test_other_data_under_the_same_name_is_refused(whole, corpus, tmp_path):
    ledger = Ledger.create(tmp_path / "s", whole[0])
    ledger.require_data("data/x", "aaaa")
    ledger.require_data("data/x", "aaaa")
    ledger.require_data("data/y", "bbbb")
    with pytest.raises(ValueError, match="data/x: other data"):
        ledger.require_data("data/x", "bbbb")


def test_a_folder_of_something_else_is_refused(whole, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty and not a sweep"):
        Ledger.create(tmp_path, whole[0])
    with pytest.raises(ValueError, match="no sweep here"):
        Ledger.open(tmp_path)


def test_a_worker_whose_heart_stopped_is_stale_by_the_clock_of_the_disk(whole, tmp_path):
    ledger = Ledger.create(tmp_path / "s", whole[0])
    cell = whole[0].cells[0].id
    claim = ledger.task(cell).claim(Watch())
    assert counts(ledger.standings()) == {"running": 1, "waiting": 1}
    beat = ledger.task(cell).beat_path(claim.number)
    os.utime(beat, (time.time() - 2 * ledger.limits.lease,) * 2)
    assert counts(ledger.standings()) == {"stale": 1, "waiting": 1}


@pytest.mark.slow
def test_a_controller_and_its_workers_survive_sigkill_and_every_cell_is_done_once(whole, corpus, tmp_path):
    """A short form of benchmarks/sweep_kills.py: a worker, then the controller, then to the end."""
    table = "lease = 3.0\nfactors.attention = { field = 'model.core', values = ['polar', 'rope'] }"
    recipe = write_recipe(tmp_path / "r.toml", corpus, table)
    line = [sys.executable, "-m", "atma", "sweep", "run", str(recipe), "--out", str(tmp_path / "s")]
    line += ["--workers", "2", "--threads", "1", "--device", "cpu"]
    controller = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    cells = tmp_path / "s" / "cells"
    wait_for(lambda: list(cells.glob("*/claims/*.beat.json")), controller)
    workers = Path(f"/proc/{controller.pid}/task/{controller.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    wait_for(lambda: len(list(cells.glob("*/claims/*.beat.json"))) > 1, controller)
    controller.kill()
    controller.wait()
    finished = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    ledger = Ledger.open(tmp_path / "s")
    assert counts(ledger.standings()) == {"done": 2}
    assert sorted(path.name for path in cells.iterdir()) == sorted(ledger.cells)
    for result, wanted in zip(ledger.results(), Ledger.open(whole[1]).results(), strict=True):
        assert measured(result) == measured(wanted)
        assert result["provenance"]["weights_sha256"] == wanted["provenance"]["weights_sha256"]


def wait_for(happened, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
