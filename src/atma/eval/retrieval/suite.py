"""The suite `retrieval`: from a grid to measurements, one for each setting and length.

Trial i of a seed has the same needles, values, depths and haystack at every length, in every task of a family, for
every model and on every machine; only the tokens that say so are the model's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atma.eval.language_model import LanguageModel, Row, check_length
from atma.eval.ragged import Told
from atma.eval.retrieval.haystacks import Kind
from atma.eval.retrieval.maker import Maker
from atma.eval.retrieval.presets import PRESETS, TASKS, Preset, PresetName, Scoring, Setting, settings
from atma.eval.retrieval.scoring import forced, forced_row, free, free_row
from atma.eval.stream import Advance
from atma.eval.suite import Measurement, sha256
from atma.strict import check_fields

AT_ONCE = 1 << 22
"""Tokens of prompts that are held at once."""


@dataclass(frozen=True)
class Retrieval:
    """Recall of what stands in a long context. An option that is left out is the preset's."""

    preset: PresetName = "needles"
    """The grid to start from."""
    tasks: tuple[str, ...] = ()
    """passkey, niah, multikey, multivalue, multiquery, induction, and the thirteen of RULER."""
    haystacks: tuple[Kind, ...] = ()
    """Texts to hide things in; of RULER's tasks, those with an essay."""
    lengths: tuple[int, ...] = ()
    """In tokens of the model, everything counted; increasing."""
    depths: tuple[int, ...] = ()
    """Percent of the haystack before the needle, for passkey, niah and multikey."""
    per_cell: int = 0
    """Trials of each cell; 0 for the preset's."""
    scoring: Scoring | None = None
    """Teacher-forced, by free greedy continuation, or both."""
    baseline: Literal["on", "off"] | None = None
    """Also measure with the needle absent (teacher-forced needles only)."""
    natural: str = "stdlib"
    """The natural haystack: a text file or folder, prepared data, or stdlib."""
    squad: Path | None = None
    """Questions of qa_1: a SQuAD json file; generated if left out."""
    hotpot: Path | None = None
    """Questions of qa_2: a HotpotQA json file; generated if left out."""
    seed: int = 1234
    """Draws the trials."""

    name = "retrieval"
    """What rows call the suite."""

    def __post_init__(self) -> None:
        check_fields(self)
        grid = self.grid()
        unknown = [task for task in grid.tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"no retrieval task '{unknown[0]}'; known: {', '.join(TASKS)}")
        if list(grid.lengths) != sorted(set(grid.lengths)) or min(grid.lengths) < 1:
            raise ValueError(f"lengths must be positive and strictly increasing, not {list(grid.lengths)}")
        if not all(0 <= depth <= 100 for depth in grid.depths) or len(set(grid.depths)) < len(grid.depths):
            raise ValueError(f"depths must be distinct percentages from 0 to 100, not {list(grid.depths)}")
        for name in ("tasks", "haystacks"):
            chosen = getattr(grid, name)
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"{name} must be distinct, not {', '.join(chosen)}")
        if self.per_cell < 0 or self.seed < 0:
            raise ValueError(f"'per_cell' and 'seed' must be 0 or more, not {self.per_cell} and {self.seed}")

    def grid(self) -> Preset:
        """The preset with what was chosen otherwise."""
        base = PRESETS[self.preset]
        own = {name: getattr(self, name) or getattr(base, name) for name in base._fields if name != "baseline"}
        own["depths"] = own["depths"] or PRESETS["needles"].depths
        return Preset(**own, baseline=self.baseline == "on" if self.baseline else base.baseline)

    def trials(self) -> dict[int, int]:
        """`Suite.trials`."""
        grid = self.grid()
        return dict.fromkeys(grid.lengths, grid.per_cell)

    def cells(self) -> int:
        """`Suite.cells`, each as often as a trial's text is read."""
        return sum(setting.reads for setting in settings(self.grid()))

    def measurements(self, model: LanguageModel, trials: Mapping[int, int]) -> list[Measurement]:
        """`Suite.measurements`: shortest lengths first."""
        maker = Maker(self, model.tokenizer)
        check_length(model, max(trials))
        maker.check(min(trials), trials[min(trials)])
        return [
            self._measurement(model, maker, setting, length, count)
            for length, count in trials.items()
            for setting in settings(self.grid())
        ]

    def _measurement(
        self, model: LanguageModel, maker: Maker, setting: Setting, length: int, count: int
    ) -> Measurement:
        spec: Row = {"task": setting.task, "length": length, "haystack": setting.haystack, "scoring": setting.scoring}
        spec |= {} if setting.depth is None else {"depth": setting.depth}
        spec |= {"absent": True} if setting.absent else {}
        spec |= maker.hashes(setting) | {"trials": count}

        def run(advance: Advance) -> list[Row]:
            return [measured(model, maker, setting, length, count, advance)]

        return Measurement(f"{setting.words()}, {length}", spec, length * count * setting.reads, run)


def measured(model: LanguageModel, maker: Maker, setting: Setting, length: int, count: int, advance: Advance) -> Row:
    """The row of one setting at one length: `count` trials, of which a bounded number of tokens is held at once."""
    shown: list[str] = []
    outputs: list[list[str]] = []
    trials = []
    at_once = max(1, AT_ONCE // length)
    for some in (range(start, min(count, start + at_once)) for start in range(0, count, at_once)):
        prompts = maker.prompts(setting, length, some)
        shown += [sha256(prompt.ids) for prompt in prompts]
        outputs += [[text for ask in prompt.asks for text in ask.outputs] for prompt in prompts]
        told = Told(advance, length * len(prompts))
        if setting.scoring == "forced":
            trials += forced(model, prompts, told.some)
            told.rest()
        else:
            for prompt in prompts:
                trials.append(free(model, prompt))
                advance(length * setting.reads)
    row: Row = {"kind": "absent" if setting.absent else "retrieval", "task": setting.task, "haystack": setting.haystack}
    row |= {"length": length} | ({} if setting.depth is None else {"depth": setting.depth})
    row |= {"scoring": setting.scoring, "trials": count}
    row |= forced_row(trials) if setting.scoring == "forced" else free_row(trials)
    hashes = {"prompts_sha256": sha256(shown), "trials_sha256": maker.trials_sha256(setting, outputs)}
    return row | hashes | maker.hashes(setting)
