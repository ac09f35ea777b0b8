"""One token of a kernel memory, written where it lies (mixers.md, section 4.7): no key but its own is moved."""

import torch
from torch import Tensor

from atma.ops.fast_weights.kernel import Kernel, KernelState


def kernel_step(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, memory: Kernel, state: KernelState
) -> tuple[Tensor, KernelState]:
    """The definition's arguments for T = 1, and its results; the state, as it is held, is overwritten. On the CPU."""
    heads = q.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    rows = zip(q, k, v, omega.flip(-1).mT, state.length.tolist(), strict=True)
    reads = [_row(one, memory, state, row) for row, one in enumerate(rows)]
    return torch.stack(reads), state._replace(length=state.length + 1)


def _row(one: tuple[Tensor, Tensor, Tensor, Tensor, int], memory: Kernel, state: KernelState, row: int) -> Tensor:
    """What a row's token reads (H, 1, V). u of the tokens before the last c − 1 is closed, and lies c − 1 places on."""
    q, k, v, omega, n = one
    keys, written, closed = state.keys[row], state.written[row], max(0, n + 1 - memory.window)
    keys[:, n] = k[:, 0]
    values, open_u = v, torch.zeros_like(v)
    if state.v_tail is not None and state.open is not None:
        values = torch.cat([state.v_tail[row], v], 1)
        open_u = torch.cat([state.open[row], open_u], 1)
        state.v_tail[row] = values[:, 1:]
    last = n + 1 - closed  # tokens of the text among the last c
    values, omega, u = (x[:, -last:] for x in (values, omega, open_u))

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        """κ of x (H, N, K) with the keys whose u are closed, and with the others."""
        kappa = memory.sharpness[:, None, None] * (x @ keys[:, : n + 1].mT - 1)
        kappa = kappa.exp_()
        return kappa[..., :closed], kappa[..., closed:]

    tail = memory.window - 1
    known = written[:, tail : tail + closed]
    if memory.rule == "delta":
        far, near = parts(keys[:, closed : n + 1])
        values = values - far @ known - near @ u
    u = u + omega * values
    far, near = parts(q)
    read = far @ known + near @ u
    if memory.normalise:
        read = read / (far.sum(-1, keepdim=True) + near.sum(-1, keepdim=True))
    if state.open is None:
        written[:, n] = u[:, 0]
    else:
        written[:, n] = u[:, 0] if last == memory.window else 0.0
        state.open[row, :, -min(last, tail) :] = u[:, -min(last, tail) :]
    return read
