"""The demonstration on a toy: tiny models, tiny texts, seconds."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from atma.config import DataConfig, ModelConfig, Recipe, TrainConfig, from_dict, preset, to_dict
from atma.data.prepare import Preparation, prepare
from atma.demo import Demo, Plan, demo, shortened, together
from atma.train import train

WORDS = [f"def name_{i}(value):\n    return value * {i}\n" for i in range(400)]


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
    pair = (str(folder / "nano"), str(folder / "nano-rope"))
    return Plan(str(folder / "source"), 272, pair, doublings=2, sizes=(2, 2))


def tiny(name: str, core: str, text: Path) -> Recipe:
    model = from_dict(ModelConfig, to_dict(preset("nano-test")) | {"core": core, "vocab_size": 272, "depth": 3})
    data = DataConfig(str(text), recall_share=0.3)
    return Recipe(name, model, data, TrainConfig(length=128, batch_tokens=512, tokens=1024, evaluate_every=0))


def test_the_demo_trains_measures_and_reports_and_can_be_run_again(toy: Plan, tmp_path: Path, capsys):
    path = demo(tmp_path / "demo", minutes=0.02, plan=toy)
    text = path.read_text()
    assert path == tmp_path / "demo" / "report.html"
    for name in ("ATMA", "RoPE control", "nano", "nano-rope"):
        assert f'<th scope="col">{name}</th>' in text
    assert len(re.findall(r"at 4× its training length", text)) == 4
    assert "Needle recall" in text
    said = " ".join(capsys.readouterr().out.split())
    assert "preparing" in said
    assert re.search(r"2 trainings allow [\d,]+ tokens, the same for both models", said)

    demo(tmp_path / "demo", minutes=0.02, seeds=2, plan=toy)
    assert "its hashes hold" in " ".join(capsys.readouterr().out.split())
    assert "ATMA, seed 1" in path.read_text()


def test_damaged_text_is_said_to_be_and_prepared_again(toy: Plan, tmp_path: Path, capsys):
    run = Demo(tmp_path, toy, 1.0, 1, Console(width=500))
    whole = run.corpus("text", "bytes")
    (tmp_path / "text" / "validation_000000.bin").write_bytes(b"damaged")
    again = run.corpus("text", "bytes")
    said = capsys.readouterr().out
    assert "validation_000000.bin" in said
    assert said.count("preparing") == 2
    assert again.hash == whole.hash


def test_without_the_packaged_pair_the_demo_says_so_before_anything_else(tmp_path: Path):
    with pytest.raises(ValueError, match="no-such-model"):
        demo(tmp_path / "demo", plan=Plan(packaged=("no-such-model", "nor-this")))
    assert not (tmp_path / "demo").exists()


def test_both_models_of_a_pair_get_the_same_tokens_in_whole_steps():
    atma_recipe, control = tiny("a", "polar", Path("x")), tiny("b", "rope", Path("x"))
    tokens = 10.0 * together([1000.0, 3000.0])
    assert tokens == pytest.approx(7500)
    steps = {shortened(recipe, "n", tokens, 0).train.tokens for recipe in (atma_recipe, control)}
    assert steps == {7168}


@pytest.mark.parametrize(("minutes", "seeds"), [(0, 1), (-1, 1), (float("nan"), 1), (float("inf"), 1), (1, 0)])
def test_a_demo_without_time_or_seeds_is_refused(minutes: float, seeds: int, tmp_path: Path):
    with pytest.raises(ValueError, match="needs time and a seed"):
        demo(tmp_path, minutes, seeds)
