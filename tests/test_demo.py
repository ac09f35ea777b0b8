"""The demonstration on a toy: tiny models, tiny texts, and clocks of the tests' own."""

import itertools
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from atma.config import DataConfig, ModelConfig, Recipe, TrainConfig, from_dict, preset, to_dict
from atma.data.prepare import Preparation, prepare
from atma.demo import Contender, Demo, Pace, Plan, demo
from atma.demo.pace import Enough, Stage, ending_on_interrupt, lengths_in, steps_in
from atma.demo.recall import text_of
from atma.demo.training import learners, replanned, train_together
from atma.train import read_record, train
from atma.train.schedule import rate_multiplier

WORDS = [f"def name_{i}(value):\n    return value * {i}\n" for i in range(400)]


@pytest.fixture(autouse=True)
def _own_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Plan:
    """A source of a few texts, and a "packaged" pair trained on it for two steps."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "source").mkdir()
    for i in range(24):
        (folder / "source" / f"{i}.txt").write_text(f"# file {i}\n" + "".join(WORDS[i % 7 : 60 + 3 * i]))
    prepare(folder / "source", folder / "text", Preparation("bpe", 272))
    for name, core in (("nano", "polar"), ("nano-rope", "rope")):
        train(tiny(name, core, folder / "text"), folder / "runs" / name)
        (folder / "runs" / name / "final").rename(folder / name)
    control = Contender(str(folder / "nano-rope"), "RoPE control", "A caveat.")
    stretched = replace(control, caveat="Stretched.", stretch="yarn")
    three = (Contender(str(folder / "nano"), "ATMA"), control, stretched)
    return Plan(three, str(folder / "source"), 272, doublings=2, sizes=(2, 2), most_steps=4)


def tiny(name: str, core: str, text: Path) -> Recipe:
    model = from_dict(ModelConfig, to_dict(preset("nano-test")) | {"core": core, "vocab_size": 272, "depth": 3})
    data = DataConfig(str(text), recall_share=0.3)
    return Recipe(name, model, data, TrainConfig(length=128, batch_tokens=512, tokens=1024, evaluate_every=0))


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that goes on by so many seconds whenever somebody looks."""
    ticks = itertools.count()
    return lambda: seconds * next(ticks)


def test_the_demo_recalls_trains_measures_and_reports_and_can_be_run_again(toy: Plan, tmp_path: Path, capsys):
    path = demo(tmp_path / "demo", 1.0, plan=toy, threads=1, pace=Pace(60, ticking(0)))
    text, said = path.read_text(), " ".join(capsys.readouterr().out.split())
    assert path == tmp_path / "demo" / "report.html"
    for name in ("ATMA", "RoPE control", "nano", "nano-rope", "nano-rope with YaRN"):
        assert f'<th scope="col">{name}</th>' in text
    assert len(re.findall(r"at 4× its training length: ", text)) == 5
    assert "Needle recall" in text
    assert "A caveat." in text
    assert "Cut to end in time" not in text
    assert said.index("recall: a fact is told") < said.index("preparing") < said.index("training 2 models side by side")
    assert re.search(r"told “The access code for record \d+ is \d{5}”, asked \d+ tokens later", said)
    assert "side by side on the same 2,048 tokens each" in said

    demo(tmp_path / "demo", 1.0, seeds=2, plan=toy, threads=1, pace=Pace(60, ticking(0)))
    assert "its hashes hold" in " ".join(capsys.readouterr().out.split())
    assert "ATMA, seed 1" in path.read_text()


def test_on_a_slow_machine_the_demo_cuts_says_what_and_still_reports(toy: Plan, tmp_path: Path, capsys):
    pace = Pace(60, ticking(0.2))
    text = demo(tmp_path / "demo", 1.0, plan=replace(toy, sizes=(30, 30), most_steps=1000), threads=1, pace=pace)
    page, said = text.read_text(), " ".join(capsys.readouterr().out.split())
    assert pace.cuts
    assert "Cut to end in time" in page
    for cut in pace.cuts:
        assert f"Cut: {cut}" in said
    assert pace.gone < 66


def test_ctrl_c_ends_with_a_report_of_what_there_is(toy: Plan, tmp_path: Path, capsys):
    looks = itertools.count()

    def now() -> float:
        if next(looks) == 40:
            os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    text = demo(tmp_path / "demo", 1.0, plan=toy, threads=1, pace=Pace(60, now)).read_text()
    assert "Ctrl-C ended the demonstration early" in text
    assert "ending with what there is" in capsys.readouterr().out


def test_a_second_ctrl_c_interrupts():
    pace = Pace(60, lambda: 0.0)
    with pytest.raises(KeyboardInterrupt), ending_on_interrupt(pace, lambda _: None):
        os.kill(os.getpid(), signal.SIGINT)
        assert pace.stopped
        os.kill(os.getpid(), signal.SIGINT)


def test_damaged_text_is_said_to_be_and_prepared_again(toy: Plan, tmp_path: Path, capsys):
    run = Demo(tmp_path, toy, Pace(60), 1, [], console=Console(width=500))
    whole = run.corpus("text", "bytes")
    (tmp_path / "text" / "validation_000000.bin").write_bytes(b"damaged")
    again = run.corpus("text", "bytes")
    said = capsys.readouterr().out
    assert "validation_000000.bin" in said
    assert said.count("preparing") == 2
    assert again.hash == whole.hash


def test_without_a_packaged_model_the_demo_says_so_before_anything_else(tmp_path: Path):
    with pytest.raises(ValueError, match="no-such-model"):
        demo(tmp_path / "demo", plan=Plan((Contender("no-such-model", "nor this"),)))
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(("minutes", "seeds"), [(0, 1), (-1, 1), (float("nan"), 1), (float("inf"), 1), (1, 0)])
def test_a_demo_without_time_or_seeds_is_refused(minutes: float, seeds: int, tmp_path: Path):
    with pytest.raises(ValueError, match="needs time and a seed"):
        demo(tmp_path, minutes, seeds)


def test_facts_are_hidden_in_a_text_of_the_user_s(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("All is quiet.")
    assert text_of(tmp_path / "mine.txt") == ("All is quiet.", "mine.txt")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"blank\.txt: no text"):
        text_of(tmp_path / "blank.txt")


class TestPace:
    def test_a_stage_has_its_share_of_what_is_left(self):
        clock = iter([0.0, 40.0, 40.0, 60.0, 95.0])
        pace = Pace(100, lambda: next(clock))
        stage = pace.stage(0.5)
        assert stage.end == 70
        assert stage.left == 10
        assert stage.left == 0

    def test_a_stage_that_is_over_or_stopped_ends_what_goes_on_in_it(self):
        pace = Pace(100, lambda: 0.0)
        stage = Stage(pace, 1.0)
        stage.tick()
        pace.stopped = True
        with pytest.raises(Enough):
            stage.tick()
        assert not stage.fits(0.0)

    @pytest.mark.parametrize(("seconds", "most", "steps"), [(10, 100, 5), (1, 100, 0), (1000, 100, 100), (0, 3, 0)])
    def test_as_many_steps_as_fit_at_the_mean_of_the_recent_ones(self, seconds, most, steps):
        assert steps_in(seconds, [1.0, 3.0], most) == steps

    @pytest.mark.parametrize(("seconds", "longest"), [(1000, 1024), (22, 1024), (21, 512), (0, 512)])
    def test_the_longest_texts_go_first_when_time_is_short(self, seconds, longest):
        assert lengths_in(seconds, {256: 1.0, 512: 2.0, 1024: 4.0}, 2)[-1] == longest


class TestSchedule:
    TRAIN = TrainConfig(batch_tokens=1024, length=256, tokens=100 * 1024)

    @pytest.mark.parametrize("done", [0, 10, 29, 30, 50, 90])
    @pytest.mark.parametrize("left", [1, 3, 9])
    def test_a_shorter_plan_goes_on_without_a_jump_and_falls_to_zero(self, done: int, left: int):
        again = replanned(self.TRAIN, done, done + left)
        rates = [rate_multiplier(step, again) for step in range(done, done + left)]
        if done > 2:
            assert rates[0] == pytest.approx(rate_multiplier(done, self.TRAIN))
        assert rates == sorted(rates, reverse=True) or done == 0
        assert again.steps == done + left
        assert rate_multiplier(done + left, again) == 0.0

    def test_planning_again_and_again_never_raises_the_rate_once_it_falls(self):
        train, rates = self.TRAIN, []
        for done in range(60):
            train = replanned(train, done, 100 - done // 2)
            rates.append(rate_multiplier(done, train))
        falling = rates[35:]
        assert falling == sorted(falling, reverse=True)

    def test_a_machine_that_becomes_slower_makes_fewer_steps_and_ends_in_time(self, toy: Plan, tmp_path: Path):
        prepare(toy.source, tmp_path / "text", Preparation("bpe", 272))
        speed, gone = [1.0], [0.0]

        def now() -> float:
            gone[0] += speed[0]
            return gone[0]

        recipes = [replace(tiny(name, "polar", tmp_path / "text"), name=name) for name in ("one", "two")]
        group = learners(recipes, 1, tmp_path)
        pace = Pace(10_000, now)

        def advance(_what: str, done: int, _total: int) -> None:
            speed[0] = 3.0 if done >= 4 else 1.0

        stage = Stage(pace, gone[0] + 400)
        trained, schedule = train_together(group, stage, 1000, advance)
        assert 4 < trained.steps < trained.planned_steps
        assert schedule.tokens == trained.steps * 512
        assert gone[0] < stage.end + 60
        assert [one.done for one in group] == [trained.steps] * 2
        rows = [row for row in read_record(tmp_path / "one-0") if row["kind"] == "train"]
        assert rows[-1]["rate"] < 0.5
