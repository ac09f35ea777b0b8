"""Tokens and their log-probabilities as clients read them."""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atma.chat.template import Template
from atma.serve.request import Logprob
from atma.tokenizer import Tokenizer

LOWEST = -9999.0
"""In place of −∞, which JSON has no word for."""


class TokenNames:
    """Texts and bytes of tokens, each found once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def of(self, token: int) -> tuple[str, bytes]:
        """A name and the bytes: the text; for part of a character its bytes, `bytes:\\xe2`; a special token's own."""
        if token not in self._known:
            data = self.tokenizer.token_bytes(token)
            self._known[token] = (self._name(token, data), data)
        return self._known[token]

    def _name(self, token: int, data: bytes) -> str:
        if not data:
            return self.tokenizer.backend.id_to_token(token) or ""
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(logprobs: Sequence[Logprob], names: TokenNames) -> dict[str, Any]:
    """As chats have them: of every token name, bytes, log-probability and the best."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        name, data = names.of(token)
        return {"token": name, "logprob": _number(logprob), "bytes": list(data)}

    return {
        "content": [
            entry(one.token, one.logprob) | {"top_logprobs": [entry(*best) for best in one.best]} for one in logprobs
        ],
        "refusal": None,
    }


def tokenizer_info(tokenizer: Tokenizer, template: Template, ends: Sequence[int], longest: int) -> dict[str, Any]:
    """What a client needs to know of a tokenizer, by the names of a `tokenizer_config.json`, and of the chat template.

    `ends`: tokens that end the model's turns besides end-of-text; `longest`: positions that there is memory for.
    """
    added = tokenizer.backend.get_added_tokens_decoder().items()
    text = tokenizer.backend.id_to_token
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "name": tokenizer.name,
        "hash": tokenizer.hash(),
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": longest,
        "bos_token": text(tokenizer.start),
        "eos_token": text(tokenizer.eot),
        **template.names,
        "special_tokens": {token.content: number for number, token in sorted(added) if token.special},
        "end_of_turn_tokens": [text(end) for end in ends],
        "beginning": list(tokenizer.beginning),
        "chat_template": template.text,
        "chat_template_source": Path(template.source).name,
    }


class TextLogprobs:
    """As completions have them: four lists side by side. Offsets go on from call to call of one choice."""

    def __init__(self, names: TokenNames) -> None:
        self.names = names
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def of(self, logprobs: Sequence[Logprob], echoed: str | None = None, spelled: bool = False) -> dict[str, Any]:
        """`echoed`: the text of a call that echoes a prompt; `spelled`: whether it spells special tokens."""
        offsets, begun, lost = [], False, False
        for one in logprobs:
            name, data = self.names.of(one.token)
            text = self._decoder.decode(data) if data else name * spelled
            if data and text.endswith(name):  # what stands for half a character before it is not this token's
                self._offset += len(text) - len(name)
                text = name
            missed = bool(echoed is not None and text and not echoed.startswith(text, self._offset))
            put = missed and text[:1] == " " and not (begun and lost)
            if echoed is not None and missed and lost and not put:  # an unknown token stood for what lies between
                self._offset = max(echoed.find(text, self._offset), self._offset)
            offsets.append(self._offset)
            self._offset += len(text) - put  # a space that the tokenizer put before the text and that the text has not
            begun, lost = begun or bool(text), not (data or spelled)
        if echoed is not None:
            self._offset = len(echoed)
        return {
            "tokens": [self.names.of(one.token)[0] for one in logprobs],
            "token_logprobs": [_number(one.logprob) for one in logprobs],
            "top_logprobs": [self._best(one) for one in logprobs],
            "text_offset": offsets,
        }

    def _best(self, one: Logprob) -> dict[str, float] | None:
        """The best tokens by name, and the token itself; where two tokens have one name, the likelier."""
        if one.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in (*one.best, (one.token, one.logprob)):
            name = self.names.of(token)[0]
            found[name] = max(logprob, found.get(name, LOWEST))
        return found


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)
