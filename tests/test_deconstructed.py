"""Attention taken apart and attention that is not learned compute what their papers' formulas say, token by token."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from atma.config import ModelConfig
from atma.decoding import RECORDED, Decoder
from atma.mixers import Call
from atma.mixers.deconstructed import softmax_sum
from atma.model import Model
from atma.ops import native, use_backend
from atma.serve.exact import Served
from tests.harness.greedy import greedy, outputs, served
from tests.laws.conftest import randomise
from tests.ops.backends import ALL

EXACT = {"rtol": 1e-10, "atol": 1e-10}
HEADS = {"query_heads": 4, "key_value_heads": 2, "head_width": 4}


def made(kind, batch=2, length=11, **options):
    """A mixer in float64 with every parameter away from its start, an input of width 16, and its projected heads."""
    config = ModelConfig(23, width=16, depth=2, pattern=(kind,), **(HEADS | options))
    mixer = randomise(config.mixer(1))
    return mixer, torch.randn(batch, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def heads(projection, x, count):
    """A projection (count·K, D) of x (T, D) to (count, T, K), one of four query heads a row."""
    y = (x @ projection.weight.mT).unflatten(-1, (count, -1)).transpose(0, 1)
    return y.repeat_interleave(4 // count, 0)


def joined(mixer, reads):
    """Reads (H, T, K) of each row through the output projection."""
    return torch.stack([read.transpose(0, 1).flatten(1) for read in reads]) @ mixer.out_proj.weight.mT


@torch.no_grad()
def test_a_glu_is_as_large_as_the_attention_that_it_replaces():
    mixer, x = made("glu")
    replaced = 16 * 16 + 2 * 8 * 16 + 16 * 16  # q, k and v, out
    assert mixer.gate_proj.out_features == replaced // (3 * 16)
    gate, up = (x @ layer.weight.mT for layer in (mixer.gate_proj, mixer.up_proj))
    torch.testing.assert_close(mixer(x)[0], (gate / (1 + (-gate).exp()) * up) @ mixer.out_proj.weight.mT, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("backend", ALL)
def test_taylor2_is_the_sum_of_three_normalised_orders(backend):
    mixer, x = made("taylor2")
    reads = []
    for row in x:
        q, k, v = heads(mixer.q_proj, row, 4), heads(mixer.k_proj, row, 2), heads(mixer.v_proj, row, 2)
        read = torch.zeros_like(q)
        for i in range(len(row)):
            dot = (k[:, : i + 1] * q[:, i : i + 1]).sum(-1)
            squares = (k[:, : i + 1] ** 2 * q[:, i : i + 1] ** 2).sum(-1)
            for score in (torch.ones_like(dot), dot / 2, squares / 8):  # K = 4
                total = score.sum(-1)
                total = total + 1e-6 * torch.where(total < 0, -1.0, 1.0)
                read[:, i] += (score[..., None] * v[:, : i + 1]).sum(1) / total[:, None]
        reads.append(read)
    with use_backend(backend):
        torch.testing.assert_close(mixer(x)[0], joined(mixer, reads), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("backend", ALL)
def test_gate_sum_weighs_tokens_by_themselves(backend):
    mixer, x = made("gate_sum")
    reads = []
    for row in x:
        q, k, v = heads(mixer.q_proj, row, 4), heads(mixer.k_proj, row, 2), heads(mixer.v_proj, row, 2)
        score = (F.silu(q) * k).sum(-1) / 2
        reads.append(
            torch.stack([torch.einsum("hs,hsk->hk", score[:, :i].softmax(-1), v[:, :i]) for i in range(1, 12)], 1)
        )
    with use_backend(backend):
        torch.testing.assert_close(mixer(x)[0], joined(mixer, reads), **EXACT)


@pytest.mark.parametrize("backend", ALL)
def test_gate_sum_reproduces_the_golden_vectors_and_their_gradients(backend, golden_mixers):
    with safe_open(golden_mixers / "gate_sum.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["about"])
        x = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert about["inputs"] == ["score", "v"]
    score, v = (x[name].requires_grad_() for name in about["inputs"])
    with use_backend(backend):
        out, _ = softmax_sum(score[None, None], F.pad(v, (0, 1), value=1.0)[None, None])
    gradients = torch.autograd.grad(out, (score, v), x["out_grad.out"][None, None])
    for found, name in ((out[0, 0], "out"), (gradients[0], "grad.score"), (gradients[1], "grad.v")):
        torch.testing.assert_close(found, x[name], rtol=0, atol=1e-9 * float(x[name].abs().max()))


@pytest.mark.parametrize("backend", ALL)
def test_gate_sum_does_not_overflow_whatever_the_scores(backend):
    score = torch.tensor([-2000.0, 3000.0, -3000.0, 2999.0], dtype=torch.float64)[None, None]
    v = torch.tensor([[1.0, 1], [2, 1], [3, 1], [4, 1]], dtype=torch.float64)[None, None]
    with use_backend(backend):
        read = softmax_sum(score, v)[0].flatten()
    last = (2 + 4 * torch.tensor(-1.0).double().exp()) / (1 + torch.tensor(-1.0).double().exp())
    torch.testing.assert_close(
        read, torch.stack([torch.tensor(1.0), torch.tensor(2.0), torch.tensor(2.0), last]).double()
    )


def normalised(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def softmax_read(mixer, source, row, more=0.0, window=99):
    """Softmax attention at 1/√K of four heads over one row, q and k made of source, `more` (H, T, T) added."""
    q, k, v = (
        heads(mixer.q_proj, source, 4),
        heads(mixer.k_proj, source, mixer.groups),
        heads(mixer.v_proj, row, mixer.groups),
    )
    scores = q @ k.mT / 2 + more
    index = torch.arange(len(row))
    seen = (index <= index[:, None]) & (index > index[:, None] - window)
    return scores, seen, v


@torch.no_grad()
@pytest.mark.parametrize("kind", ["static_qk", "position_qk"])
def test_queries_and_keys_may_be_of_words_or_of_places_alone(kind):
    mixer, x = made(kind)
    embedding = torch.randn(x.shape, dtype=torch.float64)
    reads = []
    for row, words in zip(x, embedding, strict=True):
        source = normalised(words if kind == "static_qk" else mixer.table[: len(row)])
        scores, seen, v = softmax_read(mixer, source, row)
        reads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
    record = {"call": Call(embedding)} if mixer.reads_call else {}
    torch.testing.assert_close(mixer(x, **record)[0], joined(mixer, reads), **EXACT)


def test_static_qk_reads_the_embedding_of_its_model():
    mixer, x = made("static_qk")
    with pytest.raises(ValueError, match="record of the model's call"):
        mixer(x)
    assert (
        Model(ModelConfig(23, width=16, depth=2, pattern=("glu", "static_qk"), **HEADS))(torch.arange(5)[None])[0]
        .isfinite()
        .all()
    )


def test_a_text_longer_than_the_table_of_positions_is_refused():
    mixer, x = made("position_qk", length=5, maximum=5)
    assert mixer.table.shape == (5, 16) and not mixer.table.requires_grad
    _, state = mixer(x[:, :4], mixer.init_state(2, 9))
    with pytest.raises(ValueError, match="a text of 6 tokens passes the 5 positions"):
        mixer(x[:, :2], state)
    assert mixer(x.repeat(1, 3, 1), segment_ids=torch.arange(3).repeat_interleave(5).repeat(2, 1))[0].isfinite().all()


def test_a_fixed_text_gives_the_table_its_first_embeddings():
    config = ModelConfig(23, width=16, depth=1, pattern=("position_qk",), maximum=3, table_tokens=(5, 2, 5, 9), **HEADS)
    model = Model(config)
    assert torch.equal(model.blocks[0].mixer.table, model.embed.weight[[5, 2, 5]])
    with pytest.raises(ValueError, match="'table_tokens' must be below vocab_size = 23, not 23"):
        Model(config.changed({"table_tokens": [1, 2, 23]}))
    with pytest.raises(ValueError, match="'table_tokens' must be at least maximum = 3 ids"):
        config.changed({"table_tokens": [1, 2]})


@torch.no_grad()
@pytest.mark.parametrize("score", ["softmax", "relu"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("identity", [0.0, -0.7])
def test_random_qk_scores_by_frozen_projections_and_by_the_match_of_the_inputs(score, window, identity):
    mixer, x = made("random_qk", score=score, window=window, identity=identity, key_value_heads=4)
    reads = []
    for row in x:
        own = row.unflatten(-1, (4, -1)).transpose(0, 1)
        scores, seen, v = softmax_read(mixer, row, row, identity * own @ own.mT / 2, window or 99)
        relu = scores.relu().masked_fill(~seen, 0) / seen.sum(-1)[:, None]
        reads.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) if score == "softmax" else relu) @ v)
    torch.testing.assert_close(mixer(x)[0], joined(mixer, reads), **EXACT)


def test_random_projections_are_frozen_and_come_from_the_seed():
    config = ModelConfig(23, width=256, depth=2, pattern=("random_qk",))
    one, again, other, deeper = (
        config.mixer(0),
        config.mixer(0),
        config.changed({"projection_seed": 1}).mixer(0),
        config.mixer(1),
    )
    assert [name for name, _ in one.named_parameters()] == ["v_proj.weight", "out_proj.weight"]
    before = one.q_proj.weight.clone()
    one.init_weights(None)
    assert torch.equal(one.q_proj.weight, before) and torch.equal(again.q_proj.weight, before)
    assert not torch.equal(other.q_proj.weight, before) and not torch.equal(deeper.q_proj.weight, before)
    assert abs(float(before.std()) * 16 - 1) < 5 / before.numel() ** 0.5  # N(0, 1/D)


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("glu", {"query_heads": 0}, "'query_heads' must be at least 1"),
        ("gate_sum", {"key_value_heads": 3}, "'key_value_heads' must be a divisor of query_heads = 4"),
        ("static_qk", {"window": 0}, "'window' must be at least 1, or left out"),
        ("position_qk", {"maximum": 0}, "'maximum' must be at least 1"),
        ("random_qk", {"identity": 0.5}, "'key_value_heads' must be query_heads = 4 for identity"),
        ("random_qk", {"identity": float("nan")}, "'identity' must be finite"),
        (
            "random_qk",
            {"identity": 0.5, "key_value_heads": 4, "head_width": 5},
            "'head_width' must be width 16 / query_heads",
        ),
        ("random_qk", {"score": "tanh"}, "'score' must be one of softmax, relu"),
        ("random_qk", {"projection_seed": 2**63}, "'projection_seed' must be of 32 bits"),
        ("position_qk", {"table_seed": -1}, "'table_seed' must be of 32 bits"),
    ],
)
def test_what_cannot_be_is_refused(kind, options, told):
    with pytest.raises(ValueError, match=told):
        ModelConfig(23, width=16, depth=1, pattern=(kind,), **(HEADS | options)).mixer(0)


NAMES = ("glu", "taylor2", "gate_sum", "static_qk", "position_qk", "random_qk")


@pytest.mark.parametrize("kind", NAMES)
def test_at_the_start_the_output_is_zero_and_all_of_it_is_a_channel(kind):
    mixer = ModelConfig(23, width=16, depth=1, pattern=(kind,), **HEADS).mixer(0)
    mixer.init_weights(None)
    x = torch.randn(1, 5, 16)
    y, _ = mixer(x, **({"call": Call(x)} if mixer.reads_call else {}))
    assert not y.any() and list(mixer.channels().values()) == [mixer.out_proj] and mixer.out_proj.bias is None


@pytest.mark.skipif(not native.available(), reason="the compiled kernels are not available here")
@pytest.mark.parametrize(
    ("kind", "recorded"), [*((name, True) for name in NAMES if name != "position_qk"), ("position_qk", False)]
)
def test_a_step_of_decoding_is_recorded_unless_places_are_looked_at(kind, recorded):
    model = randomise(Model(ModelConfig(23, width=16, depth=2, pattern=(kind,), **HEADS))).float()
    state = model.init_state(2, 9)
    with torch.inference_mode():
        expected = model.logits(model(torch.tensor([[3, 4], [5, 6]]))[0])
        decoder = Decoder(model, state)
        found = [decoder.step(torch.tensor(tokens)).clone() for tokens in ([[3], [5]], [[4], [6]])]
    assert decoder.how.startswith(RECORDED) == recorded, decoder.how
    torch.testing.assert_close(torch.stack(found, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("glu", {}),
        ("taylor2", {}),
        ("static_qk", {}),
        ("gate_sum", {}),
        ("position_qk", {"window": 5}),
        ("random_qk", {"score": "relu"}),
        ("random_qk", {"score": "relu", "window": 5}),
        ("random_qk", {"identity": 0.5, "key_value_heads": 4}),
    ],
)
def test_a_served_text_is_the_one_that_the_model_writes(kind, options):
    model = randomise(Model(ModelConfig(257, width=16, depth=2, pattern=(kind,), **(HEADS | options)))).float().eval()
    tokens = torch.arange(20)[None] * 7 % 257
    assert served(model, tokens[0].tolist(), 6) == greedy(model, tokens, 6)


@pytest.mark.skipif(not native.available(), reason="exact only by the compiled kernels")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("glu", {}, marks=pytest.mark.slow),
        ("taylor2", {}),
        ("static_qk", {"window": 5}),
        pytest.param("position_qk", {}, marks=pytest.mark.slow),
        ("random_qk", {"identity": 0.5, "key_value_heads": 4}),
        pytest.param("minimal", {"symmetric": True, "identity_vo": True, "key_value_heads": 4}, marks=pytest.mark.slow),
    ],
)
def test_what_is_steady_is_served_with_the_same_bits_beside_any_other_text(kind, options):
    model = randomise(Model(ModelConfig(257, width=16, depth=2, pattern=(kind,), **(HEADS | options)))).float().eval()
    assert Served(model).exact
    prompts = [(torch.arange(length) * 7 % 257).tolist() for length in (20, 3, 41)]
    together = outputs(model, prompts, 5)
    for prompt, output in zip(prompts, together, strict=True):
        alone = outputs(model, [prompt], 5)[0]
        assert (alone.tokens, alone.logprobs) == (output.tokens, output.logprobs)
