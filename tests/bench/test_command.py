"""`atma bench` on the command line: the table, the files, and one line for what a user can mend."""

import json

import pytest

from atma.bench.plan import Plan
from atma.bench.recurrence import RECURRENCES
from atma.cli import main
from atma.ops.polar import cpu as polar_cpu

SIZES = ["--heads", "2", "--key-value-heads", "1", "--head-width", "8", "--vocabulary", "20", "--repeats", "1"]
OPTIONS = ["--lengths", "33", *SIZES, "--dtypes", "float32", "--device", "cpu"]


def failing(capsys, *arguments):
    """The one line that a command with a mistake says."""
    assert main(["bench", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("atma: error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_a_measurement_prints_a_table_and_writes_both_files(tmp_path, capsys):
    assert main(["bench", "ops", *OPTIONS, "--threads", "1", "--out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert {row["what"] for row in found["rows"]} == {
        *(f"polar {mode}" for mode in ("forward", "forward+backward", "decode")),
        *(f"{kind} {mode}" for kind in RECURRENCES for mode in ("forward", "forward+backward", "step")),
        *(f"{name} {mode}" for name in ("conv", "loss") for mode in ("forward", "forward+backward")),
    }
    assert all(f"{row['what']}, {row['dtype']}" in said and row["name"] in said for row in found["rows"])
    assert found["command"].startswith("atma bench ops --lengths 33 --heads 2")
    assert {"date", "torch", "threads", "backends", "device"} <= set(found["machine"])
    assert found["rates"]["bytes"] > 0
    assert "transformers is not installed" in said
    assert str(tmp_path) not in json.dumps(found)


def test_the_roofline_page_asks_the_network_for_nothing(tmp_path, capsys):
    main(["bench", "ops", *OPTIONS, "--operations", "conv", "--out", str(tmp_path)])
    capsys.readouterr()
    page = (tmp_path / "roofline.html").read_text(encoding="utf-8")
    own = page.split("<script>", 1)[0]
    assert "Roofline, float32" in own
    assert "atma cpu" in own
    assert "default-src 'none'" in own
    assert "src=" not in own.replace("script-src", "").replace("style-src", "")
    assert "Plotly.react" in page


def test_a_wrong_result_is_one_line_and_leaves_no_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(polar_cpu, "statistics", lambda *given: [x + 1e-2 for x in _statistics(*given)])
    assert "no figures: polar forward of the cpu backend" in failing(capsys, "ops", *OPTIONS, "--out", tmp_path / "b")
    assert not (tmp_path / "b").exists()


_statistics = polar_cpu.statistics


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["speed"], "no measurement 'speed'; known: ops, train, decode, prefill"),
        (["ops", "--dtypes", "int8"], "'dtypes' must be from float32, bfloat16, float16, not 'int8'"),
        (
            ["ops", "--operations", "rope"],
            "'operations' must be from polar, delta, kda, gla, mamba2, conv, loss, not 'rope'",
        ),
        (["ops", "--head-width", "0"], "'head_width' must be 1 or more, not 0"),
        (["ops", "--head-width", "512"], "'head_width' must be at most 256, not 512"),
        (["ops", "--heads", "3"], "'key_value_heads' must be a divisor of heads = 3, not 2"),
        (["ops", "--lengths", "0"], "'lengths' must be 1 token or more each, not (0,)"),
        (["train", "--preset", "huge"], "no preset 'huge'; known: nano-test, nano"),
        (["decode", "--preset", "nano-test", "--backends", "tpu"], "no backend 'tpu'; known: auto, reference"),
        (["ops", "--device", "abacus"], "--device abacus: no such kind of device; here there is"),
        (["ops", "--lenghts", "8"], "--lenghts"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(arguments, told, capsys):
    assert told in failing(capsys, *arguments)


def test_a_file_in_the_place_of_the_folder_is_told_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "is a file; name a folder" in failing(capsys, "ops", *OPTIONS, "--out", tmp_path / "file")


def test_the_default_plan_is_sound():
    assert Plan().channels == 512
