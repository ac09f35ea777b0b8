"""Any language model of ours or of transformers as EleutherAI's lm-eval asks it."""

from typing import Any, Literal

import numpy as np

try:
    from lm_eval import utils  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ValueError(f"tasks need lm-eval ({error}): pip install 'atma-lm[lm-eval]'") from None

from atma.eval.continuations import predict_continuations
from atma.eval.language_model import LanguageModel, OwnModel
from atma.eval.measured import Measured
from atma.eval.ragged import score_each
from atma.eval.suite import sha256
from atma.tokenizer import Tokenizer

Prefix = Literal["auto", "on", "off"]
NEW_TOKENS = 256
"""Tokens that a task gets written if it does not say how many; lm-eval's own figure."""
FIRST_PIECE = 32


class AtmaLM(TemplateLM):
    """A `LanguageModel` as lm-eval asks it. `prefix`: whether a context begins with the tokenizer's `start`.

    "auto": with our models, as in training, and with those of transformers whose tokenizer puts it there itself.
    """

    def __init__(self, model: LanguageModel, prefix: Prefix = "auto") -> None:
        super().__init__()
        self.model = model
        self.prefixed = isinstance(model, OwnModel) or _starts(model.tokenizer) if prefix == "auto" else prefix == "on"
        self.shown: list[str] = []
        """SHA-256 of the token ids of every request so far."""

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "AtmaLM":
        """What `--model_args` says: pretrained, dtype, device, chunk, batch_tokens, truncate, add_bos_token."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> "AtmaLM":
        """The same from a dictionary. Rows are batched by `batch_tokens`; lm-eval's batch sizes say nothing here."""
        given = {k: v for k, v in ((additional_config or {}) | arg_dict).items() if v is not None}
        for name in ("batch_size", "max_batch_size"):
            given.pop(name, None)
        known = ("pretrained", "dtype", "device", "chunk", "batch_tokens", "truncate", "add_bos_token")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"--model_args: no option '{unknown[0]}' of atma; known: {', '.join(known)}")
        started = given.pop("add_bos_token", None)
        model = Measured(model=given.pop("pretrained", "nano"), **given).load()
        return cls(model, "auto" if started is None else "on" if started else "off")

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.model.tokenizer.eot

    @property
    def prefix_token_id(self) -> int:
        """lm-eval begins an empty context with it."""
        return self.model.tokenizer.start

    @property
    def max_length(self) -> int | None:
        """The most tokens the model can read, None for any number."""
        return self.model.longest

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's caches."""
        return self.model.tokenizer.hash()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids; no special ones are ever added here."""
        return self.model.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        contexts = [self._started(context) for _, context, _ in requests]
        continuations = [continuation for _, _, continuation in requests]
        self.shown += [sha256([*a, *b]) for a, b in zip(contexts, continuations, strict=True)]
        found = predict_continuations(self.model, contexts, continuations)
        answers = [(-float(one.nats.sum()), bool(one.right.all())) for one in found]
        for (request, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of texts after what begins one, in one piece, or in windows that the model can read."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            self.shown.append(sha256(ids))
            for context, goals in self._windows(ids):
                windows.append((np.array([*context, *goals]), len(goals)))
                owners.append(i)
        found = [0.0] * len(requests)
        nats = score_each(self.model, [ids for ids, _ in windows], [last for _, last in windows])
        for i, one in zip(owners, nats, strict=True):
            found[i] -= float(one.sum())
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations as far as the first stop string. ValueError for a task that asks for sampling."""
        found = []
        for request in requests:
            context, options = request.args
            prompt = self._started(self.tok_encode(context))
            self.shown.append(sha256(prompt))
            found.append(self._written(prompt, options))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _started(self, context: list[int]) -> list[int]:
        start = self.prefix_token_id
        return [start, *context] if (self.prefixed and context[:1] != [start]) or not context else context

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        most = self.model.longest or max(1, len(ids))
        rolling = utils.get_rolling_token_windows(ids, self.prefix_token_id, most, 1)
        return [utils.make_disjoint_window(pair) for pair in rolling]

    def _written(self, prompt: list[int], options: dict[str, Any]) -> str:
        """In pieces that grow, so that a stop string found late costs little more than the text before it.

        None takes more than half of what the model can read, so that as much is left of what comes before.
        """
        if options.get("do_sample") or options.get("temperature"):
            raise ValueError(f"atma's answers to tasks are greedy; a task asks for sampling: {options}")
        most = next((options[n] for n in ("max_gen_toks", "max_new_tokens", "max_tokens") if n in options), NEW_TOKENS)
        asked = options.get("until") or []
        until = [asked] if isinstance(asked, str) else list(asked)
        written: list[int] = []
        size, text = FIRST_PIECE, ""
        largest = max(1, self.model.longest // 2) if self.model.longest else most
        while len(written) < most:
            size = min(size, largest, most - len(written))
            piece = self.model.generate([*prompt, *written], size)
            written += piece
            text = self.model.tokenizer.decode(written)
            if len(piece) < size or any(stop in text for stop in until):
                break
            size *= 4
        ends = [text.find(stop) for stop in until if stop and stop in text]
        return text[: min(ends)] if ends else text


def _starts(tokenizer: Tokenizer) -> bool:
    """Whether the rules of the tokenizer's own file begin a text with its `start`."""
    return tokenizer.backend.encode("").ids[:1] == [tokenizer.start]
