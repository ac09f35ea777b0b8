"""Every figure of a head and of a layer beside a slow reference that materialises all weights in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from atma.diagnose.attention import RECENT, mean_weights, queries_of, sink, weights
from atma.diagnose.observed import observed
from atma.diagnose.parts import attending
from atma.diagnose.probe import Probe, branch_figures
from atma.diagnose.reading import read
from atma.diagnose.texts import lay
from atma.mixers.polar import PolarCore
from atma.tokenizer import byte_tokenizer

LENGTHS = (160, 300)


@torch.no_grad()
def inputs_of_mixers(model, tokens):
    """What each global mixer is given when the whole text is read at once."""
    x, given = model.embed(tokens), {}
    for i, block in enumerate(model.blocks):
        if i in attending(model):
            given[i] = block.norm_mixer(x)
        x, _ = block(x)
    return given


@torch.no_grad()
def slow_weights(mixer, x):
    """Weights (H, T, T) on keys and (H, T) on the null, from the formulas of maths.md, query by query."""
    projected = mixer.project(x)
    q, k = projected.q, projected.k
    q, k = (mixer.core.turned(z, torch.arange(x.shape[1])[None]) for z in (q, k))
    T, core = x.shape[1], mixer.core
    real, null = torch.zeros(2, T, T, dtype=torch.float64), torch.zeros(2, T, dtype=torch.float64)
    for head in range(2):
        for i in range(T):
            first = 0 if core.window is None else max(0, i + 1 - core.window)
            n, scores = i + 1 - first, k[0, 0, first : i + 1] @ q[0, head, i]
            if not isinstance(core, PolarCore):
                real[head, i, first : i + 1] = (scores * core.scale).softmax(0)
                continue
            limited = min(n, core.count_limit)
            log_n = math.log(limited) + core.sharpening * (math.log(n) - math.log(limited))
            t = 1 + F.softplus(core.length_gain[head]) * log_n
            floor = core.null_base[head] + F.softplus(core.null_slope[head]) * math.sqrt(math.log(limited + 1))
            w = (t * torch.cat([scores / math.sqrt(8), floor[None]])).softmax(0)
            real[head, i, first : i + 1], null[head, i] = w[:-1], w[-1]
    return real, null


@torch.no_grad()
def test_figures_of_heads_are_those_of_materialised_weights(any_model, text):
    probe = Probe(any_model, 64)
    read(any_model, text, LENGTHS, 100, probe)
    rows = {(row["layer"], row["head"], row["length"]): row for row in probe.rows() if row["kind"] == "channel"}
    assert len(rows) == 2 * 2 * len(LENGTHS)
    for length in LENGTHS:
        for layer, x in inputs_of_mixers(any_model, text.tokens[None, :length]).items():
            mixer = attending(any_model)[layer]
            real, null = (w[:, -64:] for w in slow_weights(mixer, x))
            for head in range(2):
                row, w = rows[layer, head, length], real[head]
                share = w / w.sum(-1, keepdim=True)
                close = {"n_eff": (1 / share.square().sum(-1)).mean(), "first_mass": w[:, 0].mean()}
                close["recent_mass"] = w.mean(0)[max(0, length - 64 - RECENT) :].sum()
                far = w.mean(0)[1 : max(1, length - 64 - RECENT)]
                close["sink_mass"] = far.max() if far.numel() else torch.zeros(())
                if isinstance(mixer.core, PolarCore):
                    close["null_mass"] = null[head].mean()
                    effective = (1 / share.square().sum(-1)) * (1 - null[head])
                    slope = F.softplus(mixer.core.magnitude_slope[head])
                    close["magnitude"] = torch.tanh(slope * effective.log1p()).mean()
                if mixer.memory is not None:
                    close["memory_norm"] = slow_memory(mixer, x)[head].norm()
                for name, value in close.items():
                    assert row[name] == pytest.approx(float(value), rel=1e-9, abs=1e-12), (name, layer, head, length)
                assert ("null_mass" in row) == isinstance(mixer.core, PolarCore)
                assert ("memory_norm" in row) == (mixer.memory is not None)


@torch.no_grad()
def slow_memory(mixer, x):
    log_decay, beta = mixer.memory.log_decay(x), mixer.memory.beta(x)
    projected, M = mixer.project(x), torch.zeros(2, 8, 8, dtype=torch.float64)
    for t in range(x.shape[1]):
        k, v = F.normalize(projected.k[0, 0, t], dim=0), projected.v[0, 0, t]
        M = M * log_decay[0, :, t].exp()[:, None, None]
        M = M + beta[0, :, t, None, None] * torch.einsum("hv,k->hvk", v - M @ k, k)
    return M


def test_a_copy_score_is_the_weight_of_the_tokens_to_be_told(any_model, text):
    probe = Probe(any_model, 64)
    read(any_model, text, LENGTHS, 100, probe)
    rows = {(row["layer"], row["head"], row["length"]): row for row in probe.rows() if row["kind"] == "channel"}
    [record] = text.records
    found = []
    for length in LENGTHS:
        asked = torch.cat([text.tokens[:length], torch.tensor(record.cue + record.value[:-1])])
        for layer, x in inputs_of_mixers(any_model, asked[None]).items():
            real, _ = slow_weights(attending(any_model)[layer], x)
            for head in range(2):
                score = sum(float(real[head, len(asked) - 5 + i, record.place + i]) for i in range(5)) / 5
                assert rows[layer, head, length]["copy_score"] == pytest.approx(score, rel=1e-9, abs=1e-15)
                found.append(score)
    windowed = attending(any_model)[1].core.window is not None
    assert max(found) == 0 if windowed else max(found) > 1e-4


def observe(model, tokens):
    with torch.inference_mode(), observed(model) as seen:
        model(tokens[None], model.init_state(1, len(tokens)))
    return seen


def test_branches_sum_to_what_the_mixer_adds(any_model, text):
    seen, given = observe(any_model, text.tokens), inputs_of_mixers(any_model, text.tokens[None])
    for layer, mixer in attending(any_model).items():
        with torch.no_grad():
            whole, _ = mixer(given[layer])
        assert set(seen[layer].branches) == set(mixer.channels())
        torch.testing.assert_close(sum(seen[layer].branches.values()), whole, rtol=1e-10, atol=1e-10)


def test_energies_and_cosines_are_those_of_the_branches(model, text):
    seen = observe(model, text.tokens)[3]
    found = branch_figures(seen)
    read_, memory = seen.branches["read"][0], seen.branches["memory"][0]
    assert found["residual_rms"] == pytest.approx(float(seen.residual.square().mean() ** 0.5))
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(read_, memory, strict=True)]
    assert found["read_memory_cosine"] == pytest.approx(sum(cosines) / len(cosines))
    assert sum(name.endswith("_cosine") for name in found) == 6


def test_weights_and_the_null_sum_to_one_in_any_blocks(any_model, text, monkeypatch):
    mixer, seen = attending(any_model)[1], observe(any_model, text.tokens)[1]
    with torch.inference_mode():
        queries = queries_of(mixer, seen)
        total = weights(queries, 0, 301).sum(-1) + (0 if queries.null is None else queries.null)
        whole = mean_weights(queries)
        monkeypatch.setattr("atma.diagnose.attention.KEY_BLOCK", 64)
        torch.testing.assert_close(mean_weights(queries), whole)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_sink_is_neither_the_first_key_nor_a_recent_one():
    mass = torch.zeros(400)
    mass[0], mass[57], mass[300], mass[399] = 0.5, 0.1, 0.3, 0.2
    assert sink(mass, 400) == (57, pytest.approx(0.1))
    assert sink(mass, 100) == (None, 0.0)
    assert sink(torch.zeros(400), 400) == (None, 0.0)


def test_rows_are_means_over_documents_with_intervals(model, text, documents):
    probe = Probe(model, 64)
    for one in lay(byte_tokenizer(), documents, 300, 2, 7):
        read(model, one, (200, 300), 100, probe)
    row = next(row for row in probe.rows() if row["kind"] == "channel")
    assert row["documents"] == 3 and all(len(values) == 3 for values in row["values"].values())
    assert row["n_eff"] == pytest.approx(sum(row["values"]["n_eff"]) / 3)
    low, high = row["intervals"]["n_eff"]
    assert low < row["n_eff"] < high
