"""Layers with a window hold their window alone, however long the text is."""

import pytest
import torch

from atma import state as states
from atma.config import ModelConfig
from atma.decoding import RECORDED, Decoder, way
from atma.generation import Generation, Settings
from atma.mixers.attention import GlobalState
from atma.model import Model
from atma.tokenizer import byte_tokenizer
from tests.conftest import tiny
from tests.laws.conftest import randomise

SHAPE = {"query_heads": 2, "key_value_heads": 1, "head_width": 8}
CORES = ("polar", "nope", "rope")


def layer(core: str, window: int):
    config = ModelConfig(23, 16, depth=2, pattern=("attention",), core=core, window=window, memory=False, **SHAPE)
    mixer = config.mixer(1)
    mixer.init_weights(None)
    return randomise(mixer)


def inputs(rows: int, length: int) -> torch.Tensor:
    return torch.randn(rows, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def mixed(window: int = 7) -> Model:
    """A layer that sees everything, and one that sees its window."""
    mixers = {"far": {"kind": "attention"}, "near": {"kind": "attention", "window": window}}
    return Model(ModelConfig(257, 16, depth=2, pattern=("far", "near"), mixers=mixers, mlp_multiple=2, **SHAPE))


@pytest.mark.parametrize("cuts", [(1,) * 40, (5, 1, 1, 20, 13), (40,), (1, 39), (33, 1, 6)])
@pytest.mark.parametrize("window", [1, 2, 7, 33, 50])
@pytest.mark.parametrize("core", CORES)
@torch.no_grad()
def test_any_window_in_any_cut_gives_what_no_state_gives(core: str, window: int, cuts) -> None:
    mixer, x = layer(core, window), inputs(2, 40)
    state, parts = mixer.init_state(2, 1), []
    for part in x.split(cuts, 1):
        y, state = mixer(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("core", CORES)
@torch.no_grad()
def test_rows_of_a_window_may_stand_anywhere(core: str, tokens: int) -> None:
    mixer, x = layer(core, 7), inputs(4, 40)
    standing = [0, 4, 7, 30]
    alone = [
        mixer(x[b : b + 1, :n], mixer.init_state(1, 1))[1] if n else mixer.init_state(1, 1)
        for b, n in enumerate(standing)
    ]
    new = torch.stack([x[b, n : n + tokens] for b, n in enumerate(standing)])
    y, after = mixer(new, states.stack(alone))
    for b, n in enumerate(standing):
        expected = mixer(x[b : b + 1, : n + tokens])[0][:, n:]
        torch.testing.assert_close(y[b : b + 1], expected, rtol=1e-10, atol=1e-10)
    assert after.length.tolist() == [n + tokens for n in standing]


@torch.no_grad()
def test_the_state_of_a_window_has_one_size_for_any_text() -> None:
    model = Model(tiny(window=7))
    small, large = model.init_state(2, 1), model.init_state(2, 100_000)
    assert states.nbytes(small) == states.nbytes(large)
    assert states.capacity(large) == 0
    _, after = model(torch.zeros(2, 300, dtype=torch.long), small)
    assert states.nbytes(after) == states.nbytes(large)


def test_one_token_takes_the_place_of_the_oldest_and_copies_nothing() -> None:
    mixer = layer("nope", 7)
    with torch.no_grad():
        _, state = mixer(inputs(1, 30), mixer.init_state(1, 1))
        before = states.fork(state)
        _, after = mixer(inputs(1, 1), state)
    assert after.keys.data_ptr() == state.keys.data_ptr()
    changed = (after.keys != before.keys).flatten(0, 1).any(-1)
    assert [bool(x) for x in changed[0]] == [place == 30 % 7 for place in range(7)]


@torch.no_grad()
def test_what_one_query_sees_can_be_had_in_the_order_of_positions() -> None:
    mixer, new = layer("nope", 7), inputs(2, 1)
    _, state = mixer(inputs(1, 30), mixer.init_state(1, 1))
    projected = mixer.project(new[:1], state)
    ring, ordered = (mixer.attended(states.fork(state), projected.k, projected.v, order) for order in (False, True))
    assert torch.equal(ordered.keys, ring.keys.roll(-(31 % 7), 2))
    assert all(torch.equal(a, b) for a, b in zip(ordered.held, ring.held, strict=True))


def test_with_gradients_a_window_is_not_written() -> None:
    mixer = layer("nope", 7)
    with torch.no_grad():
        _, state = mixer(inputs(1, 30), mixer.init_state(1, 1))
    kept, x = states.fork(state), inputs(1, 1).requires_grad_()
    y, after = mixer(x, state)
    y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(states.tensors(state), states.tensors(kept), strict=True))
    assert after.keys.requires_grad and x.grad is not None


@torch.no_grad()
def test_a_branch_writes_into_a_window_of_its_own() -> None:
    model = randomise(Model(tiny(window=7)))
    _, state = model(torch.arange(20)[None], model.init_state(1, 1))
    kept = states.fork(state)
    model(torch.tensor([[3]]), states.branch(state))
    assert all(torch.equal(a, b) for a, b in zip(states.tensors(state), states.tensors(kept), strict=True))


@torch.no_grad()
def test_layers_with_and_without_a_window_stand_in_one_model() -> None:
    model = randomise(mixed())
    tokens = torch.randint(0, 257, (2, 50), generator=torch.Generator().manual_seed(2))
    expected, state = model(tokens)[0], model.init_state(2, 50)
    assert states.capacity(state) == 50
    first, state = model(tokens[:, :30], state)
    rest = []
    for i in range(30, 50):
        y, state = model(tokens[:, i : i + 1], state)
        rest.append(y)
    torch.testing.assert_close(torch.cat([first, *rest], 1), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="capacity of 50"):
        model(tokens[:, :1], state)


@pytest.mark.parametrize("core", CORES)
def test_steps_of_a_window_are_recorded_and_go_on_past_any_capacity(core: str) -> None:
    model = randomise(Model(tiny(core, window=7)))
    tokens = torch.randint(0, 23, (2, 60), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = model.logits(model(tokens)[0])
        _, state = model(tokens[:, :5], model.init_state(2, 1))
        decoder = Decoder(model, state)
        assert decoder.room is None
        for i in range(5, 60):
            torch.testing.assert_close(decoder.step(tokens[:, i : i + 1]), expected[:, i], rtol=1e-10, atol=1e-10)
    assert decoder.how.startswith(way("cpu", torch.float64))
    if way("cpu", torch.float64) == RECORDED:
        assert decoder._recorded is not None


@pytest.mark.parametrize("read", [0, 3, 7, 30])
@torch.no_grad()
def test_a_state_that_was_saved_with_the_keys_of_the_whole_text_goes_on_as_a_window(read: int, tmp_path) -> None:
    mixer, x = layer("rope", 7), inputs(2, 31)
    state = mixer.init_state(2, 1)
    if read:
        _, state = mixer(x[:, :read], state)
    projected = mixer.project(x[:, :read]) if read else None
    keys, values = (state.keys.new_zeros(2, 1, 40, 8) for _ in range(2))
    if projected is not None:
        _, turned = mixer.core.turn(projected.q, projected.k, None, None)
        keys, values = (torch.cat([z, keys[:, :, read:]], 2) for z in (turned, projected.v))
    whole = GlobalState(state.length, keys, values, *state[3:])
    states.save(whole, tmp_path / "old")
    loaded, _ = states.load(tmp_path / "old", mixer.init_state(1, 1))
    assert type(loaded) is type(state)
    assert all(torch.equal(a, b) for a, b in zip(states.tensors(loaded), states.tensors(state), strict=True))
    expected = mixer(x[:, : read + 1])[0][:, -1:]
    torch.testing.assert_close(mixer(x[:, read : read + 1], loaded)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("change", ["length", "shape", "kind"])
@torch.no_grad()
def test_an_earlier_state_that_does_not_fit_is_refused(change: str, tmp_path) -> None:
    mixer = layer("rope", 7)
    state, keys = mixer.init_state(1, 1), torch.zeros(1, 1, 4, 8, dtype=torch.float64)
    whole = GlobalState(state.length + (5 if change == "length" else 4), keys, keys.clone(), *state[3:])
    if change == "shape":
        whole = whole._replace(keys=keys[0])
    states.save(whole, tmp_path / "old")
    like = mixer.init_state(1, 1) if change != "kind" else states.ModelState(state.length, ())
    with pytest.raises(ValueError, match="not a saved state of this model"):
        states.load(tmp_path / "old", like)


def test_a_saved_text_of_a_window_goes_on_as_if_never_interrupted(tmp_path) -> None:
    model, tokenizer = (
        randomise(Model(ModelConfig(257, 16, depth=2, pattern=("rope",), window=7, **SHAPE))),
        byte_tokenizer(),
    )
    whole = Generation(model, tokenizer, Settings(max_tokens=600, temperature=0, ignore_end=True))
    whole.feed("some text")
    expected = "".join(whole.write())
    half = Generation(model, tokenizer, Settings(max_tokens=300, temperature=0, ignore_end=True))
    half.feed("some text")
    text = "".join(half.write())
    half.save(tmp_path / "half")
    again = Generation.resume(
        tmp_path / "half", model, tokenizer, Settings(max_tokens=300, temperature=0, ignore_end=True)
    )
    assert text + "".join(again.write()) == expected
    assert (tmp_path / "half").stat().st_size < 20_000
