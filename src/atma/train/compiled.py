"""Blocks compiled by `torch.compile`, one at a time and from outside: the model's code does not know.

What is compiled is a block's `forward`, in place: weights keep their names, blocks of one structure share the code that
is made, and what listens at blocks, such as `fully_shard` to gather their weights, stays outside of it. So does the
computing again of checkpointed blocks. Only steps are compiled: without gradients, as in validation, and with a state,
as where texts are written, blocks run as they are.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from atma.mixers import Call
from atma.model import Model

BACKEND = "inductor"
"""What makes code of a block."""
_LEAVE_OUT = "leave it out: --set train.compile=false"


def compile_blocks(model: Model) -> None:
    """Have every block compiled where it is called next, with gradients and without a state."""
    _hush()
    for block in model.blocks:
        block.forward = _in_steps(block.forward)


def _in_steps(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(plain, backend=BACKEND)

    def forward(
        x: Tensor, state: Any = None, *, segment_ids: Tensor | None = None, call: Call | None = None
    ) -> tuple[Tensor, Any]:
        run = compiled if state is None and torch.is_grad_enabled() else plain
        return run(x, state, segment_ids=segment_ids, call=call)

    return forward


@contextlib.contextmanager
def compiling(blocks: int) -> Iterator[None]:
    """Where a step of a model of so many compiled blocks runs, both passes.

    ValueError, in one line: a block cannot be compiled, or is compiled again and again for what each batch has.
    """
    from torch._dynamo import config, exc

    most = 2 * blocks + 8
    with _quiet(), config.patch(recompile_limit=most, fail_on_recompile_limit_hit=True):
        try:
            yield
        except exc.FailOnRecompileLimitHit as error:
            raise ValueError(
                f"'compile' true: a block of this model has been compiled for {most} batches, and the next is another "
                f"case again; {_LEAVE_OUT}"
            ) from error
        except exc.TorchDynamoException as error:
            raise ValueError(
                f"'compile' true: torch.compile cannot compile a block: {_first(error)}; {_LEAVE_OUT}"
            ) from error


def require_compiler(device: torch.device) -> None:
    """ValueError, in one line, unless `torch.compile` makes code that runs on the device."""
    _hush()
    with _quiet():
        try:
            torch.compile(_twice, backend=BACKEND)(torch.ones(16, device=device))
        except (RuntimeError, OSError, ImportError) as error:
            raise ValueError(
                f"'compile' true: torch.compile makes no code on this machine: {_first(error)}; install a C++ "
                f"compiler, such as g++, or {_LEAVE_OUT}"
            ) from error


def _twice(x: Tensor) -> Tensor:
    return x + x


def _first(error: Exception) -> str:
    """The line of a message that says what is wrong."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _hush() -> None:
    """Keep what PyTorch writes of code that it leaves as it is from who trains; `TORCH_LOGS` has it written."""
    from torch._logging._internal import set_logs

    set_logs(all=logging.ERROR)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The same for its warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.")
        yield


__all__ = ["compile_blocks", "compiling", "require_compiler"]
