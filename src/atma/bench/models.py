"""Our model as a contender: a training step, a token at a context, and a prompt, each as a call to be timed."""

import collections
import contextlib
import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from atma.bench.parity import FORWARD, GRADIENT, TOLERANCE, require, rms
from atma.config import ModelConfig, TrainConfig
from atma.decoding import Decoder
from atma.eval.stream import hidden_chunks
from atma.large_pages import in_large_pages
from atma.mixers import small
from atma.mixers.heads import Attending
from atma.model import Model
from atma.narrow import narrow, narrow_bytes
from atma.ops import use_backend
from atma.ops.narrow import Width
from atma.settings import Settings
from atma.state import nbytes, transform
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks
from atma.train.step import Stepper, computing

CHECKED = 96
"""Tokens of the parity check, on the preset cut to one period of its layers and 512 ids."""
LEAST = {"query_heads": 1, "key_value_heads": 1, "head_width": 16}
"""Sizes of a mixer with next to no arithmetic in it; 16 is the least head width that every kernel takes."""
FIELDS_FILLED = 0.5
SPARE = 32
"""Tokens that a decoding state is timed over before it is set back."""

NARROW = {"int8": 0.05, "int4": 0.5}
"""Of what is computed exactly, how far it may be from that with random weights in so few bits: a fault, such as a wrong
scale, moves it by more than all of it."""


class Batch(NamedTuple):
    """Random tokens (B, T), what follows each, and one document a row."""

    tokens: Tensor
    targets: Tensor
    segment_ids: Tensor


def batch_of(vocabulary: int, rows: int, length: int, device: torch.device) -> Batch:
    tokens = torch.randint(0, vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(1)).to(device)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(rows, length, dtype=torch.int32, device=device))


class Ours:
    """The model of a configuration on one backend. Training keeps float32 weights; else they are in `dtype`, or large
    ones in 8 or 4 bits if `weights` says so."""

    ours = True

    def __init__(
        self,
        config: ModelConfig,
        backend: str,
        dtype: torch.dtype,
        device: torch.device,
        weights: Width | None = None,
    ) -> None:
        self.name = f"atma {backend}" if weights is None else f"atma {backend} {weights}"
        self.config, self.backend = config, backend
        self.weights: Width | None = weights
        self.dtype, self.device = dtype, device

    def model(self) -> Model:
        return Model(self.config, torch.Generator().manual_seed(0)).to(self.device)

    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in Model(self.config, torch.Generator("cpu")).parameters())

    def reader(self, model: Model) -> Model:
        """A model as it is read: moved to the device, narrow or in the dtype."""
        if self.weights is not None:
            narrow(model, self.weights)
        model = model.to(self.device, self.dtype)
        in_large_pages([*model.parameters(), *model.buffers()])
        return model

    def trainer(self, rows: int, length: int) -> Callable[[], object]:
        """A whole optimiser step."""
        model, train = self.model(), TrainConfig(length=length, batch_tokens=rows * length)
        stepper = Stepper(model, Optimisers(model, train), train, self.dtype, Ranks())
        batch = batch_of(self.config.vocab_size, rows, length, self.device)
        return self._within(lambda: stepper(0, batch, 1.0))

    def decoder(self, rows: int, context: int) -> tuple[Callable[[], object], int]:
        """One more token at `context`, from at most SPARE tokens behind it; and the bytes that a token reads."""
        model = self.reader(self.model())
        read = weight_bytes(model, model.embed, self.config.tied_head) + nbytes(model.init_state(rows, context))
        state = transform(model.init_state(rows, context + SPARE), partial(_filled, context))
        decoder = Decoder(model, state)
        token = torch.zeros(rows, 1, dtype=torch.long, device=self.device)

        @torch.inference_mode()
        def step() -> Tensor:
            if decoder.room == 0:
                rewind(decoder, context)
            return decoder.step(token).argmax(-1)

        return self._within(step), read

    def prefill(self, rows: int, length: int) -> tuple[Callable[[], object], int]:
        """The next token's scores after a prompt, in chunks as generation reads it; and the bytes of the weights."""
        model = self.reader(self.model())
        tokens = batch_of(self.config.vocab_size, rows, length, self.device).tokens

        @torch.inference_mode()
        def read() -> Tensor:
            chunks = hidden_chunks(model, tokens, model.init_state(rows, length), Settings().prefill_chunk)
            _, hidden = collections.deque(chunks, maxlen=1)[0]
            return model.logits(hidden[:, -1:])

        return self._within(read), weight_bytes(model, model.embed, self.config.tied_head)

    def tiny(self) -> "Ours":
        """The same layers with next to no arithmetic in them, by the sizes of `LEAST` or those they are tested with."""
        mixers = dict(self.config.mixers)
        for name, one in self.config.named().items():
            own = {key: value for key, value in mixers.get(name, {}).items() if key in LEAST}
            least = {key: LEAST[key] for key in own} if LEAST.keys() & one.options else small(one.kind)[0]
            if least:
                mixers[name] = {"kind": one.kind, **mixers.get(name, {}), **least}
        shared = self.config.options | LEAST
        sizes = {"width": 16, "vocab_size": 16, "mlp_multiple": 1}
        config = dataclasses.replace(self.config, **sizes, mixers=mixers, options=shared)
        return Ours(config, self.backend, self.dtype, self.device, self.weights)

    def _within(self, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with use_backend(self.backend):
                return call()

        return run

    def check(self, kind: str) -> None:
        """ValueError unless a cut model computes as the reference does in float64, in the way of `kind`."""
        config = dataclasses.replace(
            self.config, depth=len(self.config.pattern), vocab_size=min(512, self.config.vocab_size)
        )
        exact_model = Model(config, torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in exact_model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        tokens = batch_of(config.vocab_size, 1, CHECKED, torch.device("cpu"))
        ways = {"train": self._trained, "decode": self._decoded, "prefill": self._read}
        with use_backend("reference"):
            truth = ways["train" if kind == "train" else "prefill"](
                copy.deepcopy(exact_model).double(), tokens, CHECKED
            )
        here = Batch(*(x.to(self.device) for x in tokens))
        model, given = self._low(exact_model, kind), (here, 40)
        with use_backend(self.backend):
            found = ways[kind](model, *given)
        low = self.dtype not in (torch.float32, torch.float64)
        if self.weights is not None:
            allowed = [NARROW[self.weights] * rms(x) for x in truth]
        elif low:
            with use_backend("reference"):
                plain = ways[kind](self._low(exact_model, kind), *given)
            factors = [FORWARD * 2, GRADIENT]
            allowed = [f * rms(a - b) for f, a, b in zip(factors, plain, truth, strict=False)]
        else:
            allowed = [TOLERANCE * max(1.0, rms(x)) for x in truth]
        require(f"{kind} of the model on the {self.backend} backend in {self.dtype}", found, truth, allowed)

    def _low(self, model: Model, kind: str) -> Model:
        made = copy.deepcopy(model)
        return made.to(self.device, torch.float32) if kind == "train" else self.reader(made)

    def _trained(self, model: Model, batch: Batch, chunk: int) -> list[Tensor]:
        """Loss of each token, and all gradients of their mean as one vector."""
        exact = model.embed.weight.dtype == torch.float64
        with contextlib.nullcontext() if exact else computing(self.device, self.dtype):
            losses = model.loss(model(batch.tokens, segment_ids=batch.segment_ids)[0], batch.targets)
        gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
        return [x.detach().double().cpu() for x in (losses, torch.cat([x.flatten() for x in gradients]))]

    @torch.inference_mode()
    def _read(self, model: Model, batch: Batch, chunk: int) -> list[Tensor]:
        state = model.init_state(1, CHECKED)
        parts = [hidden for _, hidden in hidden_chunks(model, batch.tokens, state, chunk)]
        return [model.logits(torch.cat(parts, 1)).double().cpu().clone()]

    @torch.inference_mode()
    def _decoded(self, model: Model, batch: Batch, chunk: int) -> list[Tensor]:
        """A prompt of `chunk` tokens, then token by token."""
        hidden, state = model(batch.tokens[:, :chunk], model.init_state(1, CHECKED))
        assert state is not None
        decoder, parts = Decoder(model, state), [model.logits(hidden)]
        for at in range(chunk, CHECKED):
            parts.append(decoder.step(batch.tokens[:, at : at + 1]).clone()[:, None])
        return [torch.cat(parts, 1).double().cpu()]


def rewind(decoder: Decoder, context: int) -> None:
    """Set the lengths of a decoder back to `context`; what it holds otherwise stays."""
    transform(decoder.state, lambda field, x: x.fill_(context) if field == "length" else x)
    decoder.room = SPARE


def weight_bytes(model: torch.nn.Module, embedding: torch.nn.Module, tied: bool) -> int:
    """Bytes of the weights that a token reads: all, but of an embedding that is not the head too."""
    return _held(model) if tied else _held(model) - _held(embedding)


def _held(module: torch.nn.Module) -> int:
    return narrow_bytes(module) + sum(p.numel() * p.element_size() for p in module.parameters())


def _filled(context: int, field: str, x: Tensor) -> Tensor:
    if field == "length":
        return torch.full_like(x, context)
    return torch.randn_like(x) * FIELDS_FILLED if x.is_floating_point() else x


def attention_cost(config: ModelConfig, rows: int, length: int) -> float:
    """Operations of the attention products over a prompt's visible pairs, all global layers."""
    with torch.device("meta"):
        mixers = [config.mixer(layer) for layer in range(config.depth)]
    pairs = length * (length + 1) / 2
    return sum(4 * one.head_width * one.heads * rows * pairs for one in mixers if isinstance(one, Attending))
