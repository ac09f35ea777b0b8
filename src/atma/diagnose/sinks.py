"""Secondary attention sinks: tokens whose hidden state comes to point where the first token's does, and for how long.

By the definition of arXiv 2512.22213 and its code. The state of layer l is the stream behind block l, of the last
layer behind the last norm. The first token's norm rises at one layer and falls at another: the layers from the one of
its largest rise up to the one before its largest fall after that are looked at. There a token is a sink at each layer
where |cosine| to the first token's state is over 0.9; its first layer and its lifetime, the number of these layers, are
its level.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from atma.model import Model

Row = dict[str, Any]
THRESHOLD = 0.9
LEAST_LIFE, SHORT_OF = 5, 15
"""Layers that a secondary sink lasts at least, and by how many fewer than the model has, as published."""


class Alignment(NamedTuple):
    """Of one text and N layers."""

    norms: list[float]
    """The first token's norm at each layer."""
    cosines: Tensor
    """|cosine| (N, T) of every token's state to the first token's."""


class Aligner:
    """Takes the states of one text, layer by layer and piece by piece."""

    def __init__(self, layers: int) -> None:
        self._first: dict[int, Tensor] = {}
        self.notes: dict[int, list[Tensor]] = {layer: [] for layer in range(layers)}

    def take(self, layer: int, states: Tensor) -> None:
        """States (T, D) of the next tokens."""
        states = states.detach().float()
        first = self._first.setdefault(layer, states[0].clone())
        self.notes[layer].append(cosine_similarity(states, first, -1).abs().cpu())

    def notes_of(self, wanted: bool) -> dict[str, list[Tensor]]:
        """The notes under names that are no layers', for `unnoted`; none where they are not wanted."""
        return {f"stream {layer}": noted for layer, noted in self.notes.items()} if wanted else {}

    def alignment(self) -> Alignment:
        """Of all that was taken, the same tokens at every layer."""
        norms = [float(torch.linalg.vector_norm(first)) for _, first in sorted(self._first.items())]
        return Alignment(norms, torch.stack([torch.cat(noted) for noted in self.notes.values()]))


@contextmanager
def aligned(model: Model, aligner: Aligner) -> Iterator[None]:
    """Inside, each call of the model gives its states, of one row, to the aligner."""

    def taking(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _given: tuple[Any, ...], result: Any) -> None:
            aligner.take(layer, (result[0] if isinstance(result, tuple) else result)[0])

        return hook

    with ExitStack() as stack:
        for layer, module in enumerate([*list(model.blocks)[:-1], model.norm]):
            stack.callback(module.register_forward_hook(taking(layer)).remove)
        yield


def span(norms: Sequence[float]) -> range:
    """The layers between the largest rise of the first token's norm and the largest fall after it."""
    changes = [after - before for before, after in pairwise(norms)]
    if not changes:
        return range(len(norms))
    start = changes.index(max(changes)) + 1
    falls = changes[start:]
    return range(start, start + falls.index(min(falls)) + 1 if falls else len(norms))


def sinks_row(document: int, tokens: Sequence[int], found: Alignment, threshold: float = THRESHOLD) -> Row:
    """The sinks of one text: of each its place, token, first layer and lifetime, side by side in lists."""
    layers = span(found.norms)
    over = found.cosines[layers.start : layers.stop] > threshold
    over[:, 0] = False
    places = over.any(0).nonzero()[:, 0]
    row: Row = {"kind": "sinks", "document": document, "length": over.shape[1], "layers": len(found.norms)}
    row |= {"threshold": threshold, "first_layer": layers.start, "last_layer": layers.stop - 1, "norms": found.norms}
    row |= {"places": places.tolist(), "tokens": [tokens[i] for i in places.tolist()]}
    row["first_layers"] = (over[:, places].int().argmax(0) + layers.start).tolist()
    return row | {"lifetimes": over[:, places].sum(0).tolist()}


def level_rows(rows: Sequence[Row]) -> list[Row]:
    """One row a level over the texts of `sinks_row`: how many sinks it has, in how many texts, what it is called."""
    counted, texts = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for row in rows:
        levels = list(zip(row["first_layers"], row["lifetimes"], strict=True))
        counted.update(levels)
        texts.update(set(levels))
    layers = rows[0]["layers"] if rows else 0
    most = max((row["last_layer"] - row["first_layer"] + 1 for row in rows), default=0)
    return [
        {"kind": "sink level", "first_layer": first, "lifetime": life, "count": count, "texts": texts[first, life]}
        | {"called": called(life, layers, most), "documents": len(rows)}
        for (first, life), count in counted.most_common()
    ]


def called(lifetime: int, layers: int, most: int) -> str:
    """What a sink of this lifetime is: published, "primary" from 15 layers less than the model has, "brief" below five.

    A model of fewer than 21 layers has no room between these: there what lasts as long as the first token is primary.
    """
    if layers - SHORT_OF <= LEAST_LIFE:
        return "primary" if lifetime >= most else "secondary"
    if lifetime >= layers - SHORT_OF:
        return "primary"
    return "secondary" if lifetime >= LEAST_LIFE else "brief"


def told(rows: Sequence[Row]) -> list[str]:
    """What the sinks of all texts come to, in a sentence; nothing where they were not looked for."""
    texts = [row for row in rows if row["kind"] == "sinks"]
    if not texts:
        return []
    levels = [row for row in rows if row["kind"] == "sink level" and row["called"] == "secondary"]
    read = f"{len(texts)} texts of {texts[0]['length']:,} tokens"
    if not levels:
        return [f"No secondary sink in {read}."]
    most, count = levels[0], sum(row["count"] for row in levels)
    commonest = f"from layer {most['first_layer']} for {most['lifetime']} of {texts[0]['layers']}"
    return [f"Secondary sinks: {count:,} tokens of {read}; {most['count']:,} of them {commonest} layers."]


__all__ = ["THRESHOLD", "Aligner", "Alignment", "aligned", "called", "level_rows", "sinks_row", "span", "told"]
