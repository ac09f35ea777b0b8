"""How text is generated: the options of `atma generate`, `atma.generate` and `atma.LLM`, checked."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from atma.display import told
from atma.strict import check_fields, from_dict


@dataclass(frozen=True, repr=False)
class Settings:
    """How text is generated. The filters apply in the order top-k, top-p, min-p to probabilities at `temperature`."""

    max_tokens: int = 256
    """Tokens to generate at the most; 0 goes on until a stop string, the end-of-text token or Ctrl-C."""
    temperature: float = 0.8
    """Logits are divided by this; 0 always takes the most likely token."""
    top_k: int = 0
    """Keep only this many of the most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities sum to at least this."""
    min_p: float = 0.0
    """Keep tokens at least this times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens already in the text by this; 1 leaves them."""
    seed: int = 0
    """Equal seed, prompt and settings give equal text."""
    stop: tuple[str, ...] = ()
    """End before the first of these texts."""
    stop_tokens: tuple[int, ...] = ()
    """End with the first of these tokens, which gives no text."""
    ignore_end: bool = False
    """Go on after the end-of-text token, and after those with which the model's folder ends a turn."""
    prefill_chunk: int = 1024
    """Prompt tokens per pass through the model."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("max_tokens", "top_k", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.seed < 2**64, "seed", self.seed, "below 2 to the power 64")
        _require(
            self.temperature >= 0 and math.isfinite(self.temperature), "temperature", self.temperature, "0 or more"
        )
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        penalty = self.repetition_penalty
        _require(penalty > 0 and math.isfinite(penalty), "repetition_penalty", penalty, "above 0")
        _require(all(self.stop), "stop", self.stop, "texts of one character or more")
        _require(all(token >= 0 for token in self.stop_tokens), "stop_tokens", self.stop_tokens, "token ids")
        _require(self.prefill_chunk >= 1, "prefill_chunk", self.prefill_chunk, "at least 1")

    def __repr__(self) -> str:
        """What differs from the defaults; reading it as Python gives an equal object."""
        return told(self)


class SettingsOptions(TypedDict, total=False):
    """The fields of `Settings` as keyword arguments, for editors; a test holds both equal. One stop text may be alone.

    max_tokens 256, temperature 0.8 (0: always the likeliest), top_k 0 (all), top_p 1, min_p 0, repetition_penalty 1,
    seed 0, stop (), stop_tokens (), ignore_end False, prefill_chunk 1024.
    """

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: str | Sequence[str]
    stop_tokens: Sequence[int]
    ignore_end: bool
    prefill_chunk: int


def merged(settings: Settings | None, options: SettingsOptions) -> Settings:
    """The settings, or the defaults, with keyword arguments in their places.

    ValueError: an argument that is none, with the nearest one that is, or a value out of bounds.
    """
    given: dict[str, Any] = dict(options)
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    base = settings or Settings()
    kept = {one.name: getattr(base, one.name) for one in dataclasses.fields(base)}
    return from_dict(Settings, kept | {name: _listed(value) for name, value in given.items()})


def _listed(value: Any) -> Any:
    """Any sequence as a list, as data have it."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"'{name}' must be {rule}, not {value!r}")
