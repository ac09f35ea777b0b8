import json
from pathlib import Path

import pytest

from atma.train.record import NAME, Record, cut_record, export_tensorboard, read_record


@pytest.fixture
def run(tmp_path):
    with Record(tmp_path / NAME) as record:
        for step in range(1, 6):
            record.write("train", step, {"loss": step / 3, "tokens_per_second": 10.0})
            if step % 2 == 0:
                record.write("validation", step, {"loss": step / 7})
    return tmp_path


def test_rows_come_back_as_written(run):
    rows = read_record(run)
    assert rows[0] == {"kind": "train", "step": 1, "loss": 1 / 3, "tokens_per_second": 10.0}
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5]


def test_every_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with Record(tmp_path / NAME) as record:
        record.write("train", 1, {"loss": 1.0})
        assert json.loads((tmp_path / NAME).read_text()) == {"kind": "train", "step": 1, "loss": 1.0}


def test_numbers_that_json_lacks_become_null(tmp_path):
    with Record(tmp_path / NAME) as record:
        assert record.write("train", 1, {"loss": float("nan"), "grad_norm": float("inf")})["loss"] is None
    assert read_record(tmp_path)[0]["grad_norm"] is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_a_full_disk_is_named():
    with Record(Path("/dev/full")) as record, pytest.raises(OSError, match=r"No space left on device.*/dev/full"):
        record.write("train", 1, {"loss": 1.0})


def test_cutting_keeps_the_rows_up_to_the_step_byte_for_byte(run):
    before = (run / NAME).read_bytes().splitlines(keepends=True)
    cut_record(run, 4)
    assert (run / NAME).read_bytes() == b"".join(before[:6])
    cut_record(run, 0)
    assert (run / NAME).read_bytes() == b""


def test_a_last_line_cut_short_by_a_crash_is_left_out_and_cut_off(run):
    whole = (run / NAME).read_bytes()
    (run / NAME).write_bytes(whole + b'{"kind": "train", "st')
    assert len(read_record(run)) == 7
    cut_record(run, 100)
    assert (run / NAME).read_bytes() == whole


def test_cutting_a_run_without_a_record_is_nothing(tmp_path):
    cut_record(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", [b"nonsense\n", b"[]\n", b'{"kind": "train"}\n', b'{"kind": "train", "step": "x"}\n'])
def test_a_line_that_is_not_a_row_is_named(run, line):
    (run / NAME).write_bytes(line)
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 1 is not a row of a training record"):
        read_record(run)


def test_tensorboard_gets_every_number_under_its_kind(run, tmp_path):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert export_tensorboard(run, tmp_path / "events") == 12
    events = loading.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert events.Scalars("validation/loss")[0].value == pytest.approx(2 / 7)


def test_exporting_a_run_without_a_record_says_so(tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(ValueError, match=r"metrics.jsonl: no such record"):
        export_tensorboard(tmp_path, tmp_path / "events")
