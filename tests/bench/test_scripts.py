"""The scripts of benchmarks/ that stand on atma.bench: growth with length and width, and the GPU."""

import argparse
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch

from atma.data.prepare import Preparation, prepare
from atma.loading import model_folder

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name):
    """A script as a module, which finds what stands beside it as if it were run."""
    specification = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def growth():
    return script("growth")


@pytest.mark.parametrize("kind", ["train", "prefill", "prefill end", "decode", "evaluate", "evaluate end"])
def test_every_case_has_its_time_its_memory_and_where_the_time_went(kind, growth, monkeypatch):
    monkeypatch.setattr(growth, "END", 16)
    row = growth._case(argparse.Namespace(case=kind, size=(40, 0), preset="nano-test", repeats=1))
    assert row["seconds"] > 0
    assert row["peak"] >= row["before"] > 0
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert row["shares"]["matrix products"] > 0
    assert row["shares"]["attention"] > 0
    assert (row["shares"]["loss"] > 0) == (kind in ("train", "evaluate", "evaluate end"))


def test_widths_keep_the_head_and_divide_the_heads(growth):
    for width in (32, 64, 192, 512):
        config = growth._config("small", width)
        assert config.width == width
        assert config.head_width == 64
        assert config.query_heads == max(1, width // 64)


def test_exponents_are_slopes_over_the_upper_half(growth):
    assert growth.slope([2, 4, 8], [4, 16, 64]) == pytest.approx(2)
    assert growth.slope([2], [4]) is None
    rows = [
        {"kind": "train", "over": "length", "at": n, "seconds": max(4, n) ** 2.0, "peak": 5.0 + n, "before": 5.0}
        for n in (1, 2, 4, 8, 16)
    ]
    (fit,) = growth.exponents(rows)
    assert (fit["from"], fit["to"]) == (4, 16)
    assert (fit["time"], fit["memory"]) == (pytest.approx(2), pytest.approx(1))


def test_growth_prints_a_table_and_writes_a_page(growth, tmp_path, monkeypatch, capsys):
    shares = {"attention": 0.25, "rest": 0.75}
    found = {"seconds": 1.0, "tokens_per_second": 256.0, "peak": 9.0, "before": 8.0, "shares": shares, "width": 64}
    monkeypatch.setattr(growth, "_in_a_process", lambda _, kind, n, width: found | {"kind": kind, "length": n})
    monkeypatch.setattr("sys.argv", ["growth.py", "--longest", "4096", "--whole", "1024", "--out", str(tmp_path)])
    growth.main()
    said = capsys.readouterr().out
    assert "| train | 1,024 | 64 | 1 s |" in said
    assert "| train | 4,096 |" not in said
    assert "| decode | 4,096 |" in said
    assert json.loads((tmp_path / "growth.json").read_text())["exponents"]
    assert "Where the time goes: decode" in (tmp_path / "growth.html").read_text(encoding="utf-8")


def test_the_gpu_script_ends_at_once_without_a_gpu(monkeypatch, capsys):
    gpu = script("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "needs a CUDA device that PyTorch can use; this machine has none" in capsys.readouterr().err


def test_a_part_of_the_gpu_report_that_fails_is_written_down_and_the_next_goes_on(tmp_path, capsys):
    def wrong():
        raise ValueError("no figures: polar is off")

    report = script("gpu").Report(tmp_path, {"GPU": "none"})
    assert not report.part("polar", wrong)
    assert report.part("delta", lambda: ("| table |", {"rows": []}))
    capsys.readouterr()
    assert "FAILED: ValueError: no figures: polar is off" in (tmp_path / "gpu.md").read_text()
    assert [part["held"] for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]] == [False, True]
    assert report.failed == 1


def test_neural_memories_stand_beside_their_systems_and_agree_first(monkeypatch, capsys):
    memories = script("fast_weights")
    options = "--heads 1 --length 40 --lengths 20 40 --trained 20 --rounds 1"
    monkeypatch.setattr("sys.argv", ["fast_weights.py", *options.split()])
    monkeypatch.setattr(memories, "keep_freed_memory", lambda: True)  # of the whole process
    memories.main()
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| T")]
    assert [row[0].strip("| ") for row in rows] == [
        "Titans",
        "Titans",
        "TTT-Linear",
        *["Titans"] * 2,
        *["TTT-Linear"] * 2,
    ]
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)
    assert "titans_pytorch is not installed, its rows are left out: pip install titans-pytorch" in printed


def test_a_memory_that_computes_something_else_is_not_timed(monkeypatch):
    memories = script("fast_weights")
    wrong = memories.ours_titans
    monkeypatch.setattr(
        memories,
        "ours_titans",
        lambda *given, **how: [2 * x for x in wrong(*given)] if not how else wrong(*given, **how),
    )
    with pytest.raises(ValueError, match="no figures: Titans is"):
        memories._check(1, None, None)


def test_the_script_of_memories_on_a_gpu_ends_at_once_without_one(monkeypatch, capsys):
    memories = script("gpu_memories")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_memories.py"])
    assert memories.main() == 2
    assert "needs a CUDA device that PyTorch can use; this machine has none" in capsys.readouterr().err


def test_memories_on_a_gpu_are_checked_and_timed_beside_pytorch(monkeypatch):
    memories = script("gpu_memories")
    monkeypatch.setattr(memories, "BACKENDS", ("native", "cpu"))
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(memories, "CHECKED", 20)
    options = argparse.Namespace(heads=2, rounds=1)
    for name in memories.SYSTEMS:
        memories.check(name, torch.device("cpu"))
        row = memories.measured(name, 2, 40, options, torch.device("cpu"))
        assert row["with backward ms, native"] > 0
        assert memories.line(row).startswith(f"| {name} | 2 | 40 |")


def test_two_checkouts_take_turns_and_a_slower_one_is_told(monkeypatch, capsys):
    regressions, source = script("regressions"), str(FOLDER.parent / "src")
    seconds = {0: iter([1.0, 1.2, 1.1] * 2), 1: iter([2.0, 1.1, 1.2] * 2)}

    class Child:
        def __init__(self, source, variable):
            self.stdout, self.side = io.StringIO("reads writes\n"), len(made)
            made.append(self)

    made = []
    monkeypatch.setattr(regressions, "start", Child)
    monkeypatch.setattr(regressions, "ask", lambda child, name: next(seconds[child.side]))
    for most, status in (("1.05", 1), ("1.15", 0)):
        made.clear()
        seconds[0], seconds[1] = iter([1.0, 1.2, 1.1] * 2), iter([2.0, 1.1, 1.2] * 2)
        monkeypatch.setattr("sys.argv", ["regressions.py", source, source, "--turns", "3", "--most", most])
        assert regressions.main() == status
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:3]] == ["1.09", "1.09"]


def test_what_is_timed_of_a_checkout_runs():
    measures = script("regressions").prepared()
    assert len(measures) == 4
    measures["write_64_tokens"]()


def test_every_width_of_weights_has_its_speed_beside_bfloat16(monkeypatch, capsys):
    narrow = script("narrow")
    words = ["speed", "--presets", "nano-test", "--tokens", "16", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", ["narrow.py", *words])
    narrow.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        f"nano-test {kind}, {side}" for kind in ("decode", "prefill") for side in narrow.SIDES
    ]
    assert all("× bfloat16 1.00" in line for line in lines if "bfloat16:" in line)


def test_the_other_ways_to_round_weights_have_their_numbers_in_every_group():
    ways = script("narrow_rounding").WAYS
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 8, generator=generator) @ torch.randn(8, 64, generator=generator)  # go together
    inputs += 0.1 * torch.randn(512, 64, generator=generator)
    weight = torch.randn(6, 64, generator=generator)
    products = (inputs.T @ inputs).double()
    made = {name: way.round(weight, products) for name, way in ways.items()}
    for name, one in made.items():
        groups = one.reshape(-1, 16 if name == "int4-of-16" else 32)
        assert all(len(group.unique()) <= 16 for group in groups), name
        assert (one - weight).norm() < 0.2 * weight.norm(), name
    off = {name: float(((one - weight) @ inputs.T).norm()) for name, one in made.items()}
    assert off["int4-gptq"] < 0.5 * off["int4-weights"]
    assert (made["int4-weights"] - weight).norm() < (made["Q4_0"] - weight).norm()


def test_quality_tells_each_side_beside_the_first(tmp_path, monkeypatch, capsys):
    narrow, texts = script("narrow"), tmp_path / "texts"
    texts.mkdir()
    for i in range(12):
        text = "".join(f"def f{i}_{line}(x):\n    return x + {line * i}\n" for line in range(100))
        (texts / f"{i}.py").write_text(text)
    prepare(texts, tmp_path / "data", Preparation(tokenizer=str(model_folder("nano")), validation_share=0.5))
    sides, data = ["float32", "int4-gptq"], str(tmp_path / "data")
    words = ["quality", "--times", "4", "--documents", "2", "--data", data, "--sides", *sides]
    monkeypatch.setattr("sys.argv", ["narrow.py", *words])
    narrow.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == sides
    assert "weights off by 0.00%; 1×: " in lines[0] and "+0.000% (+0.000 to +0.000)" in lines[0]
    assert "weights off by 0.00%" not in lines[1]
