"""Measuring this machine: what is measured, what is made of it, and what is said where it fails. No time is checked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_plan import costs, tiny

from atma.plan import here
from atma.plan.paces import Measured, Pieces
from atma.plan.pieces import Settings, measure, smallest
from atma.train.parallel import Ranks


def pieces(**changes) -> Pieces:
    layers = {"local": {64: 1e-6}, "rope": {64: 3e-6, 32: 2e-6}}
    own = {"layers": layers, "ends": 1e-6, "update": 0.5, "bytes": 1e6, "program": 7.0, "room": 1e9}
    return Pieces(**(own | {"processes": 1, "told": "said"} | changes))


def test_a_pass_is_its_layers_and_its_ends():
    pace = Measured(costs(), pieces())
    assert pace.compute(100, 64, False) == pytest.approx(100 * (2 * 1e-6 + 2 * 3e-6 + 1e-6))
    assert pace.compute(100, 64, True) == pytest.approx(100 * (4 / 3 * 8e-6 + 1e-6))
    assert pace.update(0.5) == 0.25 and pace.program == 7


def test_a_layer_whose_work_grows_goes_on_as_it_did_and_another_stays():
    pace = Measured(costs(), pieces())
    assert pace._layer("rope", 128) == pytest.approx(3e-6 + 2e-6)
    assert pace._layer("local", 128) == 1e-6


def test_pieces_are_cut_to_what_is_measured_in_seconds():
    whole = here._settings(costs(), 2, 5, 0)
    assert whole == Settings(4, (64,), 5, 96, 0)
    long = costs()._replace(recipe=tiny(length=1 << 20, batch_tokens=1 << 21))
    assert here._settings(long, 1, 5, 0).lengths == (2048, 1024)
    large = costs()
    layers = {name: one._replace(dense=10**9) for name, one in large.layers.items()}
    assert here._settings(large._replace(layers=layers), 1, 5, 0).lengths[0] <= 32


def test_one_process_measures_every_layer_the_ends_and_the_update():
    found = measure(tiny(), Settings(1, (32, 16), 1, 96, 1), Ranks())
    assert set(found["layers"]) == {"local", "rope"} and set(found["layers"]["rope"]) == {32, 16}
    assert found["bytes"] == 0 < found["resident"]


def test_the_smallest_model_has_a_layer_of_each_name():
    assert smallest(tiny()).model.layers == ("local", "rope")


def test_the_slowest_process_counts():
    one = {"layers": {name: {"64": 1.0} for name in ("local", "rope")}, "ends": 1.0, "update": 1.0, "bytes": 5.0}
    one |= {"resident": 1e9, "threads": 1}
    other = one | {"ends": 2.0, "bytes": 3.0}
    made = here._pieces(costs(), Settings(1, (64,), 1, 96, 1), [one, other])
    assert (made.ends, made.bytes, made.processes) == (2.0, 3.0, 2)
    assert 0.9e9 < made.program < 1e9 and "2 processes at once" in made.told


def test_a_process_that_fails_is_told_by_its_last_line(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho first\necho no such kernel\nexit 3\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(here.sys, "executable", str(script))
    with pytest.raises(ValueError, match="measuring this machine failed: no such kernel; name a --device instead"):
        here._run(tmp_path, tiny(), Settings(1, (64,), 1, 96, 1), 1)


@pytest.mark.slow
def test_memory_that_is_predicted_is_that_of_real_runs_of_one_and_two_processes(tmp_path):
    script, out = Path(__file__).parents[2] / "benchmarks" / "plan.py", tmp_path / "plan.json"
    options = ["--sizes", "nano-test", "--repeats", "1", "--rounds", "1", "--steps", "4", "--clock", "processor"]
    told = subprocess.run([sys.executable, script, *options, "--out", out], capture_output=True, text=True, check=True)
    assert told.stdout.count("nano-test") == 2
    for row in json.loads(out.read_text(encoding="utf-8")):
        assert row["turns"][0]["predicted_peak"] == pytest.approx(row["turns"][0]["peak"], rel=0.1)
        assert row["turns"][0]["predicted"] > 0
