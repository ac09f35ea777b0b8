"""`AtmaConfig`: a model's configuration as transformers holds it. It is the content of atma's own config.json."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from atma.config import ModelConfig
from atma.hub_files import MODEL_TYPE, class_keys
from atma.integrations.transformers.cache import LAYER_TYPE
from atma.strict import from_dict, to_dict

_DERIVED = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
"""Said by `model`, and so not written a second time."""


@strict
class AtmaConfig(PreTrainedConfig):
    """A configuration of any model of atma.

    `model` is the table of `atma.config.ModelConfig`; without it that of its defaults. `vocab_size` and
    `tie_word_embeddings`, where given, stand before what it says. ValueError names what is wrong.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 (so it is read)

    format: str = "atma-1"
    model: dict[str, Any] | None = None
    extra: dict[str, Any] | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    tie_word_embeddings: bool | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.format != "atma-1":
            told = "a folder of narrow weights is read by atma.load; give transformers the model that it was made of"
            raise ValueError(f"format {self.format!r}, not 'atma-1': {told}")
        made = from_dict(ModelConfig, self._given())
        self.model, self.extra = to_dict(made), dict(self.extra or {})
        self.vocab_size, self.hidden_size = made.vocab_size, made.width
        self.num_hidden_layers, self.tie_word_embeddings = made.depth, made.tied_head
        kwargs.pop("layer_types", None)
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, config: ModelConfig) -> "AtmaConfig":
        """The configuration of a model of atma."""
        return cls(model=to_dict(config))

    def model_config(self) -> ModelConfig:
        """The configuration of the model itself as it is now: the vocabulary may be resized, the head untied."""
        return from_dict(ModelConfig, self._given())

    @property
    def layer_types(self) -> list[str]:
        """What each layer holds in a cache: a state of atma."""
        return [LAYER_TYPE] * int(self.num_hidden_layers or 0)

    def validate_layer_type(self) -> None:
        """They are told, not given."""

    def to_dict(self) -> dict[str, Any]:
        """Every attribute, `model` as it is now."""
        return super().to_dict() | class_keys() | {"model": self._given()}

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        told = {key: value for key, value in super().to_diff_dict().items() if key not in _DERIVED}
        return {"format": self.format, **class_keys(), **told, "model": self._given(), "extra": self.extra}

    def _given(self) -> dict[str, Any]:
        given = dict(self.model or {})
        if self.vocab_size is not None:
            given["vocab_size"] = self.vocab_size
        if self.tie_word_embeddings is not None:
            given["tied_head"] = self.tie_word_embeddings
        return given


__all__ = ["AtmaConfig"]
