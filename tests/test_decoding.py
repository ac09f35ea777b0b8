"""Steps that are recorded once and replayed give what the model gives, for every core, dtype and batch."""

import dataclasses
import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from atma import state as states
from atma.config import preset
from atma.decoding import Decoder
from atma.model import Model
from atma.ops import native, use_backend
from atma.ops.native.recorder import Recorder, Unrecordable
from atma.state import ModelState
from tests.conftest import tiny
from tests.laws.conftest import randomise

KINDS = list(itertools.product(("polar", "nope", "rope", "rope+canon"), (False, True), (None, 7)))
needs_kernels = pytest.mark.skipif(not native.available(), reason="the compiled kernels are not available here")


def started(model, rows=2, read=9, capacity=40):
    """A state that has read a few tokens, another count in each row."""
    tokens = torch.randint(0, model.config.vocab_size, (rows, read), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        parts = [model(tokens[i : i + 1, : read - i], model.init_state(1, capacity))[1] for i in range(rows)]
        return states.stack(parts)


def both(model, state, steps=6):
    """Logits and states after each step, by a decoder and by the model."""
    other, decoder = states.fork(state), Decoder(model, state)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        tokens = torch.randint(0, model.config.vocab_size, (len(state.length), 1), generator=generator)
        with torch.inference_mode():
            hidden, other = model(tokens, other)
            yield decoder, decoder.step(tokens), model.logits(hidden[:, -1]), other


def assert_close(found, expected, tolerance):
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@needs_kernels
@pytest.mark.parametrize(("core", "memory", "window"), KINDS)
def test_every_step_and_the_state_after_it_are_the_model_s(core, memory, window):
    model = randomise(Model(tiny(core, memory, window)))
    for decoder, found, expected, other in both(model, started(model)):
        assert decoder.how.startswith("recorded")
        assert_close(found, expected, 1e-11)
        for mine, theirs in zip(states.tensors(decoder.state), states.tensors(other), strict=True):
            assert_close(mine, theirs, 1e-11)


@needs_kernels
def test_steps_with_stretched_positions_are_recorded_and_are_the_model_s():
    config = dataclasses.replace(tiny("rope"), rope_scaling="yarn", rope_factor=4.0, rope_trained=8)
    model = randomise(Model(config))
    for decoder, found, expected, _ in both(model, started(model)):
        assert decoder.how.startswith("recorded")
        assert_close(found, expected, 1e-11)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)])
def test_a_preset_in_every_dtype_and_batch(rows, dtype, tolerance):
    model = randomise(Model(preset("nano-test"))).to(dtype)
    for decoder, found, expected, _ in both(model, started(model, rows)):
        assert decoder.how.startswith("recorded")
        assert_close(found, expected, tolerance)


class Running(NamedTuple):
    """Of a toy mixer: a sum that fades, the last inputs in a ring, a table that each step turns."""

    length: Tensor
    total: Tensor
    ring: Tensor
    turned: Tensor
    before: Tensor


class Toy(nn.Module):
    """A model whose only layer updates its state in place, as its `finish` allows, recorded or not."""

    def __init__(self, finish):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.finish, self.embed = finish, nn.Embedding.from_pretrained(torch.randn(23, 8, generator=generator))

    def unchecked(self, tokens, state):
        x = self.embed(tokens)[:, 0]
        length, total, ring, turned, before = state.blocks[0]
        rows = torch.arange(len(x))
        total.mul_(0.9).add_(x, alpha=0.5)
        ring[rows, length % ring.shape[1]] = x
        turned = turned.add_(total[:, None]).roll(1, 1)
        y = self.finish(total * turned[:, 0] + ring.mean(1))
        after = Running(length.add_(1), total, ring, turned, before)
        return y[:, None], ModelState(state.length + 1, (after,))

    def logits(self, hidden):
        return hidden @ self.embed.weight.mT

    def init_state(self):
        state = Running(*(torch.zeros(2, *more) for more in ((), (8,), (3, 8), (4, 8), (8,))))
        return ModelState(torch.zeros(2, dtype=torch.int32), (state._replace(length=torch.zeros(2).int()),))


def written(step, steps=9):
    """The greedy text of every row, and the scores of each step."""
    token, scores = torch.tensor([[3], [5]]), []
    for _ in range(steps):
        scores.append(step(token).clone())
        token = scores[-1].argmax(-1, keepdim=True)
    return torch.stack(scores)


def plainly(model):
    state = model.init_state()

    def step(tokens):
        nonlocal state
        hidden, state = model.unchecked(tokens, state)
        return model.logits(hidden[:, -1])

    return written(torch.no_grad()(step))


def test_a_state_that_a_failed_recording_has_changed_in_place_is_put_back():
    model = Toy(lambda x: x.sort(-1).values)
    decoder = Decoder(model, model.init_state())
    assert torch.equal(written(decoder.step), plainly(model))
    assert decoder.how.startswith("eager: ")


@needs_kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_state_that_is_changed_in_place_is_recorded(mode):
    model = Toy(torch.tanh)
    with mode():
        decoder = Decoder(model, model.init_state())
    assert_close(written(decoder.step), plainly(model), 1e-5)
    assert decoder.how.startswith("recorded")


@needs_kernels
def test_parts_of_a_state_that_change_places_are_recorded():
    class Swapping(Toy):
        def unchecked(self, tokens, state):
            hidden, after = super().unchecked(tokens, state)
            block = after.blocks[0]
            swapped = block._replace(total=(block.total + block.before) / 2, before=block.total)
            return hidden, after._replace(blocks=(swapped,))

    model = Swapping(torch.tanh)
    decoder = Decoder(model, model.init_state())
    assert_close(written(decoder.step), plainly(model), 1e-5)
    assert decoder.how.startswith("recorded")


def test_a_state_that_becomes_larger_is_stepped_by_the_model():
    class Growing(Toy):
        def unchecked(self, tokens, state):
            hidden, after = super().unchecked(tokens, state)
            block = after.blocks[0]
            return hidden, after._replace(blocks=(block._replace(turned=torch.cat([block.turned, block.turned], 1)),))

    model = Growing(torch.tanh)
    decoder = Decoder(model, model.init_state())
    assert torch.equal(written(decoder.step), plainly(model))
    assert decoder.how.startswith("eager: ")


@needs_kernels
def test_more_rows_than_the_compiled_product_takes_are_computed_by_the_model_and_it_says_so():
    model = randomise(Model(tiny()))
    for decoder, found, expected, _ in both(model, started(model, rows=9), steps=2):
        assert decoder.how.startswith("eager: aten.")
        assert torch.equal(found, expected)


def test_without_compiled_kernels_the_model_is_called():
    model = randomise(Model(tiny()))
    with use_backend("cpu"):
        for decoder, found, expected, _ in both(model, started(model), steps=2):
            assert decoder.how.startswith("eager")
            assert torch.equal(found, expected)


def test_a_full_state_is_refused_before_anything_is_written():
    model = randomise(Model(tiny()))
    decoder = Decoder(model, started(model, capacity=10))
    decoder.step(torch.zeros(2, 1, dtype=torch.long))
    kept = states.fork(decoder.state)
    with pytest.raises(ValueError, match="capacity of 10 is used up"):
        decoder.step(torch.zeros(2, 1, dtype=torch.long))
    assert all(map(torch.equal, states.tensors(kept), states.tensors(decoder.state)))


def test_tokens_of_another_shape_are_refused():
    model = randomise(Model(tiny()))
    with pytest.raises(ValueError, match=r"must be \(2, 1\)"):
        Decoder(model, started(model)).step(torch.zeros(2, 2, dtype=torch.long))


@needs_kernels
def test_steps_without_grad_mode_of_the_caller_record_no_gradients():
    model = randomise(Model(tiny()))
    assert not Decoder(model, started(model)).step(torch.zeros(2, 1, dtype=torch.long)).requires_grad


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "compute",
    [
        lambda x, y: (x.mT + y.mT).contiguous() * 3,
        lambda x, y: x[:, :1] - y / 2,
        lambda x, y: torch.cat([x, y[:, 1:]], 1).sigmoid(),
        lambda x, y: torch.nn.functional.logsigmoid(x).clamp(-0.5, -0.1),
        lambda x, y: torch.nn.functional.normalize(x.transpose(0, 2), dim=-1),
        lambda x, y: torch.maximum(x, y).double().cos() + (x * 100).to(torch.int32),
        lambda x, y: (1 + x.square()).rsqrt() * y,
        lambda x, y: torch.zeros_like(x) + torch.arange(x.shape[-1]) * y,
    ],
)
def test_a_replay_computes_from_new_values(compute, dtype):
    x, y = torch.zeros(3, 5, 700, dtype=dtype), torch.zeros(3, 5, 700, dtype=dtype)
    with torch.no_grad(), Recorder([x, y]) as recorder:
        result = compute(x, y)
    program = recorder.program()
    for seed in range(2):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        y.copy_(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 9)))
        program.replay()
        exact = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3}[dtype]
        torch.testing.assert_close(result, compute(x, y), rtol=exact, atol=exact)


@needs_kernels
def test_nan_passes_through_a_replay():
    x = torch.zeros(4)
    with torch.no_grad(), Recorder([x]) as recorder:
        results = [x.sigmoid(), x.clamp(-1, 1), x * 2, torch.nn.functional.logsigmoid(x)]
    x.fill_(float("nan"))
    recorder.program().replay()
    assert all(found.isnan().all() for found in results)


@needs_kernels
def test_a_timed_step_is_a_step_and_names_its_kernels():
    model = randomise(Model(tiny()))
    mine, other = (Decoder(model, started(model)) for _ in range(2))
    token = torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="none was made"):
        mine.timed(token)
    mine.step(token), other.step(token)
    names = {name for name, seconds in mine.timed(token) if seconds > 0}
    assert {"linear_float64", "polar_forward_float64", "recurrence_forward_float64", "conv_forward_float64"} <= names
    assert torch.equal(mine.step(token), [other.step(token) for _ in range(2)][1])


@needs_kernels
@pytest.mark.parametrize("read", [lambda x: int(x[0]), lambda x: x[0].item()])
def test_a_value_read_by_python_is_refused_rather_than_frozen(read):
    x = torch.arange(3, dtype=torch.int32)
    with pytest.raises(Unrecordable), torch.no_grad(), Recorder([x]):
        read(x)
