"""What the tests of the Triton kernels share: a GPU where there is one, else Triton's interpreter with its gaps filled.

Triton reads TRITON_INTERPRET when it is first imported, so a test of it imports this module before anything else of it.
"""

import importlib.util
import os
import types

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LENGTHS = [1, 2, 63, 64, 65, 130]

if importlib.util.find_spec("triton") is None:
    pytest.skip("the GPU kernels need Triton, which is not installed", allow_module_level=True)
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402


def mend_interpreter() -> None:
    """Products of bfloat16; before 3.7, loop bounds under NumPy 2.4; and the language is prepared once a kernel rather
    than for every call of a function inside it, which takes most of the interpreter's time."""
    create_dot, patch_tensor = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor
    patch_language = interpreter._patch_lang
    language = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return create_dot(self, a, b, *rest)

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor = dot, patch
    interpreter._patch_lang = lambda fn: patch_language(language)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


if not ON_GPU:
    mend_interpreter()


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def is_real(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def placed(arguments, dtype=None, device=DEVICE):
    """The arguments on `device`, real ones in `dtype` (None: their own) with a gradient to come."""
    made = [x.detach().to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
    return [x.to(dtype or x.dtype).requires_grad_() if is_real(x) else x for x in made]


def results(function, arguments):
    """Outputs and the gradients to every real argument, on the CPU, for gradients drawn for the outputs."""
    out = function(*arguments)
    out = out if isinstance(out, tuple) else (out,)
    given = [draw(*x.shape, seed=9).to(x.device, x.dtype) for x in out]
    gradients = torch.autograd.grad(out, [x for x in arguments if is_real(x)], given)
    return [x.detach().cpu() for x in (*out, *gradients)]


def error(found, exact):
    """Largest error of each result, relative to the largest exact value."""
    pairs = zip(found, exact, strict=True)
    return [float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]
