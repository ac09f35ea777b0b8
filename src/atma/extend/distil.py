"""One step of a student beside its teacher: what both predict and hold is compared, and what is to be learned moves.

The teacher is the untouched model. Its predictions give KL(teacher ‖ student) at every token, scored or not, its stream
after each block the mean square distance, relative to the mean square of the teacher's (EchoAtt, arXiv 2409.14595).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atma.extend.settings import ExtendConfig
from atma.extend.ways import Way, mixers_of
from atma.model import Block, Model
from atma.train.objectives import residual_stream
from atma.train.source import Batch
from atma.train.step import Outcome, Stepper, computing

LOGITS = 1 << 24
"""Numbers of logits that are there at a time, of each of the two."""


class Distiller(Stepper):
    """Makes the steps of a student of `teacher` by a `way`."""

    def __init__(self, plain: Stepper, teacher: Model, way: Way, settings: ExtendConfig) -> None:
        super().__init__(plain.model, plain.optimisers, plain.train, plain.compute, plain.ranks)
        self.teacher, self.way, self.settings = teacher, way, settings
        self.now, self.later = 0, []
        self.linear = mixers_of(plain.model, "window_gain")
        own = {id(mixer.window_gain) for mixer in self.linear.values()}
        own |= {id(parameter) for mixer in self.linear.values() for parameter in mixer.feature.parameters()}
        if self.linear:
            self.later = [one for one in self.parameters if one.requires_grad and id(one) not in own]

    def __call__(self, step: int, batch: Batch, multiplier: float) -> Outcome:
        """`Stepper`, with the student put where it stands at this step."""
        self.now = step
        self.way.at(self.model, step, self.train.steps)
        for parameter in self.later:
            parameter.requires_grad_(not self.aligning)
        return super().__call__(step, batch, multiplier)

    @property
    def aligning(self) -> bool:
        """Whether in this step each layer by itself learns the attention of the teacher's."""
        return bool(self.linear) and self.now < self.settings.align_share * self.train.steps

    @property
    def taught(self) -> bool:
        """Whether this step has a teacher."""
        return self.now < self.settings.teacher_share * self.train.steps

    def _losses(self, part: tuple[Tensor, Tensor, Tensor], scored: Tensor, draw: int) -> dict[str, Tensor]:
        if self.aligning:
            return {"loss": self._alignment(part) / (self.train.accumulation * self.ranks.world)}
        if not self.taught:
            return super()._losses(part, scored, draw)
        tokens, targets, segments = part
        with contextlib.ExitStack() as stack:
            stack.enter_context(computing(self.device, self.compute))
            ours, theirs = [], []
            if self.settings.hidden_weight:
                ours = stack.enter_context(residual_stream(self.model))
                theirs = stack.enter_context(residual_stream(self.teacher))
            with torch.no_grad():
                taught, _ = self.teacher(tokens, segment_ids=segments)
            hidden, _ = self.model(tokens, segment_ids=segments)
            loss = self.model.loss(hidden, targets).sum() / scored
            share = 1 / (self.train.accumulation * self.ranks.world)
            losses = {"loss": loss, "logits": share * divergence(self.teacher, taught, self.model, hidden)}
            if ours:
                losses["hidden"] = share * distance(theirs, ours)
        return losses

    def _alignment(self, part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The mean over layers of how far each is from the teacher's, at the inputs that the teacher's layer has."""
        tokens, _, segments = part
        with computing(self.device, self.compute):
            with torch.no_grad(), mixer_inputs(self.teacher, list(self.linear)) as inputs:
                self.teacher(tokens, segment_ids=segments)
            terms = [mixer.alignment(inputs[layer], segments) for layer, mixer in self.linear.items()]
        return torch.stack(terms).mean()

    def _total(self, losses: dict[str, Tensor]) -> Tensor:
        if "logits" not in losses:
            return super()._total(losses)
        weights = {"loss": self.settings.text_weight, "logits": self.settings.logits_weight}
        weights["hidden"] = self.settings.hidden_weight
        terms = [weights[name] * value for name, value in losses.items() if weights[name]]
        return torch.stack(terms).sum()


@contextlib.contextmanager
def mixer_inputs(model: Model, layers: list[int]) -> Iterator[dict[int, Tensor]]:
    """What the mixers of some layers are given (B, T, D), by layer, in the forward passes run inside."""
    seen: dict[int, Tensor] = {}

    def listen(layer: int) -> Callable[..., None]:
        def note(_module: object, inputs: tuple[Tensor, ...]) -> None:
            seen[layer] = inputs[0]

        return note

    hooks = [cast(Block, model.blocks[layer]).mixer.register_forward_pre_hook(listen(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def divergence(teacher: Model, taught: Tensor, student: Model, hidden: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student) in nats, from the last hidden states (B, T, D) of each.

    The logits of a piece of the tokens are there at a time, and made again for the gradients.
    """
    taught, hidden = taught.flatten(0, 1), hidden.flatten(0, 1)
    piece = max(1, LOGITS // student.config.vocab_size)
    total = hidden.new_zeros((), dtype=torch.float32)
    for there, here in zip(taught.split(piece), hidden.split(piece), strict=True):
        total = total + _again(_divergence, teacher, there, student, here)
    return total / len(hidden)


def _divergence(teacher: Model, taught: Tensor, student: Model, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = teacher.logits(taught).log_softmax(-1)
    found = student.logits(hidden).log_softmax(-1)
    return F.kl_div(found, wanted, reduction="sum", log_target=True)


def _again(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def distance(theirs: list[Tensor], ours: list[Tensor]) -> Tensor:
    """Mean over blocks of ‖ours − theirs‖² / ‖theirs‖², of streams (B, T, D)."""
    terms = [
        (mine.float() - other.float()).square().mean() / other.float().square().mean().clamp(min=1e-12)
        for other, mine in zip(theirs, ours, strict=True)
    ]
    return torch.stack(terms).mean()
