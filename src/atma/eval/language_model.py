"""START HERE for suites. What evaluation asks of a causal language model, and our own models as such.

Two questions are enough for every suite: what did these tokens cost you (`score`), and how do you go on (`generate`).
`OwnModel` answers them with our models, `atma.eval.hugging_face.HuggingFace` with any of transformers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from atma.decoding import Decoder
from atma.eval.loaded import Loaded, tokenizer_of
from atma.eval.provenance import model_provenance
from atma.eval.stream import DEFAULT, Advance, Streaming, pieces, score
from atma.loading import called
from atma.model import Model
from atma.sampling import of_tokens
from atma.state import ModelState
from atma.tokenizer import Tokenizer

Row = dict[str, Any]
"""A line of results: plain JSON data by name."""
LOGITS = 1 << 25
"""The most logits that are held at once."""


class Scored(NamedTuple):
    """Of each target (B, last): its cost in nats, float64, and whether it was the likeliest of all tokens, bool."""

    nats: np.ndarray
    right: np.ndarray


class LanguageModel(Protocol):
    """A causal language model with its own tokenizer. Token ids are that tokenizer's; no token is ever added."""

    @property
    def name(self) -> str:
        """What rows call it."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Its own."""
        ...

    @property
    def streaming(self) -> Streaming:
        """How many tokens it reads at once."""
        ...

    @property
    def longest(self) -> int | None:
        """The most tokens it can read, None for any number."""
        ...

    @property
    def truncated(self) -> int:
        """Tokens that were dropped so far because a text was longer than `longest`, if that was allowed."""
        ...

    def score(self, tokens: Tensor, last: int | None = None, progress: Advance | None = None) -> np.ndarray:
        """Nats (B, last) float64 of the `last` of T targets (default all) of tokens (B, T + 1) int64.

        ValueError: fewer than two tokens, more than `longest`, an id outside the vocabulary, or a loss not finite.
        """
        ...

    def predict(self, tokens: Tensor, last: int, progress: Advance | None = None) -> Scored:
        """`score`, with whether each target was the likeliest: of few targets, for it looks at every logit."""
        ...

    def generate(self, prompt: Sequence[int], most: int, stop: Sequence[int] = ()) -> list[int]:
        """The greedy continuation of a prompt: `most` tokens, or fewer where end-of-text or one of `stop` comes.

        The token that ended it is left out. ValueError: no prompt, or prompt and continuation pass `longest`.
        """
        ...

    def provenance(self) -> Row:
        """Plain JSON data: hashes of weights and tokenizer, and the settings that move figures."""
        ...


class OwnModel:
    """One of our models, read in chunks through its state."""

    def __init__(self, loaded: Loaded, streaming: Streaming = DEFAULT) -> None:
        self.loaded, self.streaming = loaded, streaming
        self.tokenizer = tokenizer_of(loaded)
        self.name = called(loaded.path) if loaded.path else "model"
        self.longest, self.truncated = None, 0

    def score(self, tokens: Tensor, last: int | None = None, progress: Advance | None = None) -> np.ndarray:
        """`LanguageModel.score`."""
        return score(self.loaded.model, tokens, last, self.streaming, progress).double().numpy()

    @torch.inference_mode()
    def predict(self, tokens: Tensor, last: int, progress: Advance | None = None) -> Scored:
        """`LanguageModel.predict`."""
        model, goals = self.loaded.model, tokens[:, tokens.shape[1] - last :]
        nats, right = np.empty(goals.shape), np.empty(goals.shape, bool)
        first = tokens.shape[1] - 1 - last
        for rows, positions, hidden in pieces(model, tokens[:, :-1], last, self.streaming, progress):
            columns = slice(positions.start - first, positions.stop - first)
            nats[rows, columns], right[rows, columns] = scored(hidden, goals[rows, columns], model)
        return Scored(finite(nats), right)

    def generate(self, prompt: Sequence[int], most: int, stop: Sequence[int] = ()) -> list[int]:
        """`LanguageModel.generate`."""
        check_prompt(prompt, most, self.longest)
        return self.go_on(self.read(prompt[:-1], 1 + most), prompt[-1], most, stop)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], room: int, progress: Advance | None = None) -> ModelState:
        """The state after the tokens, with room for so many more; no tokens are a fresh state."""
        ids = torch.tensor([list(tokens)], dtype=torch.long, device=self.device)
        state: ModelState | None = self.loaded.model.init_state(1, len(tokens) + room)
        for chunk in ids.split(self.streaming.chunk, 1) if len(tokens) else ():
            _, state = self.loaded.model(chunk, state)
            if progress is not None:
                progress(chunk.shape[1])
        assert state is not None
        return state

    def go_on(self, state: ModelState, last: int, most: int, stop: Sequence[int] = ()) -> list[int]:
        """`generate` after a state, which is used up, and the token `last`. ValueError: a logit is not finite."""
        decoder, ends = Decoder(self.loaded.model, state), {self.tokenizer.eot, *stop}
        written: list[int] = []
        while len(written) < most:
            logits = decoder.step(torch.tensor([[last]], device=self.device))[0]
            if not logits.isfinite().all():
                raise ValueError(f"token {len(written)}: a logit is not finite; check the model's weights")
            last = int(of_tokens(logits, self.tokenizer).argmax())
            if last in ends:
                break
            written.append(last)
        return written

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.loaded.model.parameters()).device

    def provenance(self) -> Row:
        """`LanguageModel.provenance`."""
        return model_provenance(self.loaded) | self.streaming._asdict()


def by_length(model: LanguageModel) -> bool:
    """Whether a model reads a prefix otherwise than as the beginning of a longer text: then none stands for another."""
    return getattr(model, "by_length", False)


def scored(given: Tensor, goals: Tensor, model: Model | None = None) -> Scored:
    """What logits (..., V), or a model's final hidden states (..., D), say of goals (...), LOGITS of them at once."""
    size = max(1, LOGITS // (given.shape[-1] if model is None else model.config.vocab_size))
    parts = zip(given.flatten(0, -2).split(size), goals.flatten().to(given.device).split(size), strict=True)
    nats, right = [], []
    for some, goal in parts:
        logits = (some if model is None else model.logits(some)).double()
        nats.append(logits.logsumexp(-1) - logits.gather(-1, goal[:, None])[:, 0])
        right.append(logits.argmax(-1) == goal)
    both = (torch.cat(found).reshape(goals.shape).cpu().numpy() for found in (nats, right))
    return Scored(*both)


def check_prompt(prompt: Sequence[int], most: int, longest: int | None) -> None:
    """ValueError unless there is a prompt, something to write, and room for both."""
    if not prompt or most < 1:
        raise ValueError(f"a continuation needs a prompt and a token to write, not {len(prompt)} and {most}")
    if longest is not None and len(prompt) + most > longest:
        raise ValueError(f"{len(prompt)} tokens and {most} more pass the model's longest context of {longest}")


def check_length(model: LanguageModel, tokens: int) -> None:
    """ValueError if so many tokens pass what a model can read and nothing may be dropped."""
    if model.longest is not None and tokens > model.longest and not getattr(model, "truncate", False):
        raise ValueError(
            f"{tokens} tokens pass the {model.longest} positions that {model.name} has learned; "
            "choose shorter lengths, or allow truncation to drop the beginning"
        )


def finite(nats: np.ndarray) -> np.ndarray:
    """The same costs. ValueError where one is not finite."""
    if not np.isfinite(nats).all():
        row, column = np.argwhere(~np.isfinite(nats))[0].tolist()
        raise ValueError(f"row {row}: the loss of target {column} is not finite; check the model's weights")
    return nats
