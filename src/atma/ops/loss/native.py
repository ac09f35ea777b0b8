"""The loss with its passes over the logits compiled (ops/native/loss.cpp): products are PyTorch's, on the CPU.

Logits exist a block of tokens and words at a time, in one buffer that the gradient overwrites. A block holds as many
tokens as it may and so few words, since each further block of tokens reads and writes the weight's gradient once more.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.loss import asked
from atma.ops.loss.operator import loss_operator, of_bias

BLOCK_LOGITS = 1 << 21
"""Logits held at once: 8 MiB in float32, 4 in bfloat16."""
MOST_ROWS = 4096
LEAST_WORDS = 64
_FIELDS = {
    "loss_forward": "rows columns first z bias targets top total chosen cap threads",
    "loss_backward": "rows columns first z bias targets partition grad grad_bias cap threads",
}


def losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float) -> Tensor:
    """(N,) nats for hidden (N, D): float32, float64 or bfloat16, the weight of the same dtype; sums are float32."""
    bias = None if bias is None else bias.to(torch.promote_types(hidden.dtype, torch.float32))
    return _operation(hidden, weight, bias, targets, cap)[0]


@asked.forward
def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Losses and log partition sums, both (N,)."""
    targets, work = targets.contiguous(), torch.promote_types(hidden.dtype, torch.float32)
    top = torch.full(targets.shape, -torch.inf, dtype=work)
    total, chosen = (torch.zeros(targets.shape, dtype=work) for _ in range(2))
    for tokens, words, z in _blocks(hidden, weight):
        rows = [x[tokens] for x in (targets, top, total, chosen)]
        _call("loss_forward", z, words, bias, rows, cap)
    partition = total.log_().add_(top)
    return partition - chosen, partition


@asked.backward
def _backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, partition: Tensor, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    targets, grad, work = targets.contiguous(), grad.contiguous(), partition.dtype
    grad_hidden = torch.zeros(hidden.shape, dtype=work)
    one = 0 < targets.numel() <= MOST_ROWS  # each word's gradient is then a single product
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype) if one else torch.zeros(weight.shape, dtype=work)
    grad_bias = torch.zeros(weight.shape[:1], dtype=work)
    for tokens, words, z in _blocks(hidden, weight):
        rows = [x[tokens] for x in (targets, partition, grad)]
        _call("loss_backward", z, words, bias, [*rows, grad_bias[words]], cap)
        _add_product(grad_hidden[tokens], z, weight[words])
        if one:
            torch.mm(z.mT, hidden, out=grad_weight[words])
        else:
            _add_product(grad_weight[words], z.mT, hidden[tokens])
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), of_bias(grad_bias, bias, hidden)


def _blocks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tokens, words, and their logits before bias and cap."""
    rows = min(hidden.shape[0], MOST_ROWS)
    columns = min(weight.shape[0], max(LEAST_WORDS, BLOCK_LOGITS // max(1, rows)))
    room = hidden.new_empty(rows * columns)
    for tokens in _slices(hidden.shape[0], rows):
        for words in _slices(weight.shape[0], columns):
            left, right = hidden[tokens], weight[words]
            z = room[: left.shape[0] * right.shape[0]].view(left.shape[0], right.shape[0])
            yield tokens, words, torch.mm(left, right.mT, out=z)


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, total)) for i in range(0, total, max(1, size)))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b, of which total may be of the wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _call(name: str, z: Tensor, words: slice, bias: Tensor | None, rows: list[Tensor], cap: float) -> None:
    bias = None if bias is None else bias.contiguous()
    places = native.addresses(z, None if bias is None else bias[words], *rows)
    native.call(name, z.dtype, _FIELDS[name], (*z.shape, words.start, *places, cap, torch.get_num_threads()))


_operation = loss_operator("atma::softcap_loss_native", _forward, _backward)
