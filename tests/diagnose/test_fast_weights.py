"""What a diagnosis tells of fast weights, beside a slow loop over tokens, and where the answer is known."""

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, normalize

from atma.config import ModelConfig
from atma.diagnose.diagnosis import diagnose
from atma.diagnose.plan import Plan
from atma.diagnose.probe import Probe
from atma.diagnose.reading import read
from atma.diagnose.texts import lay
from atma.eval.likelihood.prefixes import Documents
from atma.model import Model
from atma.tokenizer import byte_tokenizer
from tests.diagnose.conftest import Loaded

LENGTHS = (160, 300)
FIGURES = {"surprise", "write_strength", "weight_drift"}


def made(*pattern, **options) -> Model:
    generator = torch.Generator().manual_seed(5)
    config = ModelConfig(257, 16, depth=len(pattern), pattern=pattern, mlp_multiple=2, query_heads=2, **options)
    return Model(config, generator).double().eval()


def figures(model, tokens):
    """By layer, head and length, of one document."""
    documents = Documents(tokens[None], 256)
    [text] = lay(byte_tokenizer(), documents, LENGTHS[-1], 1, 0)
    probe = Probe(model, 64)
    read(model, text, LENGTHS, 100, probe)
    rows = [row for row in probe.rows() if row["kind"] == "channel"]
    return text, {(row["layer"], row["head"], row["length"]): row for row in rows}


@torch.no_grad()
def test_they_are_those_of_the_weights_before_the_last_tokens():
    model = made("gated_conv", "titans")
    text, found = figures(model, np.random.default_rng(1).integers(97, 123, 400))
    mixer = model.blocks[1].mixer
    for length in LENGTHS:
        x = model.embed(text.tokens[None, :length])
        x = model.blocks[1].norm_mixer(model.blocks[0](x)[0])
        _, state = mixer(x[:, : length - 64], mixer.init_state(1, length))
        (_, k, v), _ = mixer._project(x, torch.zeros_like(state.tail), None)
        for head in range(2):
            first, second = (w[0, head] for w in state.memory.weights)
            shares, missed, values = [], 0.0, 0.0
            for t in range(length - 64, length):
                key, value = normalize(k[0, head, t], dim=0), v[0, head, t] / 8**0.5
                known = key + first @ gelu(second @ key)
                missed, values = missed + float((known - value).square().sum()), values + float(value.square().sum())
                gates = mixer.memory.gates
                eta = gates.momentum(x)[0, head, t].sigmoid()
                shares.append(float(gates.most * (1 - eta) * gates.step(x)[0, head, t].sigmoid()))
            row, start = found[1, head, length], mixer.memory.initial()
            moved = sum(float((w - w0[head]).square().sum()) for w, w0 in zip((first, second), start, strict=True))
            assert row["surprise"] == pytest.approx(missed / values, rel=1e-9)
            assert row["write_strength"] == pytest.approx(sum(shares) / 64, rel=1e-9)
            assert row["weight_drift"] == pytest.approx(moved**0.5, rel=1e-9)


@pytest.mark.parametrize("name", ["atma_memory", "moneta", "memora", "omeganet", "lact", "allmem"])
def test_every_memory_with_fast_weights_tells_them(name):
    near = {"memory_chunk": 16}
    beside = made("gated_conv", "attention", core="polar", memory=name, head_width=8, **near)
    for model in (made("gated_conv", name, **near), beside):
        rows = figures(model, np.random.default_rng(1).integers(97, 123, 400))[1].values()
        assert len(rows) == 2 * len(LENGTHS)
        for row in rows:
            assert row.keys() >= FIGURES and all(np.isfinite(row[name]) and row[name] > 0 for name in FIGURES)


def test_what_comes_again_and_again_is_no_surprise():
    model = made("atma_memory", "gated_conv", forgets=False)
    strange = figures(model, np.random.default_rng(1).integers(97, 123, 400))[1]
    for place, row in figures(model, np.full(400, 97))[1].items():
        assert row["surprise"] < 0.05 < 0.3 < strange[place]["surprise"]


def test_a_diagnosis_has_them_and_shows_them(capsys):
    documents = Documents(np.random.default_rng(1).integers(97, 123, (2, 200)), 256)
    plan = Plan(lengths=(128, 192), records=1, mask="none", stress=0)
    found = diagnose(Loaded(made("gated_conv", "titans"), byte_tokenizer()), documents, plan)
    from atma.commands.diagnose import _tables
    from atma.diagnose.page import figures as pictures

    titles = [figure.title for figure in pictures(found.rows)]
    assert {"Surprise", "Write strength", "Drift of the weights"} <= set(titles)
    _tables(found.rows)
    shown = capsys.readouterr().out
    assert "surprise" in shown and "drift" in shown and "copy" not in shown


def test_a_kernel_has_no_weights_to_tell_of():
    rows = figures(made("gated_conv", "dot"), np.random.default_rng(1).integers(97, 123, 400))[1].values()
    assert not any(FIGURES & set(row) for row in rows)
