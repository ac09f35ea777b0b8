"""What is measured has every row, ratios that agree with the seconds, and nothing at all when a result is wrong."""

import dataclasses

import pytest
import torch

from atma.bench import attention, timing
from atma.bench.available import ours
from atma.bench.machine import Cost, Rates
from atma.bench.measure import bench
from atma.bench.plan import KINDS, Plan
from atma.bench.recurrence import RECURRENCES
from atma.bench.rows import Case, Entry, measure
from atma.bench.table import cases, cells, duration, header, markdown
from atma.device import device_of
from atma.ops import native
from atma.ops.polar import cpu as polar_cpu
from atma.ops.recurrent import cpu as delta_cpu

CPU = torch.device("cpu")
SMALL = Plan(
    lengths=(40,),
    contexts=(9,),
    heads=4,
    key_value_heads=2,
    head_width=8,
    vocabulary=30,
    dtypes=("float32",),
    preset="nano-test",
    backends=("cpu",),
    repeats=1,
    device="cpu",
)
MODES = {"polar": 3, "conv": 2, "loss": 2} | dict.fromkeys(RECURRENCES, 3)


@pytest.fixture(scope="module")
def operations():
    return bench("ops", dataclasses.replace(SMALL, lengths=(1, 40), dtypes=("float32", "bfloat16")))


def test_every_operation_has_a_row_for_each_mode_length_dtype_and_backend(operations):
    mine = [(row.what, row.sizes["length"], row.dtype, row.name) for row in operations.rows if row.ours]
    assert len(mine) == len(set(mine))
    cpu = [row for row in mine if row[3] == "atma cpu"]
    steps = len(RECURRENCES)
    assert len(cpu) == 2 * (2 * sum(MODES.values()) - steps)
    if native.available(torch.bfloat16):
        assert {what for what, *_, name in mine if name == "atma native"} >= {"polar decode", "delta step"}


def test_polar_attention_stands_beside_sdpa_on_the_same_sizes(operations):
    for rows in cases(operations):
        if rows[0].what.startswith("polar"):
            assert {row.name for row in rows if not row.ours} == {"torch SDPA", "torch SDPA, expanded keys"}
    assert any("strictly less" in note for note in operations.notes)


def test_ratios_are_those_of_the_seconds(operations):
    rates = operations.rates
    for rows in cases(operations):
        for row in rows:
            others = [other.seconds for other in rows if not other.ours and other is not row]
            assert row.to_floor == pytest.approx(row.seconds / row.floor)
            assert row.floor == pytest.approx(
                max(row.operations / rates.operations[row.dtype], row.bytes / rates.bytes)
            )
            assert row.to_peer == (pytest.approx(row.seconds / min(others)) if others else None)
            assert row.low <= row.seconds <= row.high


def test_an_absent_peer_is_named_and_skipped(operations):
    told = [note for note in operations.notes if "transformers" in note]
    assert told == ["transformers is not installed, its rows are left out: pip install 'atma-lm[bench]'"]
    assert not any("transformers" in row.name for row in operations.rows)


@pytest.mark.parametrize("kind", ["train", "decode", "prefill"])
def test_models_are_measured_with_their_rates(kind):
    result = bench(kind, dataclasses.replace(SMALL, backends=("cpu", "auto"), dtypes=("float32", "bfloat16")))
    assert [row.name for row in result.rows] == ["atma cpu", "atma auto"] * 2
    for row in result.rows:
        tokens = 1 if kind == "decode" else 40
        assert row.about["tokens_per_second"] == pytest.approx(tokens / row.seconds)
        assert row.about["parameters"] > 100_000
        assert ("overhead" in row.about) == (kind == "decode")
    assert any("transformers is not installed" in note for note in result.notes)


@pytest.mark.skipif(not native.available(torch.float32), reason="needs the compiled kernels")
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_narrow_weights_are_measured_on_the_cpu_where_a_machine_has_a_gpu(kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    plan = dataclasses.replace(SMALL, backends=("auto",), weights=("int8",), device=None)
    assert [row.name for row in bench(kind, plan).rows] == ["atma auto", "atma auto int8"]
    with pytest.raises(ValueError, match="--device cuda: weights in int8 are read on the CPU; leave --device out"):
        bench(kind, dataclasses.replace(plan, device="cuda"))


def off(function):
    """An operation whose first result is off by a hundredth."""

    def wrong(*arguments):
        first, *rest = function(*arguments)
        return first + 1e-2, *rest

    return wrong


@pytest.mark.parametrize(
    ("kind", "module", "name"),
    [
        ("ops", polar_cpu, "statistics"),
        ("ops", delta_cpu, "recurrence"),
        ("decode", polar_cpu, "statistics"),
        ("prefill", delta_cpu, "recurrence"),
        ("train", delta_cpu, "recurrence"),
    ],
)
def test_a_wrong_result_gives_no_figures(kind, module, name, monkeypatch):
    monkeypatch.setattr(module, name, off(getattr(module, name)))
    monkeypatch.setattr(timing, "seconds_of", lambda *_: pytest.fail("timed before every check had passed"))
    with pytest.raises(ValueError, match=r"no figures: .* cpu backend .* off its float64 reference"):
        bench(kind, SMALL)


def test_a_peer_that_computes_something_else_gives_no_figures(monkeypatch):
    monkeypatch.setattr(attention, "_sdpa", lambda q, k, v, start=None: [q * 1.01])
    with pytest.raises(ValueError, match="no figures: torch SDPA"):
        bench("ops", dataclasses.replace(SMALL, operations=("polar",)))


def test_backends_that_refuse_are_noted_and_one_must_remain():
    def probe(name):
        if name != "cpu":
            raise ValueError(f"the {name} kernels take widths of 16 and more, not 8")

    notes = []
    assert ours("polar", "float32", CPU, notes, probe) == ["cpu"]
    assert "the native kernels take widths of 16 and more, not 8" in notes
    assert "the gpu backend is not available here: it computes on a CUDA device, not on cpu" in notes

    def refuse(name):
        raise ValueError(f"the {name} kernels take bfloat16")

    with pytest.raises(ValueError, match="no backend can measure recurrent in float16 on cpu: the cpu kernels take bf"):
        ours("recurrent", "float16", CPU, [], refuse)


def test_things_are_timed_in_turn(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0)
    timing.interleave({name: lambda name=name: order.append(name) for name in "abc"}, 3, CPU)
    assert order == [*"aabbcc", *"abcabcabc"]


def test_a_summary_is_the_median_with_quartiles():
    assert timing.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0, 5)
    assert timing.summary([2.0]) == (2.0, 2.0, 2.0, 1)


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    rates = Rates({"float32": 100.0}, 10.0)
    assert rates.floor(Cost(200, 10), "float32") == (2.0, "operations")
    assert rates.floor(Cost(200, 40), "float32") == (4.0, "bytes")


def test_overhead_is_the_share_of_the_tiny_form(monkeypatch):
    monkeypatch.setattr(timing, "seconds_of", lambda call, *_: call())
    entry = Entry("atma", True, lambda: 4.0, Cost(8, 1), 2, 3, lambda: 1.0)
    (row,) = measure(Case("decode", {}, "float32", [entry]), 2, CPU, Rates({"float32": 4.0}, 1.0))
    assert row.about == {"tokens_per_second": 0.5, "parameters": 3, "product_share": 0.5, "overhead": 0.25}
    assert row.to_peer is None


def test_tables_have_a_cell_for_every_column(operations):
    lines = markdown(operations).splitlines()
    columns = len(header(operations))
    assert all(len(cells(operations, row)) == columns for row in operations.rows)
    assert sum(line.startswith("| ") for line in lines) == len(operations.rows) + 2


def test_durations_are_read_with_three_digits():
    assert [duration(seconds) for seconds in (2.0, 0.0123, 4.56e-5)] == ["2 s", "12.3 ms", "45.6 µs"]


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_told(name):
    with pytest.raises(ValueError, match=f"--device {name}: "):
        device_of(name)


def test_the_command_says_what_differs_from_the_default():
    plan = dataclasses.replace(Plan(), lengths=(8, 16), preset="base", head_width=32)
    assert plan.command("ops") == "atma bench ops --lengths 8 16 --head-width 32 --preset base"
    assert [Plan().command(kind) for kind in KINDS] == [f"atma bench {kind}" for kind in KINDS]
