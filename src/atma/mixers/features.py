"""Feature maps of queries and keys (mixers.md, section 2.1).

A map takes x (B, H, T, K) to φ(x) (B, H, T, K′), float32 or wider but for those that only take lengths away. `positive`
ones have φ(q)·φ(k) > 0 and can be normalised by their sum; `bounded` ones have |φ(k)| of at most 1, as the delta rule
needs of its keys.
"""

import itertools
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from atma.layers import Linear
from atma.ops.dense import rms_norm
from atma.ops.rows import sigmoid, unit
from atma.strict import require

FeatureName = Literal["identity", "unit", "elu1", "taylor", "hedgehog", "poly"]
WIDEST = 16
"""The widest head whose products of coordinates are taken: of two, 153 features; of a head of 64 they were 2,145."""


class Feature(nn.Module):
    """x itself."""

    positive: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    keeps_width: ClassVar[bool] = True
    """Whether K′ is K, so that a decay of each key channel has its place."""
    steady: ClassVar[bool] = True
    """Whether there is a form whose bits are a row's own."""

    def __init__(self, heads: int, width: int, degree: int) -> None:
        super().__init__()
        self.width = width
        """K′."""

    def init_weights(self) -> None:
        """Set what is learned."""

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """φ(x)."""
        return x


class Unit(Feature):
    """x / max(|x|, 1e-12), or x / sqrt(|x|² + ε) for an ε above 0."""

    bounded = True
    epsilon: float = 0.0

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """`Feature.forward`."""
        if self.epsilon:
            return rms_norm(x, None, x.shape[-1], self.epsilon / x.shape[-1]) * x.shape[-1] ** -0.5
        return unit(x, steady)


class Elu1(Feature):
    """x + 1 above zero, else exp(x): not as elu + 1, which float32 rounds to 0 from −17 on."""

    positive = True

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """`Feature.forward`; e^m is σ(m)/σ(−m) where bits are to be a row's own."""
        x = widened(x)
        low = x.clamp(max=0)
        return torch.where(x > 0, x + 1, sigmoid(low, True) / sigmoid(-low, True) if steady else low.exp())


class Taylor(Feature):
    """φ(q)·φ(k) = 1 + s + s²/2 with s = q·k/√K: the exponential's first terms (BASED, 2402.18668)."""

    keeps_width = False
    positive = True

    def __init__(self, heads: int, width: int, degree: int) -> None:
        super().__init__(heads, width, degree)
        require(width <= WIDEST, "key_width", width, f"at most {WIDEST} for products of coordinates")
        self.width = 1 + width + width * (width + 1) // 2

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """`Feature.forward`: 1, x/K^¼, then x_i²/√(2K) and x_i x_j/√K row by row."""
        x = widened(x) * x.shape[-1] ** -0.25
        first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        scale = x.new_ones(len(first)).masked_fill(first == second, 0.5**0.5)
        products = x.index_select(-1, first) * x.index_select(-1, second) * scale
        return torch.cat([torch.ones_like(x[..., :1]), x, products], -1)


class Hedgehog(Feature):
    """softmax(y), softmax(−y) of y = A x + b, learned for each query head, which q and k share (2402.04347)."""

    keeps_width = False
    positive = True
    steady = False

    def __init__(self, heads: int, width: int, degree: int) -> None:
        super().__init__(heads, width, degree)
        self.width = 2 * width
        self.weight = nn.Parameter(torch.empty(heads, width, width))
        self.shift = nn.Parameter(torch.empty(heads, width))

    def init_weights(self) -> None:
        """`Feature.init_weights`: A = I, b = 0."""
        nn.init.zeros_(self.shift)
        self.weight.copy_(torch.eye(self.weight.shape[-1], dtype=self.weight.dtype).expand_as(self.weight))

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """`Feature.forward`; keys of fewer heads (B, G, T, K) become those of the query heads."""
        x = x.repeat_interleave(len(self.weight) // x.shape[1], 1) if x.shape[1] != len(self.weight) else x
        y = widened(x @ self.weight.to(x.dtype).mT) + self.shift[:, None]
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


class Poly(Feature):
    """All monomials of degree ≤ p, by degree, then by their coordinates in order (ATLAS, 2505.23735).

    For unit x and y φ(x)·φ(y) = Σ a_i (x·y)^i / Σ a_i with learned a_i = exp(raw_i), 1/i! at the start, and |φ| = 1.
    """

    bounded = True
    keeps_width = False

    def __init__(self, heads: int, width: int, degree: int) -> None:
        super().__init__(heads, width, degree)
        require(width <= WIDEST, "key_width", width, f"at most {WIDEST} for products of coordinates")
        self.width = math.comb(width + degree, degree)
        self.raw = nn.Parameter(torch.empty(degree + 1))
        for i in range(1, degree + 1):
            self.register_buffer(f"degree_{i}", _monomials(width, i), persistent=False)

    def init_weights(self) -> None:
        """`Feature.init_weights`."""
        self.raw.copy_(-torch.tensor([math.lgamma(i + 1) for i in range(len(self.raw))]))

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """`Feature.forward`, of x made unit."""
        return self.lift(unit(x, steady))

    def lift(self, x: Tensor) -> Tensor:
        """The monomials of x as it is, weighed: x^α of degree i by √(a_i i!/α!) / √Σa."""
        x = widened(x)
        weights = (self.raw.to(x.dtype) - self.raw.to(x.dtype).logsumexp(0)).mul(0.5).exp()
        levels, level = [torch.ones_like(x[..., :1]) * weights[0]], x
        for i in range(1, len(weights)):
            first, rest, count = self.get_buffer(f"degree_{i}")
            level = x if i == 1 else x.index_select(-1, first) * level.index_select(-1, rest)
            levels.append(level * (weights[i] * count.to(x.dtype).sqrt()))
        return torch.cat(levels, -1)


class Narrow(nn.Module):
    """Queries (B, H, T, K) and keys (B, G, T, K) of a global mixer, to narrower ones of every head (B, H, T, `WIDEST`).

    Both begin as the same orthonormal rows of each head's own coordinates, so that what was alike is alike.
    """

    def __init__(self, heads: int, groups: int, width: int) -> None:
        super().__init__()
        self.heads, self.groups, self.wide = heads, groups, width
        self.q_proj = Linear(heads * width, heads * WIDEST, bias=False)
        self.k_proj = Linear(groups * width, heads * WIDEST, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """See the class."""
        for layer in (self.q_proj, self.k_proj):
            nn.init.zeros_(layer.weight)
        for head in range(self.heads):
            group = head * self.groups // self.heads
            rows = orthonormal(WIDEST, self.wide, generator)
            for layer, at in ((self.q_proj, head), (self.k_proj, group)):
                layer.weight[WIDEST * head : WIDEST * (head + 1), self.wide * at : self.wide * (at + 1)] = rows

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        parts = (layer(x.transpose(1, 2).flatten(2)) for layer, x in ((self.q_proj, q), (self.k_proj, k)))
        q, k = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
        return q, k


def orthonormal(rows: int, columns: int, generator: torch.Generator | None) -> Tensor:
    """A random matrix whose rows are orthonormal, or its columns where there are fewer; float32."""
    device = None if generator is None else generator.device
    return nn.init.orthogonal_(torch.empty(rows, columns, dtype=torch.float32, device=device), generator=generator)


def widened(x: Tensor) -> Tensor:
    """x in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _monomials(width: int, degree: int) -> Tensor:
    """(3, n) of the monomials x^α of degree i: the first coordinate, where the others are a degree lower, i!/α!."""
    coordinates = range(width)
    lower = {one: n for n, one in enumerate(itertools.combinations_with_replacement(coordinates, degree - 1))}
    found = itertools.combinations_with_replacement(coordinates, degree)
    numbers = [(one[0], lower[one[1:]], _arrangements(one)) for one in found]
    return torch.tensor(numbers).T.contiguous()


def _arrangements(coordinates: tuple[int, ...]) -> int:
    """i!/α!."""
    repeats = math.prod(math.factorial(coordinates.count(one)) for one in set(coordinates))
    return math.factorial(len(coordinates)) // repeats


FEATURES: dict[str, type[Feature]] = {
    "identity": Feature,
    "unit": Unit,
    "elu1": Elu1,
    "taylor": Taylor,
    "hedgehog": Hedgehog,
    "poly": Poly,
}
