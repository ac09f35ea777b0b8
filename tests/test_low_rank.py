"""Fewer matrices, narrower keys: options of softmax attention against restatements, and models that are compressed."""

import pytest
import torch
import torch.nn.functional as F

from atma import load
from atma import state as states
from atma.checkpoint import save_model
from atma.cli import main
from atma.compress import Moments, compress, directions, moments
from atma.config import ModelConfig
from atma.decoding import RECORDED, Decoder
from atma.diagnose.interventions import masked
from atma.diagnose.parts import Part
from atma.model import Model
from atma.ops import native
from atma.ops.rows import rotate
from atma.tokenizer import byte_tokenizer
from tests.conftest import tiny
from tests.harness.greedy import greedy, served
from tests.laws.conftest import randomise

EXACT = {"rtol": 1e-10, "atol": 1e-10}
HEADS = {"query_heads": 4, "key_value_heads": 4, "head_width": 4}


def made(kind, **options):
    mixer = ModelConfig(23, width=16, depth=2, pattern=(kind,), **(HEADS | options)).mixer(1)
    mixer.init_weights(torch.Generator().manual_seed(0))
    return randomise(mixer)


def normalised(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def canon(x, taps):
    """z + conv(z) of (T, H, K) with taps (H·K, W)."""
    flat = x.flatten(1).mT
    mixed = F.conv1d(F.pad(flat, (taps.shape[1] - 1, 0))[None], taps[:, None], groups=len(flat))[0]
    return (flat + mixed).mT.unflatten(1, (4, -1))


def restated(mixer, x, k, v, scale):
    """The global mixer's softmax layer over one row x (T, 16), of bare keys and values (T, 4, ·)."""
    width = k.shape[-1]
    q, gate = mixer.q_proj(x).unflatten(-1, (4, -1)).split((width, 4), -1)
    q, k = canon(normalised(q), mixer.canon_q), canon(normalised(k), mixer.canon_k)
    v = canon(v, mixer.canon_v)
    scores = scale * torch.einsum("ihk,jhk->hij", q, k)
    weights = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).softmax(-1)
    return (torch.einsum("hij,jhk->ihk", weights, v) * torch.sigmoid(gate)).flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("option", ["merge_qk", "symmetric", "identity_vo", "both"])
def test_matrices_that_a_transformer_can_do_without(option):
    options = {"merge_qk": True, "identity_vo": True} if option == "both" else {option: True}
    mixer, x = made("minimal", **options), torch.randn(11, 16, dtype=torch.float64)
    own = x.unflatten(-1, (4, 4))
    query = mixer.q_proj(x).unflatten(-1, (4, 8))[..., :4]
    k = own if "merge_qk" in options else query if "symmetric" in options else mixer.k_proj(x).unflatten(-1, (4, 4))
    v = own if "identity_vo" in options else mixer.v_proj(x).unflatten(-1, (4, 4))
    read = restated(mixer, x, k, v, 0.5)
    y = read if "identity_vo" in options else mixer.out_proj(read)
    torch.testing.assert_close(mixer(x[None])[0][0], y, **EXACT)
    assert sum(p.numel() for p in mixer.parameters()) < sum(p.numel() for p in made("nope").parameters())


@torch.no_grad()
def test_with_merged_or_symmetric_projections_equal_tokens_match_from_the_start():
    x = torch.randn(1, 1, 16).expand(1, 2, 16)
    for options in ({"merge_qk": True}, {"symmetric": True}):
        mixer = ModelConfig(23, width=16, depth=1, pattern=("minimal",), canon_taps=1, canon_init="uniform", **HEADS)
        mixer = mixer.changed(options).mixer(0)
        mixer.init_weights(torch.Generator().manual_seed(0))
        for taps in (mixer.canon_q, mixer.canon_k):
            taps.zero_()
        projected = mixer.project(x)
        torch.testing.assert_close(projected.q[:, :, 0], projected.k[:, :, 1])


@torch.no_grad()
def test_a_head_without_an_output_projection_is_still_a_channel_that_can_be_taken_away():
    model = randomise(Model(ModelConfig(23, width=16, depth=1, pattern=("minimal",), identity_vo=True, **HEADS)))
    tokens, seen = torch.arange(6)[None], []
    mixer = model.blocks[0].mixer
    assert "out_proj.weight" not in dict(mixer.named_parameters())
    mixer.register_forward_hook(lambda _mixer, _given, result: seen.append(result[0]))
    with masked(model, Part((0,), ("read",), 1)):
        model(tokens)
    assert not seen[0][..., 4:8].any() and seen[0][..., :4].all() and seen[0][..., 8:].all()


@torch.no_grad()
def test_a_trained_rank_narrows_projections_and_cache_and_scales_by_it():
    mixer, x = made("low_rank", qk_rank=3), torch.randn(11, 16, dtype=torch.float64)
    k, v = mixer.k_proj(x).unflatten(-1, (4, 3)), mixer.v_proj(x).unflatten(-1, (4, 4))
    torch.testing.assert_close(mixer(x[None])[0][0], mixer.out_proj(restated(mixer, x, k, v, 3**-0.5)), **EXACT)
    state = mixer.init_state(2, 7)
    assert state.keys.shape == (2, 4, 7, 3) and state.values.shape == (2, 4, 7, 4)


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("minimal", {"merge_qk": True, "symmetric": True}, "'symmetric' must be left out with merge_qk"),
        ("minimal", {"symmetric": True, "key_value_heads": 2}, "'key_value_heads' must be query_heads = 4 here"),
        ("minimal", {"identity_vo": True, "head_width": 8}, "'head_width' must be 16 / query_heads here"),
        ("low_rank", {"qk_rank": 4}, "'qk_rank' must be from 1 to 3 of head_width 4, not 4"),
        ("low_rank", {"qk_rank": 5, "directions": True}, "'qk_rank' must be from 1 to 4 of head_width 4, not 5"),
        ("low_rank", {"qk_rank": 2, "window": 3}, "'window' must be left out"),
        ("low_rank", {"qk_rank": 2, "memory": True}, "'memory' must be false"),
        ("low_rank", {"qk_rank": 2, "core": "polar"}, "'core' must be a softmax core"),
        ("low_rank", {"qk_rank": 2, "core": "rope"}, "'qk_rank' must be a multiple of 4 for core = \"rope\""),
    ],
)
def test_what_cannot_be_is_refused(kind, options, told):
    with pytest.raises(ValueError, match=told):
        ModelConfig(23, width=16, depth=1, pattern=(kind,), **(HEADS | options)).mixer(0)


def trained(core="polar", memory=True, vocab_size=257):
    """A model that is as if trained, in float64, and a text."""
    model = randomise(Model(tiny(core, memory).changed({"vocab_size": vocab_size})))
    return model, torch.randint(0, vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))


def test_the_directions_are_eigenvectors_and_the_rank_is_the_least_that_the_tolerance_allows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 50, 6, dtype=torch.float64, generator=generator) * torch.tensor([4.0, 2, 1, 0.5, 0.2, 0.1])
    k, q = x
    one = directions(Moments(k.mT @ k / 50, q.mT @ q / 50), 0.01)
    for head in range(2):
        basis = one.basis[head]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(6).double(), **EXACT)
        moment = (k[head] @ basis).square().mean(0)
        assert (moment.diff() <= 0).all()
        torch.testing.assert_close(basis * moment @ basis.mT, k[head].mT @ k[head] / 50, **EXACT)
        weight = moment * (q[head] @ basis).square().mean(0)
        allowed = [r for r in range(1, 7) if weight[r:].sum() <= 0.01 * weight.sum()]
        assert one.ranks[head] == min(allowed)
    assert 1 <= one.rank < 6 == directions(Moments(k.mT @ k, q.mT @ q), 0.0).rank


@torch.no_grad()
@pytest.mark.parametrize("core", ["polar", "nope", "rope", "rope+canon"])
def test_an_orthogonal_basis_of_full_rank_changes_nothing(core):
    model, tokens = trained(core)
    found = moments(model, [tokens[0].tolist()])
    config, layer = model.config, 2
    options = config.named()["global"].options | {"kind": "low_rank", "qk_rank": 8, "directions": True}
    pattern = ["local", "local", "full", "local"]
    same = Model(config.changed({"pattern": pattern, "mixers": {"full": options}})).double()
    own = model.state_dict() | {f"blocks.{layer}.mixer.core.directions": directions(found[layer], 0.0).basis}
    same.load_state_dict({k: own.get(k, own.get(k.replace("core.inner.", "core."))) for k in same.state_dict()})
    torch.testing.assert_close(same(tokens)[0], model(tokens)[0], **EXACT)
    hidden, state = same(tokens[:, :21], same.init_state(1, 40))
    torch.testing.assert_close(torch.cat([hidden, same(tokens[:, 21:], state)[0]], 1), model(tokens)[0], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("core", ["nope", "rope"])
def test_a_compressed_layer_reads_queries_and_keys_in_their_directions_alone(core):
    model, tokens = trained(core, memory=False)
    made, kept = compress(model, moments(model, [tokens[0].tolist()]), 0.2)
    rank, old, new = kept[2].rank, model.blocks[2].mixer, made.blocks[2].mixer
    assert rank < 8 and made.config.layers == ("local", "local", f"global_rank_{rank}", "local")
    x = torch.randn(1, 11, 16, dtype=torch.float64)
    projected, Q = old.project(x), kept[2].basis[..., :rank]
    q, k = (z @ Q @ Q.mT for z in (projected.q, projected.k))
    if core == "rope":
        q, k = (rotate(z, torch.arange(11)[None], (1 / 1024) ** torch.linspace(0, 1, 2).double()) for z in (q, k))
    scores = q @ k.mT * old.core.scale
    weights = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).softmax(-1)
    read = (weights @ projected.v * torch.sigmoid(projected.gate)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(new(x)[0], old.out_proj(read), **EXACT)
    state = new(x, new.init_state(1, 11))[1]
    torch.testing.assert_close(state.keys, projected.k @ Q, **EXACT)  # before the rotation


@pytest.mark.skipif(not native.available(), reason="the compiled kernels are not available here")
@pytest.mark.parametrize("core", ["polar", "rope"])
def test_a_compressed_model_decodes_recorded_and_is_served_as_it_reads(core):
    model, tokens = trained(core)
    made, _ = compress(model, moments(model, [tokens[0].tolist()]), 0.2)
    made = made.float().eval()
    with torch.inference_mode():
        expected = made.logits(made(tokens[:, :9])[0])[0, -1]
        decoder = Decoder(made, made(tokens[:, :7], made.init_state(1, 20))[1])
        for i in (7, 8):
            found = decoder.step(tokens[:, i : i + 1])[0].clone()
    assert decoder.how.startswith(RECORDED), decoder.how
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert served(made, tokens[0, :9].tolist(), 6) == greedy(made, tokens[:, :9], 6)


def test_compressing_a_folder_writes_one_whose_cache_is_smaller(tmp_path, capsys):
    model, _ = trained("nope")
    save_model(tmp_path / "model", model.float(), byte_tokenizer())
    (tmp_path / "texts.txt").write_text("To be, or not to be, that is the question. " * 9)
    words = ["compress", str(tmp_path / "model"), str(tmp_path / "small"), "--texts", str(tmp_path / "texts.txt")]
    assert main([*words, "--tolerance", "0.2", "--length", "64", "--tokens", "256"]) == 0
    told = capsys.readouterr().out
    small = load(tmp_path / "small")
    assert "layer 2: " in told and small.info["extra"]["compressed"]["tokens"] == 256
    assert states.nbytes(small.model.init_state(1, 50)) < states.nbytes(model.init_state(1, 50))
    assert main([*words, "--tolerance", "1"]) == 2
    assert "tolerance must be at least 0 and below 1, not 1.0" in capsys.readouterr().err
    assert main([*words[:1], str(tmp_path / "small"), *words[2:]]) == 2
    assert "nothing to compress" in capsys.readouterr().err


def test_layers_with_a_window_and_layers_that_need_every_direction_stay():
    model, tokens = trained("nope", memory=False)
    texts = [tokens[0].tolist()]
    with pytest.raises(ValueError, match="no text to calibrate on"):
        moments(model, [])
    assert compress(model, moments(model, texts), 0.0)[0].config.layers == model.config.layers
    with pytest.raises(ValueError, match="nothing to compress"):
        moments(Model(tiny("nope", False, window=7)), texts)
