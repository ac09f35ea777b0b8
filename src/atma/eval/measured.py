"""Which model a suite measures, and how: options of the commands, and of lm-eval's."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from atma.strict import check_fields

if TYPE_CHECKING:
    from atma.eval.language_model import LanguageModel


@dataclass(frozen=True)
class Measured:
    """Which model is measured, and how."""

    model: str = "nano"
    """A packaged model, a model folder or a run folder; `hf:` and a folder or a name for a model of transformers."""
    out: Path | None = None
    """Keep the rows in this .jsonl file; what it already holds of the same measurement is not run again."""
    budget: str = ""
    """A time such as 10m: fewer trials, as many as fit."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the weights and of what is computed."""
    weights: Literal["int8", "int4"] | None = None
    """Read the large weights of a model of ours in so few bits (docs/narrow.md); as they are by default."""
    device: str | None = None
    """cpu, cuda or a certain GPU such as cuda:1; a GPU if there is one by default."""
    threads: int = 0
    """Processor threads; OMP_NUM_THREADS, or else PyTorch's own number, by default."""
    chunk: int = 1024
    """Tokens of one row that are read at once."""
    batch_tokens: int = 8192
    """Tokens of all rows that are read at once."""
    truncate: bool = False
    """Let a model with a longest context drop the beginning of a longer text; the rows count it."""
    select: str | None = None
    """A selection policy: how less of the keys is read, such as "top_pages k=64" (docs/selection.md)."""
    rope_scaling: Literal["none", "linear", "yarn"] = "none"
    """Stretch the positions of a rope model of ours over texts longer than it was trained on."""
    rope_trained: int | None = None
    """Its trained length in tokens. Default: what its folder says."""
    rope_factor: float | None = None
    """Stretch so many times at every length. Default: as much as each text needs."""

    def __post_init__(self) -> None:
        check_fields(self)

    def load(self) -> "LanguageModel":
        """The model. ValueError: there is none, or an option makes no sense."""
        import torch

        from atma.device import device_of
        from atma.eval import hugging_face
        from atma.eval.language_model import OwnModel
        from atma.eval.rope import Stretched, stretch_of
        from atma.eval.stream import Streaming
        from atma.loading import load
        from atma.narrow import home
        from atma.threads import take

        if self.chunk < 1 or self.batch_tokens < 1:
            raise ValueError(f"'chunk' and 'batch_tokens' must be 1 or more, not {self.chunk} and {self.batch_tokens}")
        take(self.threads)
        where = device_of(self.device)
        streaming, dtype = Streaming(self.chunk, self.batch_tokens), getattr(torch, self.dtype)
        if self.model.startswith("hf:"):
            if self.rope_scaling != "none":
                raise ValueError("--rope-scaling is for models of ours; set that of transformers in its config.json")
            if self.select is not None:
                raise ValueError("--select is for models of ours; import that one first (`atma convert`)")
            if self.weights is not None:
                raise ValueError("--weights is for models of ours; import that one first (`atma convert`)")
            return hugging_face.load(self.model[3:], dtype, str(where), streaming, self.truncate)
        loaded = load(self.model, select=self.select, weights=self.weights)
        loaded.model.to(home(loaded.model, self.device), dtype)
        stretch = stretch_of(loaded, self.rope_scaling, self.rope_trained, self.rope_factor)
        return OwnModel(loaded, streaming) if stretch is None else Stretched(loaded, stretch, streaming)
