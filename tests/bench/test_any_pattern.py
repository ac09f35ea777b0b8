"""Models of any pattern of mixers are measured, those that a package brings among them."""

import dataclasses
import importlib.metadata
from pathlib import Path

import pytest
import torch

from atma.bench.hugging_face import Layers, layers_of, peers
from atma.bench.measure import bench
from atma.bench.models import Ours
from atma.config import PRESETS, ModelConfig, preset
from atma.mixers import table
from tests.bench.test_measure import SMALL

PACKAGE = Path(__file__).parents[1] / "third_party" / "package"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    """As if the package were."""
    monkeypatch.syspath_prepend(PACKAGE)
    point = importlib.metadata.EntryPoint("echo", "atma_echo:Echo", table.GROUPS["mixer"])
    monkeypatch.setattr(table, "_points", lambda what: (point,) if what == "mixer" else ())
    table.find.cache_clear()
    yield
    table.find.cache_clear()


def mixed(*pattern: str, **options) -> dict:
    """Three layers: of a package, of a table with options of its own, and as the table of mixers has it."""
    pattern = pattern or ("echo", "wide", "atma")
    wide = {"kind": "rope", "query_heads": 4, "window": 8} if "wide" in pattern else None
    mixers = {"mixers": {"wide": wide}} if wide else {}
    sizes = {"vocab_size": 64, "width": 32, "depth": len(pattern), "mlp_multiple": 1, "head_width": 16}
    attends = {"query_heads": 2, "key_value_heads": 2} if set(pattern) & {"wide", "atma"} else {}
    if not attends:
        del sizes["head_width"]
    return sizes | {"pattern": pattern} | mixers | attends | options


@pytest.mark.parametrize("kind", ["train", "decode", "prefill"])
@pytest.mark.parametrize("pattern", [(), ("echo", "gated_conv"), ("gated_conv",)], ids=["mixed", "echo", "plain"])
def test_a_model_of_any_pattern_is_measured(kind, pattern, monkeypatch):
    monkeypatch.setitem(PRESETS, "mixed", mixed(*pattern))
    result = bench(kind, dataclasses.replace(SMALL, preset="mixed", backends=("auto",)))
    [row] = result.rows
    assert row.name == "atma auto" and row.seconds > 0
    assert ("overhead" in row.about) == (kind == "decode")


def test_the_tiny_form_has_the_same_layers_of_the_least_sizes():
    config = ModelConfig(**mixed())
    small = Ours(config, "auto", torch.float32, CPU).tiny().config
    assert small.layers == config.layers and (small.width, small.vocab_size) == (16, 16)
    options = {name: one.options for name, one in small.named().items()}
    assert options["wide"]["query_heads"] == options["atma"]["query_heads"] == 1
    assert options["wide"]["window"] == 8 and options["wide"]["head_width"] == 16
    assert (options["echo"]["echo_heads"], options["echo"]["code_width"]) == (2, 4)


def test_the_tiny_form_of_a_preset_is_as_it_was():
    config = preset("nano")
    sizes = {"width": 16, "query_heads": 1, "key_value_heads": 1, "head_width": 16, "vocab_size": 16}
    small = Ours(config, "auto", torch.float32, CPU).tiny().config
    assert small == dataclasses.replace(config, **sizes, mlp_multiple=1)


def test_peers_have_the_attending_layers_of_the_model_and_the_heads_of_the_first():
    assert layers_of(ModelConfig(**mixed())) == Layers([False, True, True], 4, 2, 16, 3)
    nano = [False, False, True, False]
    assert layers_of(preset("nano")) == Layers(nano * 2, 2, 1, 64, 3)
    taps = ModelConfig(**mixed("gated_conv", "atma", local_taps=5))
    assert layers_of(taps) == Layers([False, True], 2, 2, 16, 5)


def test_a_model_that_nothing_attends_in_has_no_peers_and_a_note(monkeypatch):
    monkeypatch.setattr("atma.bench.hugging_face.peer", lambda name, notes: object())
    notes = []
    assert peers(ModelConfig(**mixed("gated_conv")), torch.float32, CPU, notes) == []
    assert notes == ["no layer of the model attends: LFM2 and Qwen3-Next, which do, are left out"]
