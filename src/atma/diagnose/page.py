"""The page of a diagnosis: findings in plain words, then the pictures and tables they were read from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atma.diagnose import choice, sinks
from atma.diagnose.effects import UNCHANGED
from atma.diagnose.findings import Finding
from atma.diagnose.pictures import bars, chosen, half_lives, levels, lines
from atma.report.content import environment
from atma.report.figures import Figure
from atma.report.plain import plain_page

Row = dict[str, Any]
NOTHING = (
    "Nothing is sure over these documents: no change that was tried helps at the longest length, far context does no "
    "harm there, and neither does loss rise nor recall fall with length."
)
ONLY_LOSSES = (
    "No layer of this model attends, forgets, or tells by which channels it adds to the stream: only losses by length "
    "and block gains can be told."
)
NOTE = (
    "Each sentence is a difference over the same documents whose interval excludes zero; the intervals hold together "
    "with 95% over the lengths of one symptom, over all changes to the model, and over the heads of one “Beside it”. "
    "A loss at a length is the mean over the second half of its tokens. Sentences that begin with “Beside it” tell "
    "what else changes with length; they prove no cause."
)
HEAD_FIGURES = (
    ("null_mass", "Weight on the null sink", "Mean weight that a head's queries give the null instead of any key."),
    (
        "copy_score",
        "Copy score",
        "Weight on the very token of a record that is to be told next. Retrieval heads have it.",
    ),
    ("n_eff", "Participating keys", "n_eff, the inverse of the sum of squared weights over real keys."),
    ("first_mass", "Weight on the first token", "An attention sink, where it is large whatever is asked."),
    ("sink_mass", "Weight on the largest other sink", "The far key, not the first, with the largest mean weight."),
    ("magnitude", "Magnitude μ", "What the count channel hands on."),
    ("memory_norm", "Memory norm", "Frobenius norm of a head's memory M after so many tokens."),
    (
        "surprise",
        "Surprise",
        "Squared error of what fast weights have for the keys of a length's last tokens, as they stood before them, "
        "as a share of the values: 0 where all was known, 1 where nothing was.",
    ),
    ("write_strength", "Write strength", "Mean step θ by which a token moves fast weights, over all of its window."),
    ("weight_drift", "Drift of the weights", "Distance of fast weights from their learned start, ‖A − W⁰‖."),
)


def sentences(rows: Sequence[Row], found: Sequence[Finding]) -> list[str]:
    """What the page and the terminal begin with."""
    if not _kind(rows, "loss"):
        return sinks.told(rows)
    inside = {"channel", "branch", "retention"} & {row["kind"] for row in rows}
    first = [] if inside else [ONLY_LOSSES]
    return [*first, *([one.text for one in found] or [NOTHING]), *choice.told(rows), *sinks.told(rows)]


def page(path: Path | str, name: str, rows: Sequence[Row], found: Sequence[Finding], command: str) -> Path:
    """Write the page of a diagnosis of the model `name`. OSError if it cannot be written."""
    provenance = next((row["provenance"] for row in rows if "provenance" in row), {})
    keys = ("model", "parameters", "core", "memory", "pattern", "dtype", "weights_sha256", "texts_sha256", "seed")
    facts = {key: str(provenance[key]) for key in keys if key in provenance}
    title = f"Diagnosis of {name}"
    return plain_page(path, title, figures(rows), command, environment() | facts, sentences(rows, found), NOTE)


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Every figure that the rows have numbers for."""
    read = bool(_kind(rows, "loss"))
    made = [
        *([_losses(rows)] if read else []),
        *_far(rows),
        *([_recall(rows)] if read else []),
        *_worth(rows),
        *half_lives(_kind(rows, "retention")),
    ]
    heads = _kind(rows, "channel")
    for key, title, caption in HEAD_FIGURES:
        having = [row | {"name": f"head {row['layer']}.{row['head']}"} for row in heads if key in row]
        if having:
            made.append(lines(title, caption, having, key))
    return [*made, *_branches(rows), *_gains(rows), *chosen(_kind(rows, "choice")), *levels(_kind(rows, "sink level"))]


def _losses(rows: Sequence[Row]) -> Figure:
    told = [row | {"name": row["change"]} for row in _shown(rows, "loss")]
    caption = "Nats a token over the second half of each length: the model as it is, and as changed. Lower is better."
    return lines("Loss by length", caption, told, "loss")


def _far(rows: Sequence[Row]) -> list[Figure]:
    far = _kind(rows, "far")
    if not far:
        return []
    names = {"whole": "all before them read", "recent": f"the last {far[0]['window']:,} alone"}
    told = [row | {"name": words, "loss": row[key]} for key, words in names.items() for row in far]
    caption = (
        "Nats of the same last tokens of each length with all context and with little: above it, far context harms."
    )
    return [lines("What far context is worth", caption, told, "loss")]


def _recall(rows: Sequence[Row]) -> Figure:
    told = [row | {"name": row["change"]} for row in _shown(rows, "recall")]
    caption = "Share of the digits of records told at each document's start that are the likeliest when asked for."
    return lines("Recall by length", caption, told, "token_accuracy")


def _shown(rows: Sequence[Row], kind: str) -> list[Row]:
    """Rows of the model as it is and of every change but single heads and paths taken away, which the bars show."""
    many = ("without head", "without the mixer of layer", "without the mlp of layer")
    return [row for row in _kind(rows, kind) if not row["change"].startswith(many)]


def _worth(rows: Sequence[Row]) -> list[Figure]:
    effects = _kind(rows, "effect")
    if not effects:
        return []
    caption = (
        f"Loss with the change less the loss of the model {UNCHANGED}, on the same documents: right of zero a part is "
        "worth that much, left of it the model is better off without. Bars are 95% intervals for all changes together."
    )
    recall = "The same for the share of record digits told: left of zero, the part is what they are recalled with."
    return [
        bars("What each part is worth: loss", caption, effects, "loss"),
        bars("What each part is worth: recall", recall, effects, "accuracy"),
    ]


def _branches(rows: Sequence[Row]) -> list[Figure]:
    branches = _kind(rows, "branch")
    if not branches:
        return []
    energies = [
        row | {"name": f"layer {row['layer']}, {key.removesuffix('_rms')}", "rms": row[key]}
        for key in dict.fromkeys(key for row in branches for key in row if key.endswith("_rms"))
        for row in branches
        if key in row
    ]
    cosines = [
        row | {"name": f"layer {row['layer']}, {key.removesuffix('_cosine').replace('_', ' · ')}", "cosine": row[key]}
        for row in branches
        for key in row
        if key.endswith("_cosine")
    ]
    energy = "Root mean square of the stream that the layer is given, and of what each channel adds to it."
    made = [lines("Energies of the branches", energy, energies, "rms")]
    return [*made, lines("Cosines of the branches", "Mean cosine over tokens of each two.", cosines, "cosine")]


def _gains(rows: Sequence[Row]) -> list[Figure]:
    gains = [row | {"name": f"block {row['layer']}, {row['mixer']}"} for row in _kind(rows, "gain")]
    caption = "‖f(x + δ) − f(x)‖ / ‖δ‖ of each block f, at rms(δ) = 0.02 rms(x), over the first so many tokens."
    return [lines("Block gains", caption, gains, "gain")] if gains else []


def _kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]
