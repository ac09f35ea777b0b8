"""The memories of mixers.md, section 4.10 as rules, small, and random arguments for any rule."""

from typing import NamedTuple

import torch
from torch import Tensor

from atma import state as states
from atma.ops.fast_weights import Gates, Kernel, Memory, Rule, fast_weights, kernel_memory
from atma.ops.fast_weights.rule import HUBERS

MLP = {"network": "mlp", "residual": "identity", "decay_to": "initial"}
LIFTED = MLP | {"residual": "skip"}
GATED = {"network": "gated", "activation": "silu"}
AT_END = {"granularity": "chunk", "optimiser": "momentum"}
TTT = {"residual": "identity", "norm": True, "average": True}
LACT = GATED | AT_END | {"bias": "dot", "retention": "renorm", "gates": "matrix"}
PRESETS = {
    "atma_memory": MLP | {"anchor": "hidden"},
    "titans": MLP | {"optimiser": "momentum"},
    "ttt_linear": TTT | {"network": "matrix"},
    "ttt_mlp": TTT | {"network": "mlp"},
    "moneta": MLP | {"norm": True, "bias": "lp", "retention": "lq", "gates": "channel"},
    "yaad": MLP | {"norm": True, "bias": "huber", "gates": "channel"},
    "memora": MLP | {"norm": True, "retention": "kl"},
    "dla": LIFTED | {"bias": "dot"},
    "swla": {"network": "matrix", "bias": "dot", "window": 3},
    "omeganet": LIFTED | {"window": 3},
    "atlas": LIFTED | {"optimiser": "muon", "window": 6},
    "atlas_pp": LIFTED | GATED | {"optimiser": "muon", "window": 3},
    "lact": LACT,
    "lact_muon": LACT | {"optimiser": "muon", "schedule": "lact"},
    "allmem": GATED | AT_END | {"residual": "identity", "retention": "renorm_after_read"},
    "atlas at chunk ends": MLP | AT_END | {"optimiser": "muon", "window": 3, "gates": "channel"},
    "channels, per coordinate": MLP | {"bias": "huber_coordinate", "gates": "channel", "optimiser": "momentum"},
    "gated, channels": GATED | {"optimiser": "muon", "gates": "channel", "anchor": "hidden"},
    "hidden, with everything": MLP | {"norm": True, "anchor": "hidden", "window": 3, "optimiser": "momentum"},
    "atma_memory, normalised": MLP | {"anchor": "hidden", "normalised": True},
    "titans, normalised": MLP | {"optimiser": "momentum", "normalised": True, "norm": True},
    "gated, normalised": GATED | {"normalised": True, "anchor": "hidden"},
    "titans, held": MLP | {"optimiser": "momentum", "radius": 0.3},
    "ttt_mlp, held": TTT | {"network": "mlp", "radius": 0.02},
}
"""Options of each rule, C = 4 aside."""
BACKENDS = ("reference", "cpu", "native")
KERNELS = {"deep_transformer": ("add", 1), "swdt": ("add", 3), "dot": ("delta", 1), "dot_window": ("delta", 3)}


class Text(NamedTuple):
    """What a memory is given; the tokens' parts are along axis 2."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    memory: Memory

    def part(self, tokens, rows=slice(None)):
        """Some of the tokens, of some of the rows."""
        gates = Gates(*(x if x is None else x[rows, :, tokens] for x in self.gates))
        return Text(*(x[rows, :, tokens] for x in self[:3]), gates, self.memory)

    def run(self, state=None, segment_ids=None):
        return fast_weights(*self, state, segment_ids)


def text(tokens=11, batch=2, heads=2, wide=4, deep=5, **options):
    """Random arguments, float64, of the rule with these options: unit keys, and every gate in its range."""
    rule = Rule(**({"chunk": 4} | options))
    inner = wide + 2 if rule.residual == "skip" else wide
    draw = torch.Generator().manual_seed(tokens + 100 * batch)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def gate(*shape):
        return 0.05 + 0.9 * torch.rand((batch, heads, tokens, *shape), generator=draw, dtype=torch.float64)

    each = [wide] if rule.gates == "channel" else []
    q, k = (torch.nn.functional.normalize(normal(batch, heads, tokens, inner), dim=-1) for _ in "qk")
    v = normal(batch, heads, tokens, wide) / (1 if rule.norm else wide**0.5)
    gates = Gates(
        step=0.3 * gate(*([rule.matrices] if rule.gates == "matrix" else each)),
        keep=None if rule.average else 1 - 0.2 * gate(*each),
        momentum=None if rule.optimiser == "gd" else 0.8 * gate(*each),
        delta=2 * gate() if rule.bias in HUBERS else None,
        omega=gate(rule.window) if rule.window > 1 else None,
    )
    hidden = deep if rule.matrices > 1 else inner
    initial = [normal(heads, wide, hidden) / hidden**0.5]
    initial += [normal(heads, hidden, inner) / inner**0.5 for _ in range(rule.matrices - 1)]
    gain, shift = (1 + 0.1 * normal(heads, wide), 0.1 * normal(heads, wide)) if rule.norm else (None, None)
    skip = normal(heads, wide, inner) if rule.residual == "skip" else None
    return Text(q, k, v, gates, Memory(rule, tuple(initial), gain, shift, skip))


class KernelText(NamedTuple):
    """What a kernel memory is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    omega: Tensor
    memory: Kernel

    def part(self, tokens, rows=slice(None)):
        return KernelText(*(x[rows, :, tokens] for x in self[:4]), self.memory)

    def run(self, state=None, segment_ids=None):
        return kernel_memory(*self, state, segment_ids)


def kernel_text(name, tokens=11, batch=2, heads=2):
    (rule, window), draw = KERNELS[name], torch.Generator().manual_seed(tokens)
    shapes = [(batch, heads, tokens, width) for width in (4, 4, 5, window)]
    q, k, v, omega = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    sharpness = torch.tensor([2.0, 5.0], dtype=torch.float64)[:heads]
    return KernelText(q, k, v, omega.sigmoid(), Kernel(sharpness, rule, window, normalise=window > 1))


def assert_same(found, wanted, tolerance=1e-10):
    """Reads and states."""
    for one, other in zip(states.tensors(found), states.tensors(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
