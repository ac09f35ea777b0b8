"""`atma plan` on the command line: its tables, its file and its refusals."""

import json

import pytest
from tiny_plan import tiny

from atma.cli import main
from atma.config import dump_toml
from atma.plan import DEVICES, device_named


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(dump_toml(tiny()), encoding="utf-8")
    return str(path)


def test_a_plan_is_tables_and_rows(recipe, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["plan", recipe, "--gpus", "4", "--device", "h100", "--mfu", "0.25", "--json", str(out)]) == 0
    told = capsys.readouterr().out
    for words in (
        "parameters",
        "mixers: rope",
        "memory of a rank",
        "4 × 1 × 1",
        "sent by a rank",
        "25% of that peak",
    ):
        assert words in told
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert rows[0]["gpus"] == 4 and sum(row["kind"] == "mesh" for row in rows) == 12
    assert all(row["text"] in told for row in rows if row["kind"] == "assumption")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "h10"], "--device h10: no such device; did you mean 'h100'?"),
        (["--device", "h100", "--gpus", "0"], "--gpus 0: at least 1"),
        (["--device", "h100", "--gpus", "7"], "a multiple of length × accumulation × 7 = 448, not 512"),
        (["--device", "h100", "--mfu", "1.5"], "--mfu 1.5: a share of the peak"),
        (["--mfu", "0.5"], "this machine is measured"),
        (["--device", "h100", "--most", "0"], "--most 0: at least 1"),
        (["--device", "h100", "--set", "train.epochs=2"], "a plan reads no data"),
        (["--device", "rtx-4090", "--set", "train.batch_tokens=536870912"], "nothing fits"),
        (["--device", "h100", "--set", "train.batch_token=3"], "batch_tokens"),
    ],
)
def test_what_cannot_be_planned_is_one_line_that_names_it(recipe, arguments, told, capsys):
    assert main(["plan", recipe, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error


def test_every_device_is_found_by_its_name_in_any_case_and_is_faster_within_a_machine():
    for name, one in DEVICES.items():
        assert device_named(name.upper()) is one
        assert one.within >= one.between > 0 and one.operations > 1e14 and one.memory > 2e10
