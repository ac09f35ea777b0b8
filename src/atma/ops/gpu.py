"""What the Triton kernels of the operations share. Imported by them alone: it needs Triton."""
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest even; the interpreter alone would cut a bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b):
    """a · b in float32, a first rounded to b's dtype, never in tf32; the interpreter has no bfloat16 product."""
    a = narrow(a, b.dtype) if a.dtype != b.dtype else a
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_dot(total, a, b):
    """total + a · b, as `dot`, for a and b of one dtype."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=total, input_precision="ieee")


def unit_stride(x: Tensor) -> Tensor:
    """x with its last dimension in one piece; other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()
