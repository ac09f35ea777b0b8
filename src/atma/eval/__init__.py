"""Evaluation over context lengths, from the training length to a million tokens: loss, bits per byte and needles.

`evaluate` does it all from an EvaluationConfig; `length_curve`, `fixed_targets` and `needle` are its parts, and work
alone. Each returns rows of plain JSON data; `evaluate` adds to each where it came from.
"""

from pathlib import Path

from atma.config import EvaluationConfig
from atma.data.dataset import TokenSet
from atma.eval.curves import Row, fixed_targets, length_curve
from atma.eval.documents import Documents, choose_documents, haystack, junk_stream
from atma.eval.language_model import LanguageModel, Native
from atma.eval.loaded import Loaded
from atma.eval.needle import needle
from atma.eval.plan import plan
from atma.eval.provenance import provenance
from atma.eval.results import read_rows, write_rows
from atma.eval.rope import Stretch, Stretched
from atma.eval.stream import DEFAULT, Streaming, score
from atma.eval.suite import Progress, run_measurements

__all__ = [
    "Documents",
    "LanguageModel",
    "Loaded",
    "Native",
    "Progress",
    "Row",
    "Streaming",
    "Stretch",
    "Stretched",
    "choose_documents",
    "evaluate",
    "fixed_targets",
    "haystack",
    "junk_stream",
    "length_curve",
    "needle",
    "provenance",
    "read_rows",
    "score",
    "write_rows",
]


def evaluate(
    loaded: Loaded,
    token_set: TokenSet,
    evaluation: EvaluationConfig,
    progress: Progress | None = None,
    results: Path | str | None = None,
    joined: bool = True,
    streaming: Streaming = DEFAULT,
    stretch: Stretch | None = None,
) -> list[Row]:
    """Nested prefixes, loss by position, fixed targets, junk stream and needles, in this order, as rows of JSON data.

    The validation `token_set` must be of the model's tokenizer. `joined` lets consecutive documents make up for too
    few long ones (rows count them). With `results`, a .jsonl file, rows are kept as they come, those of the same
    measurement and provenance are taken from it, and rows of others stay in it. Lengths that the split has too little
    text for are left out of the loss measures and listed as `skipped_lengths` in the summaries; needles have them all.
    `stretch` is how a rope model's positions go on beyond its trained length.
    """
    model = Native(loaded, streaming) if stretch is None else Stretched(loaded, stretch, streaming)
    stamp = provenance(loaded, token_set, evaluation.seed, streaming) | model.provenance()
    measurements = plan(model, token_set, evaluation, joined)
    return run_measurements("lengths", measurements, stamp, results, progress)
