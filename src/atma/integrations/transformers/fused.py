"""TRL's fused head, with this model's cap.

TRL's trainers put a forward of their own over a model's, which multiplies hidden states by the head's weight and knows
no cap but tanh's: our logits would be others in training than in use. So whoever sets such a forward on a model of ours
gets one here that is called the same, returns the same, and scores tokens by the logits of the model.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atma.ops.loss import NOT_SCORED

_ROWS = 1024
"""Tokens whose logits are held at once."""
_ASKED = "fused_lm_head"
_TOLD = ("temperature", "outputs", "cast_lm_head_to_fp32")


def with_own_logits(forward: Any) -> Any:
    """A forward that is being set on a model: itself, or ours in the place of TRL's fused head.

    ValueError for a fused head of a TRL whose settings are not where they were.
    """
    function = getattr(forward, "__func__", None)
    if not isinstance(function, types.FunctionType) or _ASKED not in function.__code__.co_varnames:
        return forward
    told = inspect.getclosurevars(function).nonlocals
    output = function.__globals__.get("FusedCausalLMOutput")
    if output is None or any(name not in told for name in _TOLD):
        raise ValueError(
            "this version of TRL has a fused head unlike that of 1.16, and its logits would not be this model's: "
            "install trl 1.16, or train with transformers.Trainer"
        )
    ours = functools.partial(_fused, function, output, *(told[name] for name in _TOLD))
    return types.MethodType(functools.wraps(type(forward.__self__).forward)(_method(ours)), forward.__self__)


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function, as methods are made of."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return forward


def _fused(
    theirs: Callable[..., Any],
    output: Callable[..., Any],
    temperature: float,
    wanted: tuple[str, ...],
    wide: bool,
    model: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What the forward of TRL's fused head returns of `model`."""
    if not kwargs.get(_ASKED):
        return theirs(model, *args, **kwargs)
    names = (_ASKED, "labels", "shift_labels", "num_items_in_batch", "use_cache")
    _, labels, shifted, items, _ = (kwargs.pop(name, None) for name in names)
    hidden = model.base_model(*args, use_cache=False, **kwargs).last_hidden_state
    if shifted is None:
        hidden, shifted = hidden[:, :-1], labels[:, 1:]
    shifted = shifted.to(hidden.device)
    mask = shifted != NOT_SCORED
    found = _scores(model, hidden.float() if wide else hidden, shifted, mask, temperature)
    count = mask.sum().clamp(min=1) if items is None else items
    told = {name: value for name, value in found.items() if name in ("log_probs", *wanted)}
    return output(loss=-found["log_probs"].sum() / count, label_mask=mask, **told)


def _scores(model: Any, hidden: Tensor, labels: Tensor, mask: Tensor, temperature: float) -> dict[str, Tensor]:
    """Of each scored token what TRL asks, by name, each (B, T) and 0 where the label is −100."""
    parts = [
        checkpoint(_score, model, x, y, temperature, use_reentrant=False)
        for x, y in zip(hidden[mask].split(_ROWS), labels[mask].split(_ROWS), strict=True)
    ]
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return {
        name: value.new_zeros(mask.shape).masked_scatter(mask, value)
        for name, value in zip(names, columns, strict=True)
    }


def _score(model: Any, hidden: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, ...]:
    logits = model.logits(hidden) / temperature
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    with torch.no_grad():
        rest = (2 * log_probs).logsumexp(-1), logits.mean(-1), logits.argmax(-1) == labels
    return log_probs.gather(-1, labels[:, None])[:, 0], entropy, *rest


__all__ = ["with_own_logits"]
