"""Text from a model: `generate` in one piece, `stream` as it comes, `Generation` to save and continue.

The prompt passes through the state in chunks and generation is one token at a time through the same state, so a prompt
may have any length and a text may go on without end: the state grows by doubling, outside the model.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import Tensor

from atma import state as states
from atma.decoding import Decoder
from atma.disk import destination, sync
from atma.folders import reason
from atma.hashes import model_hash
from atma.model import Model
from atma.ops import native
from atma.sampling import choose, of_tokens
from atma.settings import Settings
from atma.text_stream import TextStream
from atma.tokenizer import Tokenizer

__all__ = ["Generation", "Settings", "generate", "stream"]

FORMAT = "atma generation 1"
_FIRST_CAPACITY = 256


@overload
def generate(model: Model, tokenizer: Tokenizer, prompt: str, settings: Settings | None = None) -> str: ...
@overload
def generate(model: Model, tokenizer: Tokenizer, prompt: list[str], settings: Settings | None = None) -> list[str]: ...
def generate(
    model: Model, tokenizer: Tokenizer, prompt: str | list[str], settings: Settings | None = None
) -> str | list[str]:
    """The text that follows a prompt, or each of several prompts. ValueError: a prompt has no tokens."""
    if isinstance(prompt, str):
        return "".join(stream(model, tokenizer, prompt, settings))
    return ["".join(stream(model, tokenizer, one, settings)) for one in prompt]


def stream(model: Model, tokenizer: Tokenizer, prompt: str, settings: Settings | None = None) -> Iterator[str]:
    """The text that follows a prompt, in pieces of whole characters. ValueError: the prompt has no tokens."""
    generation = Generation(model, tokenizer, settings)
    generation.feed(prompt)
    return generation.write()


class Generation:
    """A text being written: its tokens, the model's state, and the random numbers that choose what comes next.

    Like a document in training it begins with the end-of-text token, or with what the tokenizer says. The state has
    consumed every token but the last, which the next step consumes.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, settings: Settings | None = None) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings or Settings()
        bad = next((token for token in self.settings.stop_tokens if token >= tokenizer.vocab_size), None)
        if bad is not None:
            raise ValueError(f"'stop_tokens': token {bad} is outside the vocabulary of {tokenizer.vocab_size}")
        self.tokens = list(tokenizer.beginning)
        self.ended = ""
        """Why the last `write` ended: "length", "end" (of text or turn) or "stop"."""
        self._device = model.embed.weight.device
        self._state = model.init_state(1, _FIRST_CAPACITY)
        self._decoder: Decoder | None = None
        self._random = torch.Generator().manual_seed(self.settings.seed)
        self._seen = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
        self._text = TextStream(self.settings.stop)

    def feed(self, text: str) -> None:
        """Append `text` to what the model has read. ValueError: it has no tokens."""
        tokens = self.tokenizer.encode(text)
        if not tokens:
            raise ValueError("the prompt has no tokens; give it at least one character")
        if unread := (self.tokens[int(self._state.length[0]) :] + tokens)[:-1]:
            self._consume(unread)
        self._append(tokens)
        self._text = TextStream(self.settings.stop)

    def write(self) -> Iterator[str]:
        """Generate on, in pieces of whole characters, until `settings` say to end; `ended` then says why."""
        self.ended = ""
        self.tokens = self.tokens or [self.tokenizer.eot]
        if self._text.stopped:
            self._text = TextStream(self.settings.stop)
        ends = {*self.settings.stop_tokens, *(() if self.settings.ignore_end else (self.tokenizer.eot,))}
        written = 0
        while not self.ended:
            token = self._step()
            written += 1
            if token in ends:
                self.ended = "end"
                break
            piece = self._text.push(self.tokenizer.token_bytes(token))
            if self._text.stopped:
                self.ended = "stop"
            elif written == self.settings.max_tokens:
                self.ended = "length"
            if piece:
                yield piece
        if rest := self._text.flush():
            yield rest

    def save(self, path: str | Path) -> None:
        """Write everything `resume` needs to one safetensors file, where a link points. OSError: an older one stays."""
        about = {
            "format": FORMAT,
            "weights": model_hash(self.model),
            "tokenizer": self.tokenizer.hash(),
            "kernels": native.name(self._device),
            "tokens": self.tokens,
            "random": base64.b64encode(self._random.get_state().numpy().tobytes()).decode(),
            "text": self._text.memory(),
        }
        path, place = Path(path), destination(path)
        staging = place.with_name(f".{place.name}.staging")
        try:
            about["sha256"] = _digest(states.tensors(self._state), about)
            states.save(self._state, staging, {"generation": json.dumps(about)})
            sync(staging)
            staging.replace(place)
        except OSError as error:
            raise OSError(f"{path}: the state cannot be written: {reason(error)}") from None
        finally:
            staging.unlink(missing_ok=True)

    @classmethod
    def resume(cls, path: str | Path, model: Model, tokenizer: Tokenizer, settings: Settings | None = None) -> Self:
        """A saved text to go on with; with equal settings it goes on as if it had never been interrupted, to the bit
        where the same kernels compute. Others are told on stderr.

        ValueError: not a saved text, or of another model or tokenizer.
        """
        saved = states.read(path)
        about = _read_about(saved.metadata, path)
        if about.get("weights") != model_hash(model) or about.get("tokenizer") != tokenizer.hash():
            told = "another model, selection policy or tokenizer; continue it with those that wrote it"
            raise ValueError(f"{path}: saved with {told}")
        state = saved.build(model.init_state(1, 1))
        if about.pop("sha256", None) != _digest(saved.tensors(), about):
            raise ValueError(f"{path}: damaged: contents differ from the SHA-256 in it; write the text again")
        before, now = about.get("kernels"), native.name(model.embed.weight.device)
        if before not in (None, now):
            native.tell(f"{path} was written with {before}, goes on with {now}: equal up to rounding, not to the bit")
        generation = cls(model, tokenizer, settings)
        try:
            generation._restore(state, about)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged: {' '.join(str(error).split())}") from None
        except ValueError as error:
            raise ValueError(f"{path}: damaged: {error}") from None
        return generation

    def _restore(self, state: states.ModelState, about: dict[str, Any]) -> None:
        tokens, vocabulary = about["tokens"], self.tokenizer.vocab_size
        like = self.model.init_state(1, max(1, states.capacity(state)))
        if [x.shape for x in states.tensors(state)] != [x.shape for x in states.tensors(like)]:
            raise ValueError("its tensors are not those of one text, all of one capacity")
        if not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
            raise ValueError(f"its tokens are not all of the vocabulary of {vocabulary}")
        if int(state.length[0]) != len(tokens) - 1:
            raise ValueError(f"{len(tokens)} tokens, of which {int(state.length[0])} were read")
        self._state = state
        self.tokens = tokens[: len(self.tokens)]
        self._append(tokens[len(self.tokens) :])
        random = bytearray(base64.b64decode(about["random"]))
        self._random.set_state(torch.frombuffer(random, dtype=torch.uint8))
        self._text = TextStream(self.settings.stop, about["text"])

    @torch.inference_mode()
    def _step(self) -> int:
        self._reserve(1)
        self._decoder = self._decoder or Decoder(self.model, self._state)
        logits = self._decoder.step(torch.tensor([[self.tokens[-1]]], device=self._device))[0]
        self._state = self._decoder.state
        logits = of_tokens(logits.cpu(), self.tokenizer)
        token = choose(logits, self.settings, self._seen, self._random)
        self._append([token])
        return token

    @torch.inference_mode()
    def _consume(self, tokens: Sequence[int]) -> None:
        self._reserve(len(tokens))
        self._decoder = None
        for chunk in torch.tensor([tokens], device=self._device).split(self.settings.prefill_chunk, 1):
            _, self._state = self.model(chunk, self._state)

    def _append(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        if self.settings.repetition_penalty != 1:
            self._seen[torch.tensor(tokens)] = True
            self._seen[self.tokenizer.eot] = False

    def _reserve(self, tokens: int) -> None:
        needed, room = max(0, len(self.tokens) - 1) + tokens, states.capacity(self._state)
        if room and needed > room:
            self._state, self._decoder = states.grow(self._state, max(needed, 2 * room)), None


def _digest(tensors: Sequence[Tensor], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_about(metadata: dict[str, str], path: str | Path) -> dict[str, Any]:
    try:
        about = json.loads(metadata["generation"])
    except (KeyError, ValueError, RecursionError):
        raise ValueError(f"{path}: not a saved text (no generation in its metadata)") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path}: not a saved text (its metadata is no table)")
    if about.get("format") != FORMAT:
        raise ValueError(f"{path}: saved in format '{about.get('format')}'; this version reads '{FORMAT}'")
    return about
