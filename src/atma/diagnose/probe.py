"""What each channel does at each length, by layer and head: the watch that looks on while documents are read.

By head: n_eff, null mass, magnitude, memory norm, the mass on the first token, on recent keys and on the next largest
sink, the copy score, and of fast weights their surprise, write strength and drift. By layer: the energies of the
branches and of the stream, and their cosines. Means are over the last `queries` positions of a length; a copy score is
the weight of a record's tokens where they are to be told.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from atma.diagnose.attention import RECENT, copy_mass, mean_weights, queries_of, sink
from atma.diagnose.interventions import unnoted
from atma.diagnose.observed import Seen, observed
from atma.diagnose.parts import attending, attends, memory_of, observable
from atma.diagnose.texts import VALUE_TOKENS, Record
from atma.mixers import Mixer
from atma.mixers.heads import Attending
from atma.model import Model
from atma.statistics import mean_interval

Row = dict[str, Any]
Place = tuple[int, int | None, int]
"""Layer, head (None: the whole layer) and length."""


class Probe:
    """A watch for `read`. It may see several documents; `rows` are over them."""

    def __init__(self, model: Model, queries: int, notes: Mapping[Any, list[Tensor]] | None = None) -> None:
        """notes: those of `noted_decays`, if any are taken, which are to be of the text and not of what is asked."""
        self.model, self.queries, self.notes = model, queries, notes or {}
        self._values: dict[Place, dict[str, list[float]]] = {}
        self._asked: dict[Place, list[float]] = {}

    @contextmanager
    def ending(self, length: int) -> Iterator[None]:
        """Look at the call that ends a length."""
        with observed(self.model) as seen:
            yield
        self._settle()
        for layer, mixer in observable(self.model).items():
            if seen[layer].branches:
                self._note((layer, None, length), branch_figures(seen[layer]))
            for head, figures in enumerate(head_figures(mixer, seen[layer])):
                self._note((layer, head, length), figures)

    @contextmanager
    def asking(self, length: int, record: Record) -> Iterator[None]:
        """Look at the call that asks for a record."""
        with unnoted(self.notes), observed(self.model) as seen:
            yield
        places = [record.place + i for i in range(VALUE_TOKENS)]
        for layer, mixer in attending(self.model).items():
            copied = copy_mass(queries_of(mixer, seen[layer]), places)
            for head, mass in enumerate(copied.tolist()):
                self._asked.setdefault((layer, head, length), []).append(mass)

    def rows(self) -> list[Row]:
        """One row a layer and length (branch) and one a head and length (channel), each figure a mean over documents.

        `values` has each document's, and `intervals` Student's 95% where there are several documents.
        """
        self._settle()
        return [_row(place, values) for place, values in sorted(self._values.items(), key=lambda item: _order(item[0]))]

    def _note(self, place: Place, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._values.setdefault(place, {}).setdefault(name, []).append(value)

    def _settle(self) -> None:
        """A document's copy score is the mean over its records: what was asked at one length since the last call."""
        for place, masses in self._asked.items():
            self._note(place, {"copy_score": sum(masses) / len(masses)})
        self._asked.clear()


@torch.inference_mode()
def head_figures(mixer: Mixer, seen: Seen) -> list[dict[str, float]]:
    """Of each head, means over the queries of an observed call of one row; nothing of what its layer has not."""
    found = attention_figures(mixer, seen) if attends(mixer) else [{} for _ in range(mixer.heads)]
    if (memory := memory_of(mixer, seen.after)) is not None:
        for figures, held in zip(found, memory[0], strict=True):
            figures["memory_norm"] = float(torch.linalg.matrix_norm(held))
    for name, of_heads in seen.figures.items():  # of the memory's heads, which may be more than the channels have
        found += [{} for _ in range(of_heads.shape[1] - len(found))]
        for figures, value in zip(found, of_heads[0].tolist(), strict=True):
            figures[name] = value
    return found


def attention_figures(mixer: Attending, seen: Seen) -> list[dict[str, float]]:
    """Where the queries of each head look, and the magnitude that its core hands on, where it does one a head."""
    queries, magnitude = queries_of(mixer, seen), magnitudes(mixer, seen)
    mass, start = mean_weights(queries), int(seen.start[0])
    found = []
    for head in range(mixer.heads):
        second = sink(mass[head], start)
        figures = {"n_eff": float(queries.effective[head].mean()), "first_mass": float(mass[head, 0])}
        figures |= {"recent_mass": float(mass[head, max(0, start - RECENT) :].sum()), "sink_mass": second.mass}
        figures["sink_place"] = -1.0 if second.place is None else float(second.place)
        if queries.null is not None:
            figures["null_mass"] = float(queries.null[head].mean())
        if magnitude is not None:
            figures["magnitude"] = float(magnitude[0, :, head].mean())
        found.append(figures)
    return found


def magnitudes(mixer: Attending, seen: Seen) -> Tensor | None:
    """The numbers (B, T, H), one a head, that the core projects into the stream; None where it projects none."""
    single = [name for name, layer in mixer.core.channels().items() if layer.in_features == mixer.heads]
    return seen.inputs[single[0]] if single else None


@torch.inference_mode()
def branch_figures(seen: Seen) -> dict[str, float]:
    """Root mean squares of the stream and of what each channel adds to it, and the mean cosine of each two."""
    vectors = {"residual": seen.residual[0]} | {name: branch[0] for name, branch in seen.branches.items()}
    found = {f"{name}_rms": _rms(x) for name, x in vectors.items()}
    for (one, x), (other, y) in combinations(vectors.items(), 2):
        found[f"{one}_{other}_cosine"] = float(cosine_similarity(x.double(), y.double(), -1).mean())
    return found


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _order(place: Place) -> tuple[int, int, int]:
    layer, head, length = place
    return layer, -1 if head is None else head, length


def _row(place: Place, values: dict[str, list[float]]) -> Row:
    layer, head, length = place
    row: Row = {"kind": "branch" if head is None else "channel", "layer": layer, "length": length}
    if head is not None:
        row["head"] = head
    found = {name: mean_interval(given) for name, given in values.items()}
    row |= {name: interval.value for name, interval in found.items() if name != "sink_place"}
    spans = {name: [x.t_low, x.t_high] for name, x in found.items() if name != "sink_place" and x.t_low is not None}
    return row | {"intervals": spans, "values": values, "documents": max(map(len, values.values()))}
