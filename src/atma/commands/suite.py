"""What every suite's command shares: which model is measured, how, where rows go, and what is shown."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from atma.strict import check_fields

if TYPE_CHECKING:
    from atma.eval.language_model import LanguageModel
    from atma.eval.suite import Suite


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
    device: str = "cpu"
    chunk: int = 1024
    """Tokens of one row that are read at once."""
    batch_tokens: int = 8192
    """Tokens of all rows that are read at once."""
    truncate: bool = False
    """Let a model with a longest context drop the beginning of a longer text; the rows count it."""
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
        from atma.eval.language_model import Native
        from atma.eval.rope import Stretched, stretch_of
        from atma.eval.stream import Streaming
        from atma.loading import load

        if self.chunk < 1 or self.batch_tokens < 1:
            raise ValueError(f"'chunk' and 'batch_tokens' must be 1 or more, not {self.chunk} and {self.batch_tokens}")
        device_of(self.device)
        streaming, dtype = Streaming(self.chunk, self.batch_tokens), getattr(torch, self.dtype)
        if self.model.startswith("hf:"):
            if self.rope_scaling != "none":
                raise ValueError("--rope-scaling is for models of ours; set that of transformers in its config.json")
            return hugging_face.load(self.model[3:], dtype, self.device, streaming, self.truncate)
        loaded = load(self.model)
        loaded.model.to(self.device, dtype)
        stretch = stretch_of(loaded, self.rope_scaling, self.rope_trained, self.rope_factor)
        return Native(loaded, streaming) if stretch is None else Stretched(loaded, stretch, streaming)


class Rows(NamedTuple):
    """The rows of a suite, and what of it did not fit the budget, in words to end with."""

    rows: list[dict[str, Any]]
    left_out: str


def measure(suite: "Suite", measured: Measured) -> Rows:
    """The rows of a suite, with progress on the terminal."""
    from atma.commands.bars import bars
    from atma.eval.suite import duration, run, within

    budget = duration(measured.budget) if measured.budget else None
    model, trials = measured.load(), None
    if budget is not None and (trials := within(suite, model, budget)):
        print(f"{measured.budget}: {told_trials(suite.trials(), trials)}")
    with bars() as progress:
        rows = run(suite, model, measured.out, progress, trials)
    if measured.out is not None:
        print(f"rows: {measured.out}")
    return Rows(rows, "" if trials is None else left_out(measured.budget, suite.trials(), trials))


def left_out(budget: str, wanted: Mapping[int, int], trials: Mapping[int, int]) -> str:
    """What a budget had no room for; empty where it had room for all."""
    none = [f"{length:,}" for length in sorted(wanted) if not trials.get(length)]
    fewer = [f"{trials[n]} of {wanted[n]} at {n:,}" for n in sorted(wanted) if 0 < trials.get(n, 0) < wanted[n]]
    parts = [f"not measured, for want of time: {', '.join(none)} tokens"] if none else []
    parts += [f"fewer trials: {', '.join(fewer)} tokens"] if fewer else []
    return f"--budget {budget}: {'; '.join(parts)}; give a longer one" if parts else ""


def tell(words: str) -> None:
    """Print the last words, if there are any."""
    if words:
        print(words)


def told_trials(wanted: Mapping[int, int], trials: Mapping[int, int]) -> str:
    """How many trials fit a budget at each length, and where not one does."""
    counts = [f"{trials.get(length, 0)} of {count} trials at {length:,}" for length, count in sorted(wanted.items())]
    return ", ".join(counts)


def check_page(page: Path | None) -> None:
    """ValueError, before anything is measured, for a page that cannot be written because it is a folder."""
    if page is not None and page.is_dir():
        raise ValueError(f"--page {page}: a folder; name the .html file to write")


def command_line() -> str:
    """The command of this process, for the page that it writes."""
    return shlex.join(["atma", *sys.argv[1:]])


def print_table(title: str, head: list[str], rows: list[list[str]], caption: str = "") -> None:
    """A table on the terminal, numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, caption=caption)
    for i, name in enumerate(head):
        shown.add_column(name, justify="left" if i == 0 else "right")
    for cells in rows:
        shown.add_row(*cells)
    Console().print(shown)
