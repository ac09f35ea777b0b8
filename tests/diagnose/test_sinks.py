"""Secondary sinks are found where the definition says, on drawn states, on our models and on those of transformers."""

import json
import math

import numpy as np
import pytest
import torch

from atma.cli import main
from atma.diagnose.diagnosis import diagnose
from atma.diagnose.page import figures, sentences
from atma.diagnose.plan import Plan
from atma.diagnose.sinks import Aligner, Alignment, aligned, called, level_rows, sinks_row, span, told
from atma.eval.likelihood.prefixes import Documents
from atma.tokenizer import byte_tokenizer
from tests.diagnose.conftest import Loaded, made

LAYERS, TOKENS = 8, 12


def states_of(norms, sinks):
    """States (N, T, 16): the first token's along one axis, sinks {place: layers} nearly so, all others across."""
    states = torch.zeros(len(norms), TOKENS, 16, dtype=torch.float64)
    states[:, 1:, 1] = 1
    states[:, 0, 0] = torch.tensor(norms, dtype=torch.float64)
    for place, layers in sinks.items():
        for layer in layers:
            states[layer, place, 0] = -3 if place % 2 else 3  # |cosine| 0.949
    return states


def aligned_of(states, cuts=(TOKENS,)):
    aligner = Aligner(len(states))
    for layer, state in enumerate(states):
        for piece in state.split(cuts):
            aligner.take(layer, piece)
    return aligner.alignment()


@pytest.mark.parametrize(
    ("norms", "layers"),
    [
        ([1, 1, 9, 9, 9, 2, 2, 1], range(2, 5)),
        ([1, 9, 8, 7, 6, 5, 4, 3.5], range(1, 2)),
        ([1, 2, 3, 4, 5, 6, 7, 9], range(7, 8)),
        ([5, 4, 3, 2, 1], range(1, 2)),
        ([1, 4], range(1, 2)),
        ([1], range(1)),
    ],
)
def test_layers_are_those_between_the_rise_and_the_fall(norms, layers):
    assert span(norms) == layers


@pytest.mark.parametrize("cuts", [(TOKENS,), (1, 4, 7)])
def test_sinks_are_found_in_the_span_alone_with_first_layer_and_lifetime(cuts):
    norms = [1, 1, 9, 9, 9, 9, 2, 2]
    states = states_of(norms, {3: range(8), 5: (4, 5), 6: (2, 4), 9: (0, 1, 6, 7)})
    row = sinks_row(0, list(range(100, 100 + TOKENS)), aligned_of(states, cuts))
    assert (row["first_layer"], row["last_layer"], row["layers"], row["length"]) == (2, 5, 8, TOKENS)
    assert row["places"] == [3, 5, 6] and row["tokens"] == [103, 105, 106]
    assert row["first_layers"] == [2, 4, 2] and row["lifetimes"] == [4, 2, 2]
    levels = level_rows([row, row | {"places": [], "first_layers": [4], "lifetimes": [2]}])
    assert [levels[0][key] for key in ("first_layer", "lifetime", "count", "texts")] == [4, 2, 2, 2]
    assert {(one["first_layer"], one["lifetime"]): one["called"] for one in levels} == {
        (2, 4): "primary",
        (4, 2): "secondary",
        (2, 2): "secondary",
    }


def test_a_deep_model_has_the_published_names():
    assert [called(life, 40, 30) for life in (4, 5, 24, 25)] == ["brief", "secondary", "secondary", "primary"]


def test_the_threshold_is_of_the_cosine():
    cosines = torch.tensor([[1.0, 0.89, 0.91]])
    row = sinks_row(0, [1, 2, 3], Alignment([1.0], cosines))
    assert row["places"] == [2] and sinks_row(0, [1, 2, 3], Alignment([1.0], cosines), 0.85)["places"] == [1, 2]


@torch.no_grad()
def test_the_states_of_our_models_are_the_stream_behind_each_block(model):
    tokens = torch.randint(0, 257, (1, 50), generator=torch.Generator().manual_seed(3))
    aligner, x = Aligner(4), model.embed(tokens)
    state = model.init_state(1, 50)
    with aligned(model, aligner):
        for piece in tokens.split((20, 29, 1), 1):
            _, state = model(piece, state)
    found = aligner.alignment()
    for layer, block in enumerate(model.blocks):
        x, _ = block(x)
        states = (model.norm(x) if layer == 3 else x)[0]
        assert found.norms[layer] == pytest.approx(float(states[0].norm()), rel=1e-5)
        cosines = (states @ states[0]).abs() / states.norm(dim=-1) / states[0].norm()
        torch.testing.assert_close(found.cosines[layer].double(), cosines, rtol=1e-4, atol=1e-5)


def test_a_diagnosis_tells_of_sinks_only_where_asked_and_of_the_text_alone():
    documents = Documents(np.random.default_rng(1).integers(97, 123, (2, 200)), 256)
    plan = Plan(lengths=(128, 192), records=1, stress=0, mask="none", sinks=True)
    loaded = Loaded(made("nope", False), byte_tokenizer())
    rows = diagnose(loaded, documents, plan).rows
    texts = [row for row in rows if row["kind"] == "sinks"]
    assert [row["length"] for row in texts] == [192, 192] and all(len(row["norms"]) == 4 for row in texts)
    levels = [row for row in rows if row["kind"] == "sink level"]
    assert sum(row["count"] for row in levels) == sum(len(row["places"]) for row in texts)
    assert ("Sinks like the first token" in [figure.title for figure in figures(rows)]) == bool(levels)
    assert sentences(rows, [])[-1:] == told(rows) != []
    plain = diagnose(loaded, documents, Plan(lengths=(128, 192), records=1, stress=0, mask="none")).rows
    assert {row["kind"] for row in rows} - {row["kind"] for row in plain} <= {"sinks", "sink level"}
    assert [row["loss"] for row in plain if row["kind"] == "loss"] == [
        row["loss"] for row in rows if row["kind"] == "loss"
    ]


def test_sinks_of_a_model_of_transformers_are_those_of_its_hidden_states(tmp_path, capsys):
    from atma.eval.hugging_face import load
    from tests.eval.test_hugging_face import made as made_folder

    folder = made_folder("llama", tmp_path / "llama")
    text = np.random.default_rng(3).integers(97, 123, 300)
    (tmp_path / "text.txt").write_bytes(bytes(text.tolist()))
    common = ["diagnose", f"hf:{folder}", "--text", str(tmp_path / "text.txt"), "--lengths", "128"]
    common += ["--page", str(tmp_path / "page.html"), "--out", str(tmp_path / "rows.jsonl"), "--dtype", "float64"]
    assert main(common) == 2 and "add --sinks" in capsys.readouterr().err
    assert (
        main([*common, "--sinks", "--scale", "1.mlp=0"]) == 2 and "--scale is for models of" in capsys.readouterr().err
    )
    assert main([*common, "--sinks"]) == 0
    assert "1. " in capsys.readouterr().out and "Diagnosis of" in (tmp_path / "page.html").read_text()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    texts = [row for row in rows if row["kind"] == "sinks"]
    model = load(str(folder), torch.float64)
    tokens = torch.tensor([[256, *text[:127].tolist()]])
    states = model.model(input_ids=tokens, output_hidden_states=True).hidden_states[1:]
    wanted = sinks_row(0, tokens[0].tolist(), aligned_of([state[0].detach() for state in states], (128,)))
    assert len(texts) == 2 and texts[0]["places"] == wanted["places"]
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(texts[0]["norms"], wanted["norms"], strict=True))
