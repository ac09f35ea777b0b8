"""All that is counted of a recipe before anything is known of a machine: numbers, multiply-adds, bytes kept."""

import itertools
from collections import Counter
from typing import NamedTuple

import torch

from atma.config import Recipe
from atma.model import computed_again
from atma.ops.backend import use_backend
from atma.plan.activations import Saved, ends_saved, layer_saved
from atma.plan.work import LayerWork, Size, layer_works, outline, size_of
from atma.train.optim import ROUNDS


class Costs(NamedTuple):
    """Of one recipe, computed in one type."""

    recipe: Recipe
    compute: torch.dtype
    size: Size
    layers: dict[str, LayerWork]
    saved: dict[str, Saved]
    """What a layer of each name keeps for its backward pass."""
    ends: Saved
    """What embedding, last norm and loss keep."""

    @property
    def head(self) -> int:
        """Multiply-adds of a token in the head."""
        return self.recipe.model.width * self.recipe.model.vocab_size

    @property
    def again(self) -> Counter[str]:
        """How many layers of each name checkpointing computes again."""
        layers = self.recipe.model.layers
        return Counter(layers[i] for i in computed_again(layers, self.recipe.train.checkpointing_every))

    @property
    def again_share(self) -> float:
        """Of all layers."""
        return self.again.total() / self.recipe.model.depth

    def products(self, length: float) -> dict[str, float]:
        """Multiply-adds of a token's forward pass, by part."""
        layers = self.layers.values()
        return {
            "dense products": float(sum(one.count * one.dense for one in layers)),
            "head": float(self.head),
            "attention": sum(one.count * one.attention(length) for one in layers),
            "memories, recurrences, convolutions": sum(one.count * one.fixed for one in layers),
        }

    def overtakes(self, most: int = 1 << 30) -> int | None:
        """The length in tokens at which attention's multiply-adds are those of the dense products and the head.

        None where they never are, up to `most`.
        """

        def over(length: int) -> bool:
            parts = self.products(length)
            return parts["attention"] >= parts["dense products"] + parts["head"]

        if not over(most):
            return None
        low, high = 1, most
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if over(middle) else (middle + 1, high)
        return low

    def shares(self, ranks: int) -> list[float]:
        """Percent of a row for each rank of a context, the first first, so that all have as many multiply-adds."""

        def work(tokens: float) -> float:
            return tokens * sum(self.products(tokens).values())

        edges, length = [0.0], float(self.recipe.train.length)
        for i in range(1, ranks + 1):
            low, high = edges[-1], length
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if work(middle) < work(length) * i / ranks else (low, middle)
            edges.append(high)
        return [round(100 * (after - before) / length, 1) for before, after in itertools.pairwise(edges)]

    def update(self) -> float:
        """Operations of one update, of which only Muon's products count: five rounds on each matrix's smaller side."""
        sides = ((min(matrix), max(matrix)) for matrix in self.size.matrices)
        return 2.0 * ROUNDS * sum(2 * low * low * high + low**3 for low, high in sides)


def costs_of(recipe: Recipe, compute: torch.dtype, backend: str = "auto") -> Costs:
    """Count it. ValueError: the recipe counts in epochs, whose tokens only its data tell.

    backend: whose activations are counted; "cpu", blocked PyTorch, is nearest to what a GPU keeps.
    """
    if recipe.train.epochs:
        raise ValueError(
            f"'epochs' {recipe.train.epochs:g}: a plan reads no data; say how many tokens: "
            "--set train.epochs=0 train.tokens=NUMBER"
        )
    model = outline(recipe)
    layers = layer_works(recipe.model)
    with use_backend(backend):
        saved = {name: layer_saved(recipe.model, name, compute) for name in layers}
        ends = ends_saved(recipe.model, compute)
    return Costs(recipe, compute, size_of(recipe, model), layers, saved, ends)
