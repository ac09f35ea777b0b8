"""START HERE for a diagnosis: one model, some documents, and what each of its parts does and is worth.

`diagnose` reads the documents with the model as it is, looking on, then once more with every part taken away and every
long-holding memory head capped, all in pairs. `findings` says in plain words what the differences support.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from atma.diagnose import changes, choice
from atma.diagnose.changes import Change
from atma.diagnose.effects import UNCHANGED, effect_rows, far_rows, reading_rows
from atma.diagnose.findings import Finding, findings
from atma.diagnose.interventions import noted_decays
from atma.diagnose.parts import forgetting
from atma.diagnose.plan import QUERIES, Plan
from atma.diagnose.probe import Probe
from atma.diagnose.reading import read, read_recent
from atma.diagnose.retention import retention_rows, thinned
from atma.diagnose.sinks import THRESHOLD, Aligner, aligned, level_rows, sinks_row
from atma.diagnose.stress import gain_rows, gains
from atma.diagnose.texts import Laid, check_lengths, lay
from atma.eval.likelihood.prefixes import Documents
from atma.eval.loaded import Loaded, tokenizer_of
from atma.eval.provenance import model_provenance
from atma.eval.stream import Advance
from atma.eval.suite import Measurement, Progress, run_measurements, sha256

Row = dict[str, Any]
CHUNK = 1024


class Diagnosis(NamedTuple):
    """Everything measured, and what it says, largest effects first."""

    rows: list[Row]
    findings: list[Finding]
    cap: float
    """Tokens that half-lives were capped at."""


class _Reader(NamedTuple):
    """What every measurement needs."""

    loaded: Loaded
    texts: list[Laid]
    plan: Plan
    cap: float
    chunk: int

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.plan.extent.lengths


def diagnose(
    loaded: Loaded,
    documents: Documents,
    plan: Plan | None = None,
    results: Path | str | None = None,
    progress: Progress | None = None,
    chunk: int = CHUNK,
) -> Diagnosis:
    """Read documents of at least the longest length, all of them; rows are plain JSON data with their provenance.

    With `results`, a .jsonl file, measurements are kept as they come and taken from it when they are there. ValueError,
    before anything is measured: heads that are not there, texts too short.
    """
    plan = plan or Plan()
    changes.check(plan, loaded.model)
    lengths, seed = plan.extent.lengths, plan.seed
    texts = lay(tokenizer_of(loaded), documents, lengths[-1], plan.records, seed)
    check_lengths(texts, lengths)
    reader = _Reader(loaded, texts, plan, plan.cap_half_life or trained_length(loaded) or float(lengths[0]), chunk)
    stamp = model_provenance(loaded) | {"texts_sha256": sha256(documents.tokens), "seed": seed, "chunk": chunk}

    def measured(measurements: Sequence[Measurement]) -> list[Row]:
        return run_measurements("diagnose", measurements, stamp, results, progress)

    rows, model = measured([_baseline(reader)]), loaded.model
    tried = changes.masks(plan, model) | changes.caps(plan, model, reader.cap, rows) | changes.moved(plan, model)
    tried |= changes.factors(plan, model) | changes.pruned(plan, model)
    rows += measured([_changed(reader, name, change) for name, change in tried.items()])
    rows += measured([*_stress(reader), *_choice(reader)])
    rows += effect_rows(rows)
    return Diagnosis(rows, findings(rows), reader.cap)


def trained_length(loaded: Loaded) -> float | None:
    """Context tokens of a training row, as the model's folder tells; None where it does not."""
    told: Any = getattr(loaded, "info", None) or {}
    for key in ("extra", "recipe", "train", "length"):
        told = told.get(key) if isinstance(told, dict) else None
    return float(told) if isinstance(told, int) and told > 0 else None


def _measurement(reader: _Reader, name: str, spec: Row, run: Callable[[Advance], list[Row]]) -> Measurement:
    about: Row = {"lengths": list(reader.lengths), "documents": len(reader.texts), "records": reader.plan.records}
    return Measurement(name, about | spec, len(reader.texts) * reader.lengths[-1], run)


def _baseline(reader: _Reader) -> Measurement:
    model, plan = reader.loaded.model, reader.plan

    def run(advance: Advance) -> list[Row]:
        notes: dict[int, list[torch.Tensor]] = {layer: [] for layer in forgetting(model)}
        probe, readings, recent = Probe(model, QUERIES, notes), [], []
        decays: dict[int, list[torch.Tensor]] = {layer: [] for layer in forgetting(model)}
        sinks: list[Row] = []
        for i, text in enumerate(reader.texts):
            aligner = Aligner(len(model.blocks))
            probe.notes = notes | aligner.notes_of(plan.sinks)
            with noted_decays(model, notes), aligned(model, aligner) if plan.sinks else nullcontext():
                readings.append(read(model, text, reader.lengths, reader.chunk, probe, advance))
            if plan.sinks:
                sinks.append(sinks_row(i, text.tokens.tolist(), aligner.alignment()))
            recent.append(read_recent(model, text, reader.lengths))
            for layer, noted in notes.items():
                decays[layer].append(thinned(noted))
                noted.clear()
        used = {layer: torch.cat(noted, 1) for layer, noted in decays.items()}
        rows = reading_rows(UNCHANGED, readings, reader.lengths) + far_rows(readings, recent, reader.lengths)
        return rows + probe.rows() + retention_rows(model, used) + sinks + level_rows(sinks)

    more = {"sinks": THRESHOLD} if plan.sinks else {}
    return _measurement(reader, UNCHANGED, {"measure": UNCHANGED, "queries": QUERIES} | more, run)


def _changed(reader: _Reader, name: str, change: Change) -> Measurement:
    model = reader.loaded.model

    def run(advance: Advance) -> list[Row]:
        with change.make():
            readings = [read(model, text, reader.lengths, reader.chunk, None, advance) for text in reader.texts]
        return [row | change.about for row in reading_rows(name, readings, reader.lengths)]

    spec = {"measure": "change", "change": name, "cap": change.cap} | change.more
    return _measurement(reader, name, spec, run)


def _choice(reader: _Reader) -> Iterator[Measurement]:
    model, plan = reader.loaded.model, reader.plan
    if plan.choose_heads == 0:
        return
    tokens = choice.passes(plan, model, len(reader.texts)) * reader.lengths[-1]

    def run(advance: Advance) -> list[Row]:
        read = 0

        def counting(count: int) -> None:
            nonlocal read
            read += count
            advance(count)

        rows = choice.choose(model, reader.texts, plan, reader.chunk, counting)
        advance(tokens - read)
        return rows

    spec: Row = {"measure": "choice", "heads": plan.choose_heads, "by": plan.choose_by}
    made = _measurement(reader, "choice of heads", spec | {"strength": plan.choose_strength}, run)
    yield made._replace(tokens=tokens)


def _stress(reader: _Reader) -> Iterator[Measurement]:
    model, plan = reader.loaded.model, reader.plan
    texts = reader.texts[: plan.extent.stress_documents]
    if plan.stress == 0:
        return

    def run(advance: Advance) -> list[Row]:
        measured = [
            [gains(model, text, reader.lengths, plan.seed + i, reader.chunk, advance) for i in range(plan.stress)]
            for text in texts
        ]
        return gain_rows(model, measured, reader.lengths)

    spec: Row = {"measure": "gain", "directions": plan.stress, "stressed": len(texts)}
    made = _measurement(reader, "block gains", spec, run)
    yield made._replace(tokens=len(texts) * plan.stress * reader.lengths[-1])
