"""Prompts of a suite's settings in the tokens of one tokenizer, every haystack tokenised once."""

from typing import TYPE_CHECKING

from atma.eval.language_model import Row
from atma.eval.retrieval import induction
from atma.eval.retrieval.haystacks import Haystack, Kind, haystack
from atma.eval.retrieval.needles import NEEDLES, Writer, draw, needle_prompt
from atma.eval.retrieval.presets import INDUCTION, Setting, settings
from atma.eval.retrieval.prompts import Encoder, NoRoom, Prompt
from atma.eval.retrieval.questions import Passages, read_hotpot, read_squad
from atma.eval.retrieval.ruler import RULER, Source, ruler_prompt
from atma.eval.suite import sha256
from atma.tokenizer import Tokenizer

if TYPE_CHECKING:
    from atma.eval.retrieval.suite import Retrieval

SHORT = 2048
"""Tokens that have room for most trials, and are soon put together: what fits them fits a longer prompt."""


class Maker:
    """Prompts of a suite in the tokens of a tokenizer; every haystack is tokenised once."""

    def __init__(self, suite: "Retrieval", tokenizer: Tokenizer) -> None:
        self.suite, self.encoder = suite, Encoder(tokenizer)
        self.settings = settings(suite.grid())
        tasks = {setting.task for setting in self.settings}
        names = {setting.haystack for setting in self.settings} - {"none"}
        names |= {"synthetic"} if tasks & set(RULER) else set()
        kinds: list[Kind] = [kind for kind in ("synthetic", "prose", "natural") if kind in names]
        self.haystacks: dict[str, Haystack] = {kind: haystack(kind, tokenizer, suite.natural) for kind in kinds}
        self.passages: dict[str, Passages] = {}
        for task, path, read in (("qa_1", suite.squad, read_squad), ("qa_2", suite.hotpot, read_hotpot)):
            if path is not None and task in tasks:
                self.passages[task] = read(path)
        self.writer = Writer(self.encoder) if tasks - set(RULER) else None

    def prompts(self, setting: Setting, length: int, trials: range) -> list[Prompt]:
        """The prompts of these trials. ValueError names the length and the task that it has no room for."""
        try:
            return self._prompts(setting, length, trials)
        except NoRoom as error:
            raise ValueError(f"length {length} has no room for {setting.task}: {error}") from None

    def _prompts(self, setting: Setting, length: int, trials: range) -> list[Prompt]:
        seed = self.suite.seed
        if setting.task in RULER:
            source = Source(self.encoder, self.haystacks, self.passages)
            return [ruler_prompt(source, setting.task, setting.haystack, seed, i, length) for i in trials]
        assert self.writer is not None
        text = self.haystacks[setting.haystack]
        if setting.task == INDUCTION:
            tokenizer = self.encoder.tokenizer
            drawn = induction.draw_trials(tokenizer, trials.stop, len(text.ids), seed)[trials.start :]
            return induction.prompts(tokenizer, tokenizer.start, text.ids, drawn, length, setting.absent)
        return [
            needle_prompt(self.writer, setting.task, text, draw(seed, i), length, setting.depth, setting.absent)
            for i in trials
        ]

    def check(self, length: int, count: int) -> None:
        """ValueError if a length has no room for a trial: all are tried, at SHORT where they fit there."""
        for setting in self.settings:
            for trial in (range(index, index + 1) for index in range(count)):
                try:
                    self.prompts(setting, min(length, SHORT), trial)
                except NoRoom:
                    self.prompts(setting, length, trial)

    def hashes(self, setting: Setting) -> Row:
        """Of the texts that decide a setting's prompts."""
        found = {"haystack_sha256": self.haystacks[setting.haystack].sha256} if setting.haystack != "none" else {}
        return found | (
            {"questions_sha256": self.passages[setting.task].sha256} if setting.task in self.passages else {}
        )

    def trials_sha256(self, setting: Setting, outputs: list[list[str]]) -> str:
        """Of the trials as they were drawn, before they were tokens, and of the texts asked for in each."""
        seed, count = self.suite.seed, len(outputs)
        drawn = [list(draw(seed, i)) for i in range(count)] if setting.task in NEEDLES else []
        return sha256([setting.task, seed, drawn, outputs])
