"""One optimiser step: micro-batches, the loss and its optional terms, summing over processes, clipping, moving.

The loss is the mean over all scored targets of the whole batch, whatever the accumulation and the number of processes.
A step whose loss or gradient is not finite moves nothing.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from atma.config import TrainConfig
from atma.mixers.stretches import edges_of, stretch_of
from atma.mixers.stretches_prefix import composes
from atma.model import Model
from atma.ops.loss import NOT_SCORED
from atma.train.allocator import keep_freed_memory
from atma.train.compiled import compile_blocks, compiling
from atma.train.distractor import alignment, core_calls
from atma.train.objectives import regularise, residual_stream
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks, all_here, sum_over
from atma.train.shards import before_backward
from atma.train.source import Batch


class Outcome(NamedTuple):
    """Nats per scored token, gradient norm before clipping, the optional terms, and whether parameters moved."""

    loss: float
    grad_norm: float
    terms: dict[str, float]
    moved: bool


class Stepper:
    """Makes the steps of one run on one model."""

    def __init__(
        self, model: Model, optimisers: Optimisers, train: TrainConfig, compute: torch.dtype, ranks: Ranks
    ) -> None:
        self.model, self.optimisers, self.train, self.compute, self.ranks = model, optimisers, train, compute, ranks
        self.follow()
        model.checkpointing = train.checkpointing_every if train.checkpointing else 0
        if train.compile:
            compile_blocks(model)
        if self.device.type == "cpu":
            keep_freed_memory()

    def follow(self, device: torch.device | None = None) -> None:
        """Take the model's parameters as they are now. device: where to compute; by default where they are."""
        self.device = device or self.model.embed.weight.device
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def __call__(self, step: int, batch: Batch, multiplier: float) -> Outcome:
        """Do the 0-based `step` on this process's share of the batch."""
        all_here(self.ranks, self.train.hang_seconds)
        sums = self.passes(step, batch)
        all_here(self.ranks, self.train.hang_seconds)
        owners = self.optimisers.owners
        own = self.parameters if owners is None else owners.reduce()
        norm = get_total_norm(self._gradients()) if owners is None else owners.norm()
        values = torch.stack([norm.float().to(self.device), *sums.values()]).tolist()
        grad_norm, (loss, *extra) = values[0], values[1:]
        moved = math.isfinite(loss) and math.isfinite(grad_norm)
        if moved:
            clip_grads_with_norm_(own, self.train.clip, norm)
            self.optimisers.step(multiplier)
        return Outcome(loss, grad_norm, dict(zip(list(sums)[1:], extra, strict=True)), moved)

    def passes(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Both passes over this process's share of the batch, which leave its gradients; the loss and terms, by name.

        ValueError: a block cannot be compiled.
        """
        with compiling(len(self.model.blocks)) if self.train.compile else contextlib.nullcontext():
            return self._backward(step, batch)

    def _backward(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Accumulate the gradients of every micro-batch; the loss and terms of the whole batch, by name."""
        for parameter in self.parameters:
            parameter.grad = None
        scored = sum_over(self.ranks, (self.own(batch.targets) != NOT_SCORED).sum().to(self.device)).clamp(min=1)
        totals: dict[str, Tensor] = {}
        for turn, part in enumerate(self._parts(batch)):
            parts = self._losses(part, scored, step * self.train.accumulation + turn)
            if self.ranks.in_parts:
                before_backward(self.model, turn == self.train.accumulation - 1)
            self._total(parts).backward()
            for name, value in parts.items():
                totals[name] = totals.get(name, 0) + value.detach()
        return {name: sum_over(self.ranks, value) for name, value in totals.items()}

    def _parts(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        whole = (batch.tokens, batch.targets, batch.segment_ids)
        pieces = [value.to(self.device).chunk(self.train.accumulation) for value in whole]
        yield from zip(*pieces, strict=True)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def own(self, x: Tensor) -> Tensor:
        """This process's stretch of rows (B, T)."""
        place = self.ranks.rank % self.ranks.context
        edges = edges_of(x.shape[1], self.ranks.context, self.train.context_shares)
        return x[:, edges[place] : edges[place + 1]]

    def hidden(self, tokens: Tensor, segments: Tensor, noise: int | None = None) -> Tensor:
        """What the model makes of rows (B, T): hidden (B, T, D), where rows are shared of this process's stretch."""
        if self.ranks.context == 1:
            return self.model(tokens, segment_ids=segments, noise=noise)[0]
        place = self.ranks.rank % self.ranks.context
        shape, shares = (tokens.shape[0], tokens.shape[1]), self.train.context_shares
        prefix = composes(len(self.model.blocks), self.ranks.context)
        stretch = stretch_of(place, self.ranks.peers, segments, shape, shares, prefix)
        return self.model(self.own(tokens), noise=noise, stretch=stretch)[0]

    def _losses(self, part: tuple[Tensor, Tensor, Tensor], scored: Tensor, draw: int) -> dict[str, Tensor]:
        """This micro-batch's share of the loss and of each optional term."""
        tokens, targets, segments = part
        share, seeds = 1 / (self.train.accumulation * self.ranks.world), (self.train.seed, draw, self.ranks.replica)
        with contextlib.ExitStack() as stack:
            stack.enter_context(computing(self.device, self.compute))
            stream = stack.enter_context(residual_stream(self.model)) if self.train.regulariser != "none" else []
            calls = stack.enter_context(core_calls(self.model)) if self.train.distractor_weight else []
            noise = generator(3, *seeds).initial_seed()
            hidden = self.hidden(tokens, segments, noise)
            losses = {"loss": self.model.loss(hidden, self.own(targets)).sum() / scored}
        if stream:
            losses["regulariser"] = share * regularise(self.train.regulariser, stream, generator(0, *seeds))
        if calls:
            losses["distractor"] = share * alignment(calls, self.train.length, generator(1, *seeds))
        return losses

    def _total(self, losses: dict[str, Tensor]) -> Tensor:
        weight = self.train.regulariser_weight if "regulariser" in losses else 0.0
        total = (1 - weight) * losses["loss"]
        if "regulariser" in losses:
            total = total + weight * losses["regulariser"]
        if "distractor" in losses:
            total = total + self.train.distractor_weight * losses["distractor"]
        return total


def computing(device: torch.device, compute: torch.dtype) -> contextlib.AbstractContextManager:
    """Autocast to `compute`, or nothing for float32."""
    if compute == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=compute)


def generator(*seeds: int) -> torch.Generator:
    """A generator that is a pure function of `seeds`: what a run draws depends on the step alone, never on history."""
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


@torch.no_grad()
def validation_loss(stepper: Stepper, batches: Iterator[Batch]) -> float:
    """Nats per scored token over `batches`, all processes together."""
    device, totals = stepper.device, torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        if stepper.ranks.context > 1:
            all_here(stepper.ranks, stepper.train.hang_seconds)  # or who has the first stretch runs ahead
        with computing(device, stepper.compute):
            hidden = stepper.hidden(batch.tokens.to(device), batch.segment_ids.to(device))
            targets = stepper.own(batch.targets.to(device))
            nats = stepper.model.loss(hidden, targets)
        totals += torch.stack([nats.double().sum(), (targets != NOT_SCORED).sum().double()]).cpu()
    nats, count = sum_over(stepper.ranks, totals.to(device)).tolist()
    return nats / max(count, 1)


def non_finite_names(stepper: Stepper, batch: Batch, most: int = 5) -> str:
    """Names of the parameters, gradients and activations that hold NaN or inf, for the message that ends a run.

    Of processes that share the weights, those of what this one moves.
    """
    found: dict[str, list[str]] = {"parameters": [], "gradients": [], "activations": []}
    owners = stepper.optimisers.owners
    held = owners.named.items() if owners and stepper.ranks.in_parts else stepper.model.named_parameters()
    for name, parameter in held:
        if not parameter.isfinite().all():
            found["parameters"].append(name)
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            found["gradients"].append(name)
    found["activations"] = _bad_activations(stepper, batch)
    lines = [f"{kind}: {', '.join(names[:most])}{_more(names, most)}" for kind, names in found.items() if names]
    return "; ".join(lines) or "none but the loss or its norm"


@torch.no_grad()
def _bad_activations(stepper: Stepper, batch: Batch) -> list[str]:
    bad: list[str] = []

    def listen(name: str):
        def note(_module: object, _inputs: object, output: object) -> None:
            values = output if isinstance(output, tuple) else (output,)
            spoilt = [value for value in values if isinstance(value, Tensor) and not value.isfinite().all()]
            bad.extend(f"{name}{_first_place(value)}" for value in spoilt[:1])

        return note

    hooks = [module.register_forward_hook(listen(name)) for name, module in stepper.model.named_modules() if name]
    try:
        for tokens, _, segments in stepper._parts(batch):
            with computing(stepper.device, stepper.compute):
                stepper.model(tokens, segment_ids=segments)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(bad))


def _first_place(x: Tensor) -> str:
    """Of heads' outputs (B, H, T, ·): which is the first that is not finite, in the order of tokens.

    A memory that diverges in a chunk spoils all of it, so that this is a token of the chunk where it did.
    """
    if x.ndim != 4:
        return ""
    token, row, head, _ = (~x.isfinite()).permute(2, 0, 1, 3).nonzero()[0].tolist()
    return f" (row {row}, head {head}, token {token})"


def _more(names: list[str], most: int) -> str:
    return f" and {len(names) - most} more" if len(names) > most else ""
