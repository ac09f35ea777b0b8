"""Trackers follow a run, and whatever becomes of one the run goes on."""

import json
import sys
import threading
import types

import pytest
from tiny_run import tiny_recipe, tiny_source

from atma.train import trackers as module
from atma.train.loop import Stopped, fit
from atma.train.progress import Silent
from atma.train.samples import Sample
from atma.train.tracker_backends import open_trackio
from atma.train.trackers import Followed, Start, followed, openers, track


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self, start: Start) -> None:
        self.start, self.told, self.closed = start, [], None

    def scalars(self, values, step):
        self.told.append((step, dict(values)))

    def text(self, name, text, step):
        self.told.append((step, name, text))

    def flush(self):
        pass

    def close(self, finished):
        self.closed = finished


class Shelf:
    """Opens trackers that keep, and holds them."""

    def __init__(self, kind=Kept) -> None:
        self.kind, self.opened = kind, []

    def __call__(self, start):
        self.opened.append(self.kind(start))
        return self.opened[-1], "its name"


def run(out, opener, **changes):
    with Followed(Silent(), {"fake": opener}, out, {"train.tokens": 1}) as progress:
        return fit(tiny_recipe(**changes), out, tiny_source(), progress=progress, resume=out.exists())


def trained_steps(one):
    return [step for step, values in one.told if "train/loss" in values]


def test_a_tracker_is_told_every_row_and_the_end(tmp_path):
    shelf = Shelf()
    run(tmp_path / "runs/x", shelf)
    (one,) = shelf.opened
    assert one.start[1:] == ("x", {"train.tokens": 1}, 0, None)
    assert trained_steps(one) == list(range(1, 13))
    assert [step for step, values in one.told if "validation/loss" in values] == [3, 6, 9, 12]
    assert one.closed is True
    assert json.loads((tmp_path / "runs/x/trackers.json").read_text()) == {"fake": {"run": "its name", "step": 12}}


def test_a_run_that_goes_on_goes_on_in_the_same_run_of_the_tracker(tmp_path):
    shelf, out, asked = Shelf(), tmp_path / "x", []

    def stop():
        asked.append(1)
        return len(asked) > 6

    with pytest.raises(Stopped), Followed(Silent(), {"fake": shelf}, out, {}) as progress:
        fit(tiny_recipe(), out, tiny_source(), progress=progress, stop=stop)
    run(out, shelf)
    first, second = shelf.opened
    assert first.closed is False and second.closed is True
    assert second.start.known == "its name"
    assert min(step for step, *_ in second.told) == second.start.done + 1


def test_a_tracker_that_comes_later_is_told_what_was_before(tmp_path):
    fit(tiny_recipe(tokens=6 * 64), tmp_path / "x", tiny_source())
    shelf = Shelf()
    run(tmp_path / "x", shelf, tokens=12 * 64)
    assert trained_steps(shelf.opened[0]) == list(range(1, 13))


def test_a_tracker_that_was_left_out_for_a_while_is_told_what_it_lacks_once(tmp_path):
    first, last = Shelf(), Shelf()
    run(tmp_path / "x", first, tokens=4 * 64)
    fit(tiny_recipe(tokens=8 * 64), tmp_path / "x", tiny_source(), resume=True)
    run(tmp_path / "x", last, tokens=12 * 64)
    assert trained_steps(first.opened[0]) == [1, 2, 3, 4]
    assert trained_steps(last.opened[0]) == list(range(5, 13)) and last.opened[0].start.known == "its name"


def test_a_run_that_is_finished_is_told_to_a_tracker_that_did_not_follow_it(tmp_path):
    fit(tiny_recipe(), tmp_path / "x", tiny_source())
    shelf = Shelf()
    run(tmp_path / "x", shelf)
    run(tmp_path / "x", shelf)
    told, nothing_new = shelf.opened
    assert trained_steps(told) == list(range(1, 13)) and told.closed is True
    assert nothing_new.told == [] and nothing_new.start.known == "its name"


def test_a_run_that_stops_early_is_finished_and_one_that_fails_is_not(tmp_path):
    shelf = Shelf()
    run(tmp_path / "x", shelf, evaluate_every=1, early_stopping=2, muon_rate=5.0, adamw_rate=5.0, embedding_rate=5.0)
    (early,) = shelf.opened
    assert early.closed is True and trained_steps(early)[-1] < 12
    with pytest.raises(OSError), Followed(Silent(), {"fake": shelf}, tmp_path, {}) as progress:
        progress.start("x", 12, 12)
        raise OSError(28, "No space left on device")
    assert shelf.opened[1].closed is False


def test_how_far_a_tracker_was_told_is_noted_while_the_run_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "NOTED_SECONDS", -1.0)
    noted = []

    class Asks(Kept):
        def scalars(self, values, step):
            super().scalars(values, step)
            noted.append(module._known(self.start.folder)["fake"])

    run(tmp_path / "x", Shelf(Asks), tokens=2 * 64, evaluate_every=0)
    assert noted == [("its name", 0), ("its name", 0)]
    assert module._known(tmp_path / "x") == {"fake": ("its name", 2)}


def broken(at):
    """A tracker that fails in a method."""

    class Broken(Kept):
        def __getattribute__(self, name):
            if name == at:
                raise OSError(28, "No space left on device")
            return super().__getattribute__(name)

    return Broken


def absent(start):
    raise ModuleNotFoundError("No module named 'fake'")


def unreachable(start):
    raise ConnectionError("no route to host\nafter 3 tries")


def exits(start):
    sys.exit("not logged in")


@pytest.mark.parametrize(
    ("opener", "said"),
    [
        (absent, "No module named 'fake'"),
        (unreachable, "no route to host after 3 tries"),
        (exits, "not logged in"),
        (Shelf(broken("scalars")), "[Errno 28] No space left on device"),
        (Shelf(broken("close")), "[Errno 28] No space left on device"),
    ],
)
def test_a_tracker_that_fails_is_one_line_and_the_run_ends_well(opener, said, tmp_path, capsys):
    assert (run(tmp_path / "x", opener) / "config.json").is_file()
    assert capsys.readouterr().err == f"atma: fake: {said}; the run goes on without it\n"


def test_a_slow_tracker_is_given_up_and_the_run_waits_for_it_no_longer_than_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "CLOSING_SECONDS", 0.2)
    held = threading.Event()

    def slow(start):
        held.wait()
        raise OSError("late")

    run(tmp_path / "x", slow)
    held.set()
    assert capsys.readouterr().err.startswith("atma: fake: did not end within 0 s; what it has not sent yet is lost")


def test_a_tracker_with_too_much_before_it_is_given_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "ROOM", 4)
    held = threading.Event()

    def slow(start):
        held.wait()
        raise OSError("late")

    run(tmp_path / "x", slow)
    held.set()
    assert capsys.readouterr().err == "atma: fake: is too slow: 4 rows wait for it; the run goes on without it\n"


def test_a_tracker_moves_no_bit_of_the_weights(tmp_path):
    from test_loop import same, weights

    plain = fit(tiny_recipe(), tmp_path / "plain", tiny_source())
    assert same(weights(run(tmp_path / "x", Shelf())), weights(plain))


def test_a_text_of_the_model_is_told_and_other_events_are_not(tmp_path):
    kept = Kept(Start(tmp_path, "x", {}, 0, None))
    track(kept, Sample(3, "def", " f()\x1b").row())
    track(kept, {"kind": "event", "step": 3, "event": "resumed"})
    assert kept.told == [(3, "sample/def", "def f()\x1b")]


def test_a_name_that_is_no_tracker_is_refused_and_none_changes_nothing(tmp_path):
    shown = Silent()
    with followed(shown, [], tiny_recipe(), tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="--track comet: no such tracker; known: tensorboard, wandb, mlflow, trackio"):
        followed(shown, ["comet"], tiny_recipe(), tmp_path)


def test_what_a_damaged_list_of_trackers_says_counts_as_nothing(tmp_path):
    for text in (
        "",
        "[]",
        "{",
        '{"fake"',
        '{"fake": "x"}',
        '{"fake": {"run": "x"}}',
        '{"fake": {"run": 1, "step": "a"}}',
    ):
        (tmp_path / module.KNOWN).write_text(text)
        assert module._known(tmp_path) == {}


def test_trackio_is_called_as_its_pages_say(tmp_path, monkeypatch):
    """The package pulls in gradio, so that a stand-in with the arguments that it documents is called."""
    calls = []

    class Run:
        def log(self, metrics: dict, step: int | None = None):
            calls.append(("log", metrics, step))

        def finish(self):
            calls.append(("finish",))

    def init(project, name=None, group=None, space_id=None, config=None, resume="never", settings=None):
        calls.append(("init", project, name, config, resume))
        return Run()

    fake = types.ModuleType("trackio")
    fake.init = init
    fake.__spec__ = types.SimpleNamespace(name="trackio")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    for known in (None, "x"):
        tracker, called = open_trackio(Start(tmp_path, "x", {"a": 1}, 0, known))
        tracker.scalars({"train/loss": 2.0}, 3)
        tracker.text("sample/a", "text", 3)
        tracker.flush()
        tracker.close(True)
        assert called == "x"
    assert calls[:4] == [
        ("init", "atma", "x", {"a": 1}, "never"),
        ("log", {"train/loss": 2.0}, 3),
        ("log", {"sample/a": "text"}, 3),
        ("finish",),
    ]
    assert calls[4][-1] == "allow"


def real(name, out, known=None, done=0):
    """Two steps and a text told to a tracker itself."""
    tracker, called = openers()[name](Start(out, "x", {"train.tokens": 64, "name": "x"}, done, known))
    for step in (done + 1, done + 2):
        tracker.scalars({"train/loss": 1.0 / step, "train/tokens": 64}, step)
    tracker.text("sample/def", "def f():\n  x", done + 2)
    tracker.flush()
    return tracker, called


@pytest.mark.slow
def test_tensorboard_shows_a_run_that_goes_on_while_it_runs(tmp_path):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read():
        events = loading.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        return events

    first, called = real("tensorboard", tmp_path)
    assert [one.step for one in read().Scalars("train/loss")] == [1, 2]  # before it is closed
    first.close(True)
    second, _ = real("tensorboard", tmp_path, called, done=1)
    second.close(True)
    assert [one.step for one in read().Scalars("train/loss")] == [1, 2, 3]
    assert "sample/def/text_summary" in read().Tags()["tensors"]


@pytest.mark.slow
def test_wandb_takes_a_run_offline_and_goes_on_in_it(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, called = real("wandb", tmp_path)
    first.close(True)
    second, again = real("wandb", tmp_path, called, done=1)
    second.close(False)
    assert called == again
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{called}"))) >= 1


@pytest.mark.slow
def test_wandb_without_a_login_says_so(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(type(wandb.api), "api_key", None, raising=False)
    with pytest.raises(ValueError, match="not logged in: `wandb login`, or WANDB_MODE=offline"):
        real("wandb", tmp_path)


@pytest.mark.slow
def test_mlflow_keeps_a_run_in_files_and_goes_on_in_it(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    first, called = real("mlflow", tmp_path)
    first.close(False)
    second, again = real("mlflow", tmp_path, called, done=2)
    second.close(True)
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    assert called == again
    assert [one.step for one in client.get_metric_history(called, "train/loss")] == [1, 2, 3, 4]
    found = client.get_run(called)
    assert found.data.params["train.tokens"] == "64" and found.info.status == "FINISHED"
    assert [one.path for one in client.list_artifacts(called, "samples")] == [
        "samples/00000002-def.txt",
        "samples/00000004-def.txt",
    ]
