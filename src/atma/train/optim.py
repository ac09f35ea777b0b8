"""Which parameter is moved by which rule, and Muon at full precision where there is no GPU.

Linear weights inside blocks go to Muon, all else to AdamW at three rates: embeddings, head, and everything small
(biases, taps, per-head scalars). Source: maths.md, section 6.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from atma.config import TrainConfig
from atma.model import Model
from atma.ops.dense import newton_schulz

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_TINY = 1e-7
GRAM_NUMBERS = 1 << 22
"""Numbers of the Gram matrices that are worked on together: 16 MiB."""
SMALL_SIDE = 256
"""The largest smaller side of a matrix for which products in float32 cost a GPU less than launching them one by one."""


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (Nesterov momentum, update scaled by sqrt(max(1, rows/cols))), in float32 on a CPU.

    torch's runs its Newton-Schulz rounds in bfloat16, which a CPU without bfloat16 instructions emulates: the 46
    matrices of the nano model took 2071 ms on one core limited to AVX2 and 64 ms with AVX512-BF16, this form 59 ms on
    both (benchmarks/training_choices.py). It is also accurate to 1e-4 where bfloat16 is off by 65%: a gradient of rank
    4. On a GPU, matrices up to `SMALL_SIDE` go together like this too, since a launch costs more than their products;
    larger ones take torch's own step.
    """

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        if closure is not None or any(p.device.type != "cpu" and min(p.shape) > SMALL_SIDE for p in every):
            return super().step(closure)
        for group in self.param_groups:
            for parameters in _alike([p for p in group["params"] if p.grad is not None]):
                directions = [self._direction(parameter, group["momentum"]) for parameter in parameters]
                for parameter, update in zip(parameters, orthogonalise_all(directions), strict=True):
                    rows, columns = parameter.shape
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
        return None

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum_buffer"], momentum)


def _alike(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Those of one smaller side together, one for each thread at least, or as many as make `GRAM_NUMBERS`."""
    sizes: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        sizes.setdefault(min(parameter.shape), []).append(parameter)
    for size, alike in sizes.items():
        most = max(torch.get_num_threads(), GRAM_NUMBERS // max(1, size * size))
        yield from (alike[i : i + most] for i in range(0, len(alike), most))


def orthogonalise(matrix: Tensor) -> Tensor:
    """A (rows, columns) matrix with singular values near 1, from `matrix` by five Newton-Schulz rounds."""
    return orthogonalise_all([matrix])[0]


def orthogonalise_all(matrices: list[Tensor]) -> list[Tensor]:
    """Five Newton-Schulz rounds X ← (a + b XXᵀ + c (XXᵀ)²) X of each, from X of norm 1; all have one smaller side.

    They iterate on the Gram matrix of that side alone, since every factor is a polynomial of it: A ← P A P and one
    product with X at the end. That is the same polynomial for two thirds of the operations, its products are symmetric,
    and small matrices of different shapes go together.
    """
    tall = [matrix.size(0) > matrix.size(1) for matrix in matrices]
    grams = torch.stack([x.mT @ x if high else x @ x.mT for x, high in zip(matrices, tall, strict=True)])
    norms = grams.diagonal(dim1=1, dim2=2).sum(1).sqrt().clamp(min=_TINY)[:, None, None]
    factors = newton_schulz(grams / norms.square(), _COEFFICIENTS, _ROUNDS) / norms
    return [x @ f if high else f @ x for x, f, high in zip(matrices, factors, tall, strict=True)]


def parameter_groups(model: Model) -> dict[str, dict[str, nn.Parameter]]:
    """Every parameter by name, once, under "matrix" (Muon), "embedding", "head" or "vector" (AdamW)."""
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    groups: dict[str, dict[str, nn.Parameter]] = {"matrix": {}, "embedding": {}, "head": {}, "vector": {}}
    for name, parameter in model.named_parameters():
        if name.startswith("embed."):
            kind = "embedding"
        elif name.startswith("head."):
            kind = "head"
        else:
            kind = "matrix" if name in linear and name.startswith("blocks.") else "vector"
        groups[kind][name] = parameter
    return groups


class Optimisers:
    """Muon and AdamW over one model, moved together by one rate multiplier."""

    def __init__(self, model: Model, train: TrainConfig) -> None:
        groups = parameter_groups(model)
        self.names = {parameter: name for group in groups.values() for name, parameter in group.items()}
        self.rates = {"matrix": train.muon_rate, "embedding": train.embedding_rate}
        self.rates |= {"head": train.head_rate, "vector": train.vector_rate}
        self._muon = Muon(
            _rows(groups, ["matrix"]),
            lr=train.muon_rate,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            adjust_lr_fn="original",
        )
        self._adam = torch.optim.AdamW(
            _rows(groups, ["embedding", "head", "vector"]),
            betas=(train.beta1, train.beta2),
            eps=train.epsilon,
            weight_decay=0.0,
            fused=True,
        )
        self._both = {"muon": self._muon, "adamw": self._adam}

    def step(self, multiplier: float) -> None:
        """Move every parameter by its gradient, at its rate times `multiplier`, and drop the gradients."""
        for optimiser in self._both.values():
            for group in optimiser.param_groups:
                group["lr"] = self.rates[group["kind"]] * multiplier
            optimiser.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for optimiser in self._both.values():
            optimiser.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The whole optimiser state as tensors named "rule/parameter/quantity"."""
        return {
            f"{rule}/{self.names[parameter]}/{quantity}": value
            for rule, optimiser in self._both.items()
            for parameter, state in optimiser.state.items()
            for quantity, value in state.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor], where: object) -> None:
        """Restore what `tensors` returned; ValueError (naming `where`) when a name or shape does not belong here."""
        by_name = {name: parameter for parameter, name in self.names.items()}
        for key, value in tensors.items():
            rule, _, rest = key.partition("/")
            name, _, quantity = rest.rpartition("/")
            parameter = by_name.get(name)
            if parameter is None or rule not in self._both:
                raise ValueError(f"{where}: unexpected tensor '{key}': state of another model")
            if value.ndim and value.shape != parameter.shape:
                found, wanted = tuple(value.shape), tuple(parameter.shape)
                raise ValueError(f"{where}: tensor '{key}' is {found}, the model has {wanted}")
            self._both[rule].state[parameter][quantity] = value.to(parameter.device, copy=True)


def _rows(groups: dict[str, dict[str, nn.Parameter]], kinds: Iterable[str]) -> list[dict]:
    return [{"params": list(groups[kind].values()), "kind": kind} for kind in kinds if groups[kind]]
