"""What the product is best at, first and live: a fact is told, then much text, and the model is asked for the fact.

The models write the answer themselves (nothing is teacher-forced), and every model gets the same facts in the same
text.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from atma.data.sources import documents
from atma.demo.pace import Enough, Stage
from atma.eval.language_model import OwnModel
from atma.eval.retrieval.induction import VALUE_TOKENS, Trial, draw_trials, gap_length, layouts
from atma.report.content import Answer, Recall
from atma.tokenizer import Tokenizer

CHARACTERS = 400_000
"""Of the reference, where the user gives no text."""
GROWTH = 1.3
"""Longer texts take up to this much more than their length says."""
EASY, SEED = 8, 20
"""Facts asked for at the shorter lengths, and what draws them."""


def text_of(path: Path | None) -> tuple[str, str]:
    """The text between fact and question, and what to call it; by default the reference that comes with Python.

    ValueError: the file is no UTF-8 text, or empty.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())[:CHARACTERS], "Python's language reference, in English"
    return "".join(document.text for document in documents(path)), path.name


def recall(
    models: Sequence[tuple[str, OwnModel]],
    text: tuple[str, str],
    lengths: Sequence[int],
    most: int,
    stage: Stage,
    say: Callable[[str], None],
) -> Recall:
    """Ask every model for the same facts: at the training length, half-way up, and at the greatest that time allows."""
    tokenizer = models[0][1].tokenizer
    haystack = np.asarray(tokenizer.encode(text[0]), np.int64)
    found = Recall(text[1], len(haystack), lengths[0], [])
    trials, middle = draw_trials(tokenizer, most, len(haystack), SEED), lengths[len(lengths) // 2]

    def questions(length: int, facts: int, end: Stage) -> None:
        for number, trial in enumerate(trials[:facts]):
            if not end.fits(_expected(found, length)):
                return
            for name, model in models:
                found.answers.append(ask(name, model, haystack, trial, length, number, end))
                say(spoken(found.answers[-1], lengths[0]))

    try:
        for length in sorted({lengths[0], middle}):
            questions(length, min(most, EASY), Stage(stage.pace, stage.pace.now() + stage.left / 4))
        reach = [length for length in lengths if length > middle and stage.fits(_expected(found, length))]
        if reach:
            questions(reach[-1], most, stage)
    except Enough:
        pass
    if found.answers and found.longest < lengths[-1]:
        stage.pace.cuts.append(
            f"Facts were asked for after {found.longest:,} tokens and not {lengths[-1]:,}, for want of time."
        )
    return found.complete([name for name, _ in models])


def ask(
    name: str, model: OwnModel, haystack: np.ndarray, trial: Trial, length: int, number: int, stage: Stage
) -> Answer:
    """One question, as long as the stage lasts: Enough."""
    tokenizer, began = model.tokenizer, stage.pace.now()
    prompt = layouts(tokenizer.eot, haystack, [trial], length)[0, :-VALUE_TOKENS].tolist()
    state = model.read(prompt[:-1], 1 + VALUE_TOKENS, stage.tick)
    written = model.go_on(state, prompt[-1], VALUE_TOKENS)
    told = _told(tokenizer, trial)
    text = tokenizer.decode(written).strip()
    right = written == trial.value
    seconds = stage.pace.now() - began
    return Answer(name, length, number, told, gap_length(trial, length), text, right, seconds)


def spoken(answer: Answer, trained: int) -> str:
    """An answer in a line."""
    verdict = "right" if answer.right else "wrong"
    return (
        f"  told “{answer.told}”, asked {answer.gap:,} tokens later ({answer.length / trained:.3g}× its training "
        f"length): {answer.model} writes {answer.written!r}, {verdict} ({answer.seconds:.1f} s)"
    )


def _expected(found: Recall, length: int) -> float:
    """Seconds until all models have answered at a length, by the last that they took at the nearest length."""
    if not found.answers:
        return 0.0
    nearest = max((known for known in found.lengths if known <= length), default=found.longest)
    last = [answer for answer in found.answers if answer.length == nearest][-len(found.models) :]
    return sum(answer.seconds for answer in last) * length / nearest * (GROWTH if length > nearest else 1.0)


def _told(tokenizer: Tokenizer, trial: Trial) -> str:
    return tokenizer.decode([*trial.cue, *trial.value]).strip()
