"""Evaluation over context lengths, from the training length to a million tokens: loss, bits per byte and needles.

`evaluate` does it all from an EvaluationConfig; `length_curve`, `fixed_targets` and `needle` are its parts, and work
alone. Each returns rows of plain JSON data; `evaluate` adds to each where it came from.
"""

from atma.config import EvaluationConfig
from atma.eval.language_model import LanguageModel, OwnModel, Row
from atma.eval.lengths import evaluate
from atma.eval.likelihood.prefixes import Documents, choose_documents, fixed_targets, junk_stream, length_curve
from atma.eval.loaded import Loaded
from atma.eval.provenance import provenance
from atma.eval.results import read_rows, write_rows
from atma.eval.retrieval.haystacks import split_text as haystack
from atma.eval.retrieval.induction import needle
from atma.eval.rope import Stretch, Stretched
from atma.eval.stream import Streaming, score
from atma.eval.suite import Progress

__all__ = [
    "Documents",
    "EvaluationConfig",
    "LanguageModel",
    "Loaded",
    "OwnModel",
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
