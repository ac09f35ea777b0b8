"""What the names of metrics say: the context length they end in, their direction, and how to write their numbers."""

import re
from decimal import ROUND_HALF_UP, Decimal

KNOWN = re.compile(
    r"params|final_val_loss_nats|mfu_percent|train_seconds|train_tokens_per_second|needle_absent_ce"
    r"|(clean_nll|junk_nll|fixed_nll|needle_token_acc|needle_exact_acc|needle_ce)_\d+"
    r"|(likelihood|retrieval|reasoning|tasks|recall)_.+_(bits_per_byte|slope|spearman|\w*accuracy|recall|cross_entropy"
    r"|answer_nats|named|tokens_to_learn|pairs_held|memory_bytes|acc|acc_norm|exact_match|\w*perplexity)(_\d+)?"
)
"""Names that no factor has."""
HEADLINE = ("needle_token_acc", "needle_exact_acc", "clean_nll", "final_val_loss_nats")
"""What a sweep is judged by unless told otherwise: the first of these that was measured, at its longest length."""
RISING = (
    "acc",
    "accuracy",
    "acc_norm",
    "exact_match",
    "f1",
    "recall",
    "named",
    "pairs_held",
    "tokens_per_second",
    "mfu_percent",
)
"""Ends of the names of metrics of which more is better; of all others less is."""


def length_of(metric: str) -> int:
    """The context length that a metric's name ends in; 0 if none."""
    found = re.fullmatch(r".+_(\d+)", metric)
    return int(found[1]) if found else 0


def family_of(metric: str) -> str:
    """A metric's name without its length."""
    return re.sub(r"_\d+$", "", metric)


def rises(metric: str) -> bool:
    """Is more of this metric better?"""
    return family_of(metric).endswith(RISING)


def digits_of(metric: str) -> int:
    """Decimals to show of a metric: none of counts, one of seconds, four of nats and bits, two of all else."""
    if metric == "params" or metric.endswith(("_tokens_to_learn", "_memory_bytes")):
        return 0
    if re.search("nll|loss|_ce|bits_per_byte|cross_entropy|answer_nats|slope|spearman", metric):
        return 4
    return 1 if metric.endswith("seconds") else 2


def number_text(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """A number for people, halves away from zero as papers and browsers round them; – for none."""
    if value is None:
        return "–"
    rounded = Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{rounded + 0:{'+' if signed and rounded else ''},.{digits}f}"
