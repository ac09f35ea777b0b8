"""What is measured together: the grids by name, and what each of their settings is.

Induction and stage two are those of section 7 of the specification. Stage two: 2 tasks × 2 haystacks × 8 lengths × 3
depths × 50 trials = 4,800 trials of one model, the same for every model; the 24,000 of the paper are its five models
(its published shares are whole numbers of the 600 trials that one model has at one length: 9.0% and 16.3% at 256K are
54 and 98 of them). Induction has 16 trials: its published token accuracies are multiples of 1/80.
"""

from typing import Literal, NamedTuple

from atma.eval.retrieval.haystacks import Kind
from atma.eval.retrieval.needles import ASKS_ALL, COUNT, NEEDLES
from atma.eval.retrieval.ruler import ESSAY, RULER

INDUCTION = "induction"
TASKS = (INDUCTION, *NEEDLES, *RULER)
SYNTHETIC = ("niah_single_1", "vt")
PresetName = Literal["needles", "induction", "stage-two", "ruler"]
Scoring = Literal["forced", "greedy", "both"]


class Preset(NamedTuple):
    """A grid: every task in every haystack at every length and depth, as far as it has them."""

    tasks: tuple[str, ...]
    haystacks: tuple[Kind, ...]
    lengths: tuple[int, ...]
    depths: tuple[int, ...]
    per_cell: int
    scoring: Scoring
    baseline: bool


def _doubling(first: int, last: int) -> tuple[int, ...]:
    return tuple(first << i for i in range((last // first).bit_length()))


PRESETS: dict[PresetName, Preset] = {
    "needles": Preset(
        ("passkey", "niah", "multikey"),
        ("synthetic", "natural"),
        _doubling(256, 16_384),
        (10, 50, 90),
        20,
        "forced",
        True,
    ),
    "induction": Preset((INDUCTION,), ("natural",), _doubling(2048, 65_536), (), 16, "forced", True),
    "stage-two": Preset(
        ("passkey", "niah"), ("synthetic", "natural"), _doubling(2048, 262_144), (10, 50, 90), 50, "forced", False
    ),
    "ruler": Preset(RULER, ("prose",), _doubling(4096, 131_072), (), 500, "greedy", False),
}


class Setting(NamedTuple):
    """What is measured at one length: a task in a haystack ("none" where the task brings its own text)."""

    task: str
    haystack: str
    depth: int | None
    """In percent; None where the task chooses its own depths."""
    scoring: str
    absent: bool = False

    @property
    def reads(self) -> int:
        """How often a trial's text is read."""
        return COUNT if self.task in ASKS_ALL and self.scoring == "greedy" else 1

    def words(self) -> str:
        """Its name for people."""
        parts = [self.task, "" if self.haystack == "none" else self.haystack]
        parts += ["" if self.depth is None else f"depth {self.depth}%", "without its needle" if self.absent else ""]
        return ", ".join(part for part in parts if part)


def settings(grid: Preset) -> list[Setting]:
    """Those of one length, in order. The needle's absence is measured once for all depths: the text is the same."""
    scorings = ("forced", "greedy") if grid.scoring == "both" else (grid.scoring,)
    made = []
    for task in grid.tasks:
        own = task == INDUCTION or task in RULER or task in ASKS_ALL
        for haystack in _haystacks(task, grid):
            for scoring in scorings:
                made += [Setting(task, haystack, depth, scoring) for depth in ((None,) if own else grid.depths)]
            if grid.baseline and task not in RULER and "forced" in scorings:
                made.append(Setting(task, haystack, None, "forced", absent=True))
    return made


def _haystacks(task: str, grid: Preset) -> tuple[str, ...]:
    if task in RULER and task not in ESSAY:
        return ("synthetic",) if task in SYNTHETIC else ("none",)
    return grid.haystacks
