"""Any causal language model of Hugging Face transformers, as evaluation sees one.

It reads in pieces through its own cache, so that length costs no more memory than the cache does. Not every model has a
cache that can be trusted with that: whether reading in two pieces equals reading at once is tried first, and where it
does not, texts are read in one piece. A model that is not causal is refused. Nothing is loaded but safetensors, and no
code of a model's folder is run.
"""

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer as Backend
from torch import Tensor

from atma.eval.language_model import LOGITS, Row, Scored, check_prompt, finite, scored
from atma.eval.provenance import software
from atma.eval.stream import DEFAULT, Advance, Streaming
from atma.eval.suite import sha256
from atma.eval.transformers_cache import cache_argument, cache_of
from atma.hashes import module_hash
from atma.tokenizer import Tokenizer


class HuggingFace:
    """A transformers model and its tokenizer. `truncate` drops what a text has too much at its beginning."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, name: str, streaming: Streaming = DEFAULT, truncate: bool = False
    ) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.streaming, self.truncate, self.truncated = streaming, truncate, 0
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.longest, self._why = _longest(model)
        self.pieces = _reads_in_pieces(model, name)

    def score(self, tokens: Tensor, last: int | None = None, progress: Advance | None = None) -> np.ndarray:
        """`LanguageModel.score`."""
        return self.predict(tokens, tokens.shape[1] - 1 if last is None else last, progress).nats

    @torch.inference_mode()
    def predict(self, tokens: Tensor, last: int, progress: Advance | None = None) -> Scored:
        """`LanguageModel.predict`."""
        read = tokens.shape[1] - 1
        tokens = self._fitting(tokens, last)
        rows = max(1, self.streaming.batch_tokens // (tokens.shape[1] - 1))
        dropped = read - (tokens.shape[1] - 1)
        parts = []
        for group in tokens.split(rows):
            parts.append(self._predict(group, last, progress))
            if progress is not None and dropped:
                progress(dropped * len(group))
        return Scored(finite(np.concatenate([part.nats for part in parts])), np.concatenate([p.right for p in parts]))

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], most: int, stop: Sequence[int] = ()) -> list[int]:
        """`LanguageModel.generate`."""
        check_prompt(prompt, most, None if self.truncate else self.longest)
        ids = list(prompt)
        if self.longest is not None and (excess := len(ids) + most - self.longest) > 0:
            if most >= self.longest:
                raise ValueError(f"{most} tokens to write leave {self.name} none of its {self.longest} for a prompt")
            self.truncated += excess
            ids = ids[excess:]
        ends, written = {self.tokenizer.eot, *stop}, []
        *_, (_, logits, cache) = self._read(torch.tensor([ids]), 1)
        while True:
            token = int(logits[0, -1, : self.tokenizer.vocab_size].argmax())
            if token in ends:
                return written
            written.append(token)
            if len(written) == most:
                return written
            ids = [token] if self.pieces else [*ids, token]
            [(_, logits, cache)] = self._read(torch.tensor([ids]), 1, cache)

    def provenance(self) -> Row:
        """`LanguageModel.provenance`."""
        weight = next(self.model.parameters())
        own = {
            "weights_sha256": module_hash(self.model),
            "model_config_sha256": _config_hash(self.model.config),
            "tokenizer_sha256": self.tokenizer.hash(),
            "start": self.tokenizer.start,
            "transformers": transformers().__version__,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device.type,
            "backend": f"transformers {getattr(self.model.config, '_attn_implementation', '')}".strip(),
            "model": self.name,
            "core": self.model.config.model_type,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "truncate": self.truncate,
            "in_pieces": self.pieces,
        }
        return software() | own | self.streaming._asdict()

    def _fitting(self, tokens: Tensor, last: int) -> Tensor:
        B, T = tokens.shape[0], tokens.shape[1] - 1
        if not 1 <= last <= T:
            raise ValueError(f"cannot score the last {last} of {T} tokens; give at least one token of context a target")
        low, high = int(tokens.min()), int(tokens.max())
        vocabulary = self.model.get_input_embeddings().num_embeddings
        if low < 0 or high >= vocabulary:
            raise ValueError(f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocabulary}")
        if self.longest is None or self.longest >= T:
            return tokens
        if not self.truncate:
            raise ValueError(
                f"{T} tokens pass the {self.longest} positions that {self.name} has learned{self._why}; "
                "choose shorter lengths, or allow truncation to drop the beginning"
            )
        if last > self.longest:
            raise ValueError(f"{last} targets do not fit the {self.longest} positions that {self.name} has learned")
        self.truncated += B * (T - self.longest)
        return tokens[:, T - self.longest :]

    def _predict(self, tokens: Tensor, last: int, progress: Advance | None) -> Scored:
        inputs, goals = tokens[:, :-1], tokens[:, tokens.shape[1] - last :]
        nats, right = np.empty(goals.shape), np.empty(goals.shape, bool)
        first = inputs.shape[1] - last
        for start, logits, _ in self._read(inputs, last, progress=progress):
            columns = slice(start - first, start - first + logits.shape[1])
            nats[:, columns], right[:, columns] = scored(logits, goals[:, columns])
        return Scored(nats, right)

    def _read(
        self, inputs: Tensor, last: int, cache: Any = None, progress: Advance | None = None
    ) -> Iterator[tuple[int, Tensor, Any]]:
        """Yield (position, logits (B, n, V), cache) for the `last` positions of inputs (B, T), in order.

        A cache of what came before only for a model that is read in pieces; any other is read from the beginning.
        """
        B, T = inputs.shape
        inputs, name = inputs.to(self.model.device), cache_argument(self.model) if self.pieces else None
        for start, stop in self._cuts(B, T, T - last):
            keep = max(0, stop - max(start, T - last))
            given = {"use_cache": False} if name is None else {"use_cache": True, name: cache}
            try:
                out = self.model(input_ids=inputs[:, start:stop], logits_to_keep=max(1, keep), **given)
            except IndexError as error:  # a table of positions that `_longest` did not find
                raise ValueError(f"{self.name} cannot read {T} tokens: {error}") from None
            cache = cache_of(out) if self.pieces else None
            if keep:
                yield stop - keep, out.logits, cache
            if progress is not None:
                progress(B * (stop - start))

    def _cuts(self, B: int, T: int, first: int) -> Iterator[tuple[int, int]]:
        """Where reading stops and goes on: in pieces, smaller where logits are wanted."""
        if not self.pieces:
            yield 0, T
            return
        small = max(1, min(self.streaming.chunk, LOGITS // (B * self.vocabulary)))
        start = 0
        while start < T:
            size = self.streaming.chunk if start + self.streaming.chunk <= first else small
            stop = min(T, start + size) if start >= first else min(first or T, T, start + size)
            yield start, stop
            start = stop


def load(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    streaming: Streaming = DEFAULT,
    truncate: bool = False,
) -> HuggingFace:
    """A folder, or the name of a model on the hub (which transformers then downloads or finds in its cache).

    ValueError: transformers is not installed, there is no such model, its files are damaged or lack weights, or its
    tokenizer is no fast one or has no end-of-text token.
    """
    library = transformers()
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, told = library.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **options)
        theirs = library.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ValueError(f"{name}: cannot be loaded as a causal language model of transformers: {error}") from None
    _check_complete(name, told)
    start = theirs.bos_token_id
    eot = theirs.eos_token_id if theirs.eos_token_id is not None else start
    if not theirs.is_fast or eot is None:
        raise ValueError(f"{name}: the tokenizer must be a fast one with an end-of-text token")
    tokenizer = Tokenizer(Backend.from_str(theirs.backend_tokenizer.to_str()), int(eot), start)
    return HuggingFace(model.to(device), tokenizer, Path(name).name, streaming, truncate)


def _check_complete(name: str, told: dict[str, Any]) -> None:
    """ValueError if transformers drew weights at random because the files lack them, or have others of that name."""
    if told["mismatched_keys"]:
        key, theirs, own = min(told["mismatched_keys"])
        raise ValueError(
            f"{name}: its weights do not fit its config.json: '{key}' is {list(theirs)} in the files, {list(own)} in "
            "the model; give a folder whose files belong together"
        )
    if told["missing_keys"]:
        first, count = min(told["missing_keys"]), len(told["missing_keys"])
        raise ValueError(
            f"{name}: its files hold no weights for '{first}', one of {count} such that would be random; "
            "give a folder with all weights of a causal language model"
        )


def _config_hash(config: Any) -> str:
    """SHA-256 of a configuration without where it came from: rotary scaling and windows are in no weight."""
    told = json.loads(config.to_json_string(use_diff=False))
    return sha256(
        {name: value for name, value in told.items() if name not in ("_name_or_path", "transformers_version")}
    )


def transformers() -> Any:
    """The library. ValueError where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise ValueError("models of Hugging Face need transformers: pip install 'atma-lm[hf]'") from None


def _longest(model: Any) -> tuple[int | None, str]:
    """The most positions of a text, None for any number (rotary, ALiBi, none), and why, if not for a table of them.

    Rotary frequencies of the kinds dynamic and longrope become others, for all positions of a text, once it passes the
    length learned first: no pass over a longer text tells what its beginning alone costs, and no cache can be gone on.
    """
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None, ""
    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = [rotary, *(one for one in rotary.values() if isinstance(one, dict))]
    changing = [kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")]
    if changing:
        first = min(kind.get("original_max_position_embeddings") or most for kind in changing)
        return int(first), f" (for a longer text its '{changing[0]['rope_type']}' rotary frequencies change as a whole)"
    own = model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not own]
    fixed = [len(buffer) for buffer in model.buffers() if buffer.dim() == 2]
    ends = most in fixed or any(most <= size <= most + 2 for size in tables)
    return (int(most) if ends else None), ""


@torch.inference_mode()
def _reads_in_pieces(model: Any, name: str) -> bool:
    """Whether reading on from its cache, several tokens and then one, gives what reading all at once gives.

    ValueError if what it makes of a beginning depends on the tokens after it.
    """
    generator, most = torch.Generator().manual_seed(0), model.config.get_text_config().vocab_size
    tokens = torch.randint(0, most, (1, 24), generator=generator).to(model.device)
    whole = model(input_ids=tokens, use_cache=False).logits.double()
    eps, most = torch.finfo(model.dtype).eps, whole.abs().max()
    slack, close = eps**0.5 * most, min(eps**0.5, 1000 * eps) * most
    head = model(input_ids=tokens[:, :16], use_cache=True)
    if (head.logits.double() - whole[:, :16]).abs().max() > slack:
        raise ValueError(f"{name}: not a causal language model: what it makes of a text depends on the tokens after it")
    argument, out, rest = cache_argument(model), head, []
    for piece in tokens[:, 16:].split((7, 1), 1):
        if argument is None or (cache := cache_of(out)) is None:
            return False
        out = model(input_ids=piece, use_cache=True, **{argument: cache})
        rest.append(out.logits.double())
    return bool((torch.cat(rest, 1) - whole[:, 16:]).abs().max() <= close)
