"""The suite `likelihood`: clean text, junk and fixed targets by length and by position, in bits per byte.

clean: the prefix of each length of the same texts. junk: the same of the documents of the source one after the other,
end-of-text between them. fixed: the last bytes of each text after ever more of what stands before them.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from atma.data.sources import describe
from atma.eval.language_model import LanguageModel, Row, by_length, check_length
from atma.eval.likelihood.prefixes import position_edges
from atma.eval.likelihood.reading import Ending, Reading, Unit, from_beginning, to_end
from atma.eval.likelihood.texts import Text, choose, read_source, stretches
from atma.eval.likelihood.trend import trend
from atma.eval.ragged import score_each
from atma.eval.stream import Advance
from atma.eval.suite import Measurement, sha256
from atma.statistics import interval_row, mean_row
from atma.strict import check_fields

Measure = Literal["clean", "junk", "fixed"]
BYTES_A_TOKEN = 6
"""Text that is kept ready for a length of one token; few tokenizers make more of prose or code."""


@dataclass(frozen=True)
class Likelihood:
    """Bits per byte of the same texts by length."""

    texts: str = "stdlib"
    """A file, a folder, .jsonl, .parquet, hf:NAME, data of `atma prepare` (its validation split), or stdlib."""
    field: str = "text"
    """The key or column that holds the text."""
    lengths: tuple[int, ...] = (256, 1024, 4096, 16_384)
    """Increasing; in tokens of the model, the one that begins a text counted, or in bytes."""
    unit: Unit = "tokens"
    """What lengths count. In bytes, clean text and junk too are the same for every tokenizer."""
    measures: tuple[Measure, ...] = ("clean", "junk", "fixed")
    """What to measure."""
    documents: int = 16
    """Texts of each measure, or as many as there are."""
    target_bytes: int = 512
    """The end of each text that fixed targets are."""
    text_bytes: int = 0
    """Bytes of each text; 0 for six a token of the longest length, and the targets."""
    margin: float = 0.01
    """Bits per byte a doubling within which a curve is called flat."""
    seed: int = 1234
    """Draws the texts."""

    name = "likelihood"

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.lengths or min(self.lengths) < 2 or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths must be 2 or more and strictly increasing, not {list(self.lengths)}")
        for name, least in (("documents", 1), ("target_bytes", 4), ("text_bytes", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"'{name}' must be {least} or more, not {getattr(self, name)}")
        if not self.measures or len(set(self.measures)) < len(self.measures):
            raise ValueError(f"'measures' must be distinct, and one at least, not {list(self.measures)}")
        if not 0 < self.margin < math.inf:
            raise ValueError(f"'margin' must be above 0, not {self.margin}")

    @property
    def size(self) -> int:
        """Bytes of each text."""
        each = BYTES_A_TOKEN if self.unit == "tokens" else 1
        return self.text_bytes or each * self.lengths[-1] + self.target_bytes + 4

    def trials(self) -> dict[int, int]:
        """`Suite.trials`: none to choose, for every length is measured on the same texts."""
        return {}

    def cells(self) -> int:
        """`Suite.cells`."""
        return 0

    def measurements(self, model: LanguageModel, trials: Mapping[int, int]) -> list[Measurement]:
        """`Suite.measurements`."""
        sources = read_source(self.texts, self.field)
        clean, joined = choose(sources, self.size, self.documents, self.seed)
        junk = stretches(sources, self.size, self.documents, go_on=True)
        makers = {"clean": (clean, joined), "junk": (junk, 0), "fixed": (clean, joined)}
        found = []
        if by_length(model) and set(self.measures) != {"fixed"}:
            raise ValueError("clean and junk text is read once for all lengths: give --rope-factor or --measures fixed")
        for measure in self.measures:
            texts, count = makers[measure]
            piece = Fixed if measure == "fixed" else Curve
            found.append(piece(self, model, measure, texts, count).measurement())
        return found


@dataclass(frozen=True)
class Part:
    """One measure of one model on some texts."""

    suite: Likelihood
    model: LanguageModel
    measure: Measure
    texts: list[Text]
    joined: int

    def spec(self) -> Row:
        """What decides the result besides the model."""
        suite = self.suite
        own = {"measure": self.measure, "lengths": list(suite.lengths), "unit": suite.unit, "margin": suite.margin}
        own |= {"documents": len(self.texts)}
        own |= {"target_bytes": suite.target_bytes} if self.measure == "fixed" else {}
        return own | {"texts_sha256": sha256([list(text.parts) for text in self.texts])}

    def row(self, nats: Sequence[np.ndarray], sizes: Sequence[np.ndarray], shown: list[str]) -> Row:
        """The figures of some targets: nats and bytes of each target token of each document."""
        bits = np.array([float(one[size > 0].sum()) / math.log(2) for one, size in zip(nats, sizes, strict=True)])
        counts = np.array([int(size.sum()) for size in sizes])
        if not counts.all():
            raise ValueError("a text has no byte between two lengths; choose lengths further apart")
        row: Row = {"unit": self.suite.unit, "source": describe(self.suite.texts)}
        row |= {"documents": len(bits), "joined_documents": self.joined}
        row |= {"tokens": int(sum((size > 0).sum() for size in sizes)), "bytes": int(counts.sum())}
        row |= {"bits_per_byte": float(bits.sum() / counts.sum())}
        losses = (bits / counts).tolist()
        row |= mean_row("mean_bits_per_byte", losses)
        return row | {"document_losses": losses, "prompts_sha256": sha256(shown)}

    def trend(self, task: str, rows: Sequence[Row], skipped: Sequence[int]) -> list[Row]:
        """The row that says how the loss goes over these rows, if there are two."""
        if len(rows) < 2:
            return []
        lengths = [row["length"] for row in rows]
        found = trend(np.array([row["document_losses"] for row in rows]).T, lengths, self.suite.margin)
        row: Row = {"kind": "trend", "task": task, "lengths": lengths, "skipped_lengths": list(skipped)}
        row |= {"documents": len(rows[0]["document_losses"]), "unit": self.suite.unit, "verdict": found.verdict}
        row |= interval_row("slope", found.slope) | interval_row("change", found.change)
        row |= {"spearman": found.spearman, "p_falls": found.p_falls, "p_rises": found.p_rises}
        return [row | {"rises_at": list(found.rises_at)}]

    def fitting(self, reached: Sequence[Mapping[int, int]]) -> tuple[list[int], list[int]]:
        """Lengths that every text reaches, and those that some do not. ValueError: there is none."""
        lengths = self.suite.lengths
        fits = [length for length in lengths if all(length in one for one in reached)]
        if not fits:
            raise ValueError(
                f"the texts of {self.suite.size:,} bytes do not reach {lengths[0]:,} {self.suite.unit} "
                f"of {self.model.name}; raise 'text_bytes' or choose shorter lengths"
            )
        return fits, [length for length in lengths if length not in fits]


class Curve(Part):
    """Clean text or junk: one pass over the longest prefix gives every length and every position."""

    def measurement(self) -> Measurement:
        """The pass. ValueError for what cannot be measured."""
        readings, edges = self._readings, self._edges
        lengths, skipped = self._fits
        stops = [reading.stops[lengths[-1]] for reading in readings]
        check_length(self.model, max(stops))
        start = self.model.tokenizer.start
        sequences = [np.concatenate([[start], r.ids[:stop]]) for r, stop in zip(readings, stops, strict=True)]

        def run(advance: Advance) -> list[Row]:
            nats = score_each(self.model, sequences, stops, advance)
            shown = [sha256(sequence) for sequence in sequences]
            about: Row = {"kind": self.measure, "skipped_lengths": skipped}
            rows = [about | {"length": n} | self._between(nats, shown, 0, n) for n in lengths]
            places = [
                {"kind": "position", "task": self.measure, "length": end, "start": start}
                | self._between(nats, shown, start, end)
                for start, end in itertools.pairwise(edges)
            ]
            trends = self.trend(self.measure, rows, skipped)
            return [*rows, *places, *trends, *self.trend(f"{self.measure} by position", places, [])]

        return Measurement(self.measure, self.spec(), sum(stops), run)

    @cached_property
    def _fits(self) -> tuple[list[int], list[int]]:
        return self.fitting([reading.stops for reading in self._readings])

    @cached_property
    def _edges(self) -> list[int]:
        return position_edges(self._fits[0][-1])

    @cached_property
    def _readings(self) -> list[Reading]:
        suite = self.suite
        places = sorted({*suite.lengths, *(edge for n in suite.lengths for edge in position_edges(n) if edge)})
        junk = self.measure == "junk"
        return [from_beginning(text, places, suite.unit, self.model.tokenizer, junk) for text in self.texts]

    def _between(self, nats: Sequence[np.ndarray], shown: list[str], start: int, stop: int) -> Row:
        places = [slice(r.stops.get(start, 0), r.stops[stop]) for r in self._readings]
        sizes = [r.sizes[place] for r, place in zip(self._readings, places, strict=True)]
        row = self.row([one[place] for one, place in zip(nats, places, strict=True)], sizes, shown)
        spans = [
            (int(r.sizes[: place.start].sum()), int(size.sum()))
            for r, place, size in zip(self._readings, places, sizes, strict=True)
        ]
        return row | {"trials_sha256": sha256([self.spec()["texts_sha256"], spans])}


class Fixed(Part):
    """The same last bytes after ever more context."""

    def measurement(self) -> Measurement:
        """All lengths. ValueError for what cannot be measured."""
        suite = self.suite
        endings = [to_end(t, suite.lengths, suite.target_bytes, suite.unit, self.model.tokenizer) for t in self.texts]
        lengths, skipped = self.fitting([ending.counts for ending in endings])
        reads = {n: [ending.counts[n] + len(ending.target.ids) for ending in endings] for n in lengths}
        check_length(self.model, max(map(max, reads.values())))

        def run(advance: Advance) -> list[Row]:
            rows = [self._at(endings, length, advance) | {"skipped_lengths": skipped} for length in lengths]
            return [*rows, *self.trend(self.measure, rows, skipped)]

        return Measurement("fixed targets", self.spec(), sum(map(sum, reads.values())), run)

    def _at(self, endings: Sequence[Ending], length: int, advance: Advance) -> Row:
        start = self.model.tokenizer.start
        sequences = [ending.sequence(length, start) for ending in endings]
        nats = score_each(self.model, sequences, [len(ending.target.ids) for ending in endings], advance)
        shown = [sha256(sequence) for sequence in sequences]
        row: Row = {"kind": "fixed", "length": length}
        row |= self.row(nats, [ending.target.sizes for ending in endings], shown)
        row |= {"context_bytes": sum(ending.context_bytes(length) for ending in endings)}
        return row | {"trials_sha256": sha256([self.spec()["texts_sha256"], "targets"])}
