"""Which parameter is moved by which rule, and Muon at full precision where there is no GPU.

Inside blocks, linear weights and parameters of three dimensions, a matrix for each head, go to Muon; all else goes to
AdamW at three rates: embeddings, head, and everything small (biases, taps, per-head scalars). Source: maths.md,
section 6. Adapters go to AdamW at a rate of their own, and under optimiser = "adamw" everything does. What is frozen is
in no group and has no state.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from atma.config import TrainConfig
from atma.lora import FACTORS
from atma.model import Model
from atma.ops.dense import newton_schulz
from atma.train.owners import Owners
from atma.train.parallel import Ranks

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
_TINY = 1e-7
ADAMW_COST = 100.0
"""Multiply-adds in whose time AdamW moves a number: it is the memory's rate that counts."""
_ADAM = ("embedding", "head", "vector", "adapter")
"""Groups that AdamW always moves."""
GRAM_NUMBERS = 1 << 22
"""Numbers of the Gram matrices that are worked on together: 16 MiB."""
SMALL_SIDE = 256
"""The largest smaller side of a matrix for which products in float32 cost a GPU less than launching them one by one."""


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (Nesterov momentum, update scaled by sqrt(max(1, rows/cols))), in float32 on a CPU.

    A parameter is a matrix, or a matrix for each head (heads, rows, columns), each with an update of its own.

    torch's runs its Newton-Schulz rounds in bfloat16, which a CPU without bfloat16 instructions emulates: the 46
    matrices of the nano model took 2071 ms on one core limited to AVX2 and 64 ms with AVX512-BF16, this form 59 ms on
    both (benchmarks/training_choices.py). It is also accurate to 1e-4 where bfloat16 is off by 65%: a gradient of rank
    4. On a GPU, matrices up to `SMALL_SIDE` go together like this too, since a launch costs more than their products,
    and so do those of heads, which torch does not take; larger ones take torch's own step.
    """

    place: torch.device | None = None
    """Where products are computed, of matrices that lie in the processor's memory too; None: where they lie."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, weight_decay: float, momentum: float) -> None:
        """groups: dictionaries as torch's optimisers take them; those of heads become groups of their own."""
        single, headed = [], []
        for group in groups:
            single.append(group | {"params": [p for p in group["params"] if p.ndim != 3]})
            headed.append(group | {"params": [p for p in group["params"] if p.ndim == 3]})
        super().__init__(single, lr, weight_decay, momentum, adjust_lr_fn="original")
        for group in headed:
            if group["params"]:
                self.add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient; returns what `closure` does, which is called first."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        groups = self.param_groups
        if any(_is_large(parameter) for group in groups for parameter in group["params"]):
            groups = self._step_of_torch()
        for group in groups:
            for parameters in _alike([p for p in group["params"] if p.grad is not None]):
                directions = [self._direction(parameter, group["momentum"]) for parameter in parameters]
                for parameter, update in zip(parameters, self._orthogonal(directions), strict=True):
                    rows, columns = parameter.shape[-2:]
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
        return loss

    def _orthogonal(self, directions: list[Tensor]) -> list[Tensor]:
        there = [direction.to(self.place or direction.device) for direction in directions]
        return [made.to(one.device) for made, one in zip(orthogonalise_all(there), directions, strict=True)]

    def _step_of_torch(self) -> list[dict[str, Any]]:
        """torch's own step of every single matrix; the groups that are left."""
        groups, headed = self.param_groups, []
        self.param_groups = []
        for group in groups:
            (headed if any(p.ndim == 3 for p in group["params"]) else self.param_groups).append(group)
        try:
            super().step()
        finally:
            self.param_groups = groups
        return headed

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum_buffer"], momentum)


def _is_large(parameter: Tensor) -> bool:
    return parameter.ndim == 2 and parameter.device.type != "cpu" and min(parameter.shape) > SMALL_SIDE


def _alike(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Those of one smaller side together: a matrix for each thread at least, or as many as make `GRAM_NUMBERS`."""
    sizes: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        sizes.setdefault(min(parameter.shape[-2:]), []).append(parameter)
    for size, alike in sizes.items():
        most = max(torch.get_num_threads(), GRAM_NUMBERS // max(1, size * size))
        some: list[Tensor] = []
        for parameter in alike:
            if some and sum(map(_count, some)) + _count(parameter) > most:
                yield some
                some = []
            some.append(parameter)
        yield some


def _count(matrices: Tensor) -> int:
    return matrices.shape[0] if matrices.ndim == 3 else 1


def orthogonalise(matrix: Tensor) -> Tensor:
    """A (rows, columns) matrix with singular values near 1, from `matrix` by five Newton-Schulz rounds.

    Of (heads, rows, columns), each of the matrices.
    """
    return orthogonalise_all([matrix])[0]


def orthogonalise_all(matrices: list[Tensor]) -> list[Tensor]:
    """Five Newton-Schulz rounds X ← (a + b XXᵀ + c (XXᵀ)²) X of each, from X of norm 1; all have one smaller side.

    They iterate on the Gram matrix of that side alone, since every factor is a polynomial of it: A ← P A P and one
    product with X at the end. That is the same polynomial for two thirds of the operations, its products are symmetric,
    and small matrices of different shapes go together.
    """
    tall = [matrix.size(-2) > matrix.size(-1) for matrix in matrices]
    each = [x.mT @ x if high else x @ x.mT for x, high in zip(matrices, tall, strict=True)]
    grams = torch.cat([gram if gram.ndim == 3 else gram[None] for gram in each])
    norms = grams.diagonal(dim1=1, dim2=2).sum(1).sqrt().clamp(min=_TINY)[:, None, None]
    factors = newton_schulz(grams / norms.square(), _COEFFICIENTS, ROUNDS) / norms
    shares = [f.view_as(gram) for f, gram in zip(factors.split([_count(x) for x in matrices]), each, strict=True)]
    return [x @ f if high else f @ x for x, f, high in zip(matrices, shares, tall, strict=True)]


def parameter_groups(model: Model) -> dict[str, dict[str, nn.Parameter]]:
    """Every trained parameter by name, once: "matrix" (Muon), "embedding", "head", "vector" or "adapter" (AdamW).

    Inside blocks, matrices are the weights of linear layers and (heads, rows, columns), a matrix for each head; a class
    of modules keeps its own from Muon by naming them in its `vectors`.
    """
    modules = dict(model.named_modules())
    linear = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Linear)}
    kept = {f"{name}.{own}" for name, module in modules.items() for own in getattr(type(module), "vectors", ())}
    groups: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in ("matrix", *_ADAM)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.rpartition(".")[2] in FACTORS:
            kind = "adapter"
        elif name.startswith("embed."):
            kind = "embedding"
        elif name.startswith("head."):
            kind = "head"
        else:
            matrix = name.startswith("blocks.") and (name in linear or parameter.ndim == 3) and name not in kept
            kind = "matrix" if matrix else "vector"
        groups[kind][name] = parameter
    return groups


def cost_of(kind: str, parameter: Tensor) -> float:
    """What a step of a parameter costs, in multiply-adds of a product: so processes share them equally."""
    if kind != "matrix":
        return parameter.numel() * ADAMW_COST
    short, long = sorted(parameter.shape[-2:])
    return _count(parameter) * (2 * long * short**2 + 3 * ROUNDS * short**3) + parameter.numel() * ADAMW_COST


class Optimisers:
    """Muon and AdamW over one model, moved together by one rate multiplier; of several processes each its own part."""

    owners: Owners | None = None
    """Who moves what, where there are several processes."""

    def __init__(self, model: Model, train: TrainConfig, ranks: Ranks | None = None) -> None:
        groups = parameter_groups(model)
        self.names: dict[Tensor, str] = {
            parameter: name for group in groups.values() for name, parameter in group.items()
        }
        if not self.names:
            raise ValueError("nothing of the model is to be trained: every parameter is frozen")
        self._shapes = {name: parameter.shape for parameter, name in self.names.items()}
        self._rule = {
            name: "muon" if kind == "matrix" and train.optimiser != "adamw" else "adamw"
            for kind, group in groups.items()
            for name in group
        }
        if ranks is not None and (ranks.world > 1 or ranks.in_parts):
            costs = {n: cost_of("matrix" if self._rule[n] == "muon" else "", p) for p, n in self.names.items()}
            trained = {name: p for name, p in model.named_parameters() if name in costs}  # in the model's order
            self.owners = Owners(ranks, trained, costs)
            own = self.owners.own
            groups = {kind: {n: p for n, p in group.items() if n in own} for kind, group in groups.items()}
        self.rates = _rates(train)
        plain = train.optimiser == "adamw"
        matrices = _rows(groups, ["matrix"])
        adam = _rows(groups, _ADAM) + (
            [row | {"weight_decay": train.weight_decay} for row in matrices] if plain else []
        )
        self._both: dict[str, torch.optim.Optimizer] = {}
        if matrices and not plain:
            self._both["muon"] = Muon(
                matrices, lr=train.muon_rate, momentum=train.momentum, weight_decay=train.weight_decay
            )
        if adam:
            betas = (train.beta1, train.beta2)
            self._both["adamw"] = torch.optim.AdamW(adam, betas=betas, eps=train.epsilon, weight_decay=0.0, fused=True)

    def step(self, multiplier: float) -> None:
        """Move every parameter by its gradient, at its rate times `multiplier`, and drop the gradients.

        Of several processes each moves its own, and takes the others' from those that own them.
        """
        for optimiser in self._both.values():
            for group in optimiser.param_groups:
                group["lr"] = self.rates[group["kind"]] * multiplier
            optimiser.step()
        if self.owners is not None:
            self.owners.spread()
        self.zero_grad()

    def keep_own(self, owners: Owners, device: torch.device) -> None:
        """Go on with `owners`, and hold nothing of what others move. device: where matrices are orthogonalised."""
        self.owners, own = owners, set(owners.named.values())
        self.names = {parameter: name for parameter, name in self.names.items() if parameter in own}
        for optimiser in self._both.values():  # whose parameters may have gone to a GPU
            if isinstance(optimiser, Muon):
                optimiser.place = device
            for parameter, state in optimiser.state.items():
                state.update({name: value.to(parameter.device) for name, value in state.items()})

    def zero_grad(self) -> None:
        for optimiser in self._both.values():
            optimiser.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser state, of several processes this one's part, as tensors named "rule/parameter/quantity"."""
        return {
            f"{rule}/{self.names[parameter]}/{quantity}": value
            for rule, optimiser in self._both.items()
            for parameter, state in optimiser.state.items()
            for quantity, value in state.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor], where: object) -> None:
        """Restore what `tensors` returned; what others own is theirs.

        ValueError names, behind `where`, one of another name, rule or shape.
        """
        known: dict[tuple[str, str], Any] = {
            (rule, self.names[parameter]): parameter
            for rule, optimiser in self._both.items()
            for group in optimiser.param_groups
            for parameter in group["params"]
        }
        for key, value in tensors.items():
            rule, _, rest = key.partition("/")
            name, _, quantity = rest.rpartition("/")
            if self._rule.get(name) != rule:
                raise ValueError(f"{where}: unexpected tensor '{key}': state of another model")
            if value.ndim and value.shape != self._shapes[name]:
                found, wanted = tuple(value.shape), tuple(self._shapes[name])
                raise ValueError(f"{where}: tensor '{key}' is {found}, the model has {wanted}")
            parameter = known.get((rule, name))
            if parameter is None:
                continue
            state: dict[Any, Any] = self._both[rule].state
            state[parameter][quantity] = value.to(parameter.device, copy=True)


def _rates(train: TrainConfig) -> dict[str, float]:
    """The rate of each group."""
    if train.optimiser == "adamw":
        return dict.fromkeys(("matrix", *_ADAM), train.adamw_rate) | {"adapter": train.lora_rate}
    rates = {"matrix": train.muon_rate, "embedding": train.embedding_rate, "head": train.head_rate}
    return rates | {"vector": train.vector_rate, "adapter": train.lora_rate}


def _rows(groups: dict[str, dict[str, nn.Parameter]], kinds: Iterable[str]) -> list[dict]:
    return [{"params": list(groups[kind].values()), "kind": kind} for kind in kinds if groups[kind]]
