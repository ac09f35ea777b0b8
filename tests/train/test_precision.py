import pytest
import torch
from tiny_run import rows, tiny_recipe, tiny_source

from atma.checkpoint import load_info
from atma.train import precision
from atma.train.loop import fit
from atma.train.precision import choose_precision

CPU = torch.device("cpu")


def test_what_is_asked_for_is_taken():
    assert choose_precision("bfloat16", CPU, 8) == torch.bfloat16
    assert choose_precision("float32", CPU, 4096) == torch.float32


@pytest.mark.parametrize(
    ("report", "width", "expected"),
    [
        ({"avx512_bf16": True}, 64, torch.bfloat16),
        ({"amx_bf16": True}, 1024, torch.bfloat16),
        ({"avx512_bf16": True}, 63, torch.float32),
        ({"avx512_f": True, "avx512_bf16": False}, 1024, torch.float32),
        ({}, 1024, torch.float32),
    ],
)
def test_auto_on_a_cpu_takes_bfloat16_where_the_cpu_multiplies_it(monkeypatch, report, width, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: report, raising=False)
    assert choose_precision("auto", CPU, width) == expected


def test_a_version_of_torch_that_reports_nothing_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_precision("auto", CPU, 1024) == torch.float32


def test_a_run_keeps_the_compute_type_it_began_with(tmp_path, monkeypatch):
    def stop_at_six(step: int):
        if step == 6:
            raise OSError("stopped")
        return rows(step)

    monkeypatch.setattr(precision, "LEAST_WIDTH", 1)
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: True)
    with pytest.raises(OSError, match="stopped"):
        fit(tiny_recipe(), tmp_path / "run", tiny_source(stop_at_six))
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: False)
    final = fit(tiny_recipe(), tmp_path / "run", tiny_source(), resume=True)
    assert load_info(final)["extra"]["compute"] == "bfloat16"
