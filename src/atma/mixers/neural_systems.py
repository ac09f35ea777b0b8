"""The published neural memories by name (mixers.md, section 4.10).

A system is a line of `SYSTEMS`: what an option is that is left out. The last three keep keys and written values instead
of a network ("kernel").
"""

from typing import Literal, NamedTuple, get_args

from atma.mixers.recurrent_surround import ConvName, GateName

SystemName = Literal[
    "atma_memory",
    "titans",
    "ttt_linear",
    "ttt_mlp",
    "moneta",
    "yaad",
    "memora",
    "dla",
    "swla",
    "omeganet",
    "atlas",
    "atlas_pp",
    "lact",
    "allmem",
    "deep_transformer",
    "swdt",
    "dot",
]
NetworkName = Literal["matrix", "mlp", "gated", "kernel"]
FeatureName = Literal["unit", "poly"]
ActivationName = Literal["gelu", "silu"]
BiasName = Literal["dot", "l2", "lp", "huber", "huber_coordinate", "huber_switch"]
RetentionName = Literal["l2", "lq", "kl", "renorm", "renorm_after_read"]
DecayTo = Literal["zero", "initial"]
OptimiserName = Literal["gd", "momentum", "muon"]
Schedule = Literal["muon", "lact"]
Anchor = Literal["all", "hidden"]
Granularity = Literal["token", "chunk"]
GateAxis = Literal["head", "channel", "matrix"]
StepName = Literal["bounded", "ttt", "softplus"]
KernelRule = Literal["add", "delta"]


class System(NamedTuple):
    """What a system is where nothing else is asked for."""

    network: NetworkName = "mlp"
    activation: ActivationName = "gelu"
    residual: bool = True
    layer_norm: bool = False
    feature: FeatureName = "unit"
    bias: BiasName = "l2"
    retention: RetentionName = "l2"
    decay_to: DecayTo = "initial"
    forgets: bool = True
    optimiser: OptimiserName = "gd"
    schedule: Schedule = "muon"
    anchor: Anchor = "all"
    normalised: bool = False
    average: bool = False
    granularity: Granularity = "token"
    memory_chunk: int = 16
    memory_window: int = 1
    gate_axis: GateAxis = "head"
    step_form: StepName = "bounded"
    kernel_rule: KernelRule = "add"
    normalise: bool = False
    conv: ConvName = "silu"
    out_gate: GateName = "sigmoid"


_TTT = System(layer_norm=True, forgets=False, average=True, step_form="ttt")
_LIFTED = System(feature="poly", memory_chunk=64, memory_window=16)
_AT_END = System(
    "gated", "silu", forgets=False, optimiser="momentum", granularity="chunk", memory_chunk=256, step_form="softplus"
)
KERNEL = System("kernel", forgets=False)
SYSTEMS: dict[str, System] = {
    "atma_memory": System(anchor="hidden", normalised=True, conv="canon"),
    "titans": System(optimiser="momentum", memory_chunk=64),
    "ttt_linear": _TTT._replace(network="matrix"),
    "ttt_mlp": _TTT,
    "moneta": System(layer_norm=True, bias="lp", retention="lq", gate_axis="channel"),
    "yaad": System(layer_norm=True, bias="huber", gate_axis="channel"),
    "memora": System(layer_norm=True, retention="kl"),
    "dla": _LIFTED._replace(bias="dot", memory_window=1),
    "swla": _LIFTED._replace(network="matrix", residual=False, bias="dot", decay_to="zero"),
    "omeganet": _LIFTED,
    "atlas": _LIFTED._replace(optimiser="muon"),
    "atlas_pp": _LIFTED._replace(network="gated", activation="silu", optimiser="muon"),
    "lact": _AT_END._replace(residual=False, bias="dot", retention="renorm", schedule="lact", gate_axis="matrix"),
    "allmem": _AT_END._replace(retention="renorm_after_read"),
    "deep_transformer": KERNEL,
    "swdt": KERNEL._replace(memory_window=16),
    "dot": KERNEL._replace(kernel_rule="delta"),
}
assert tuple(SYSTEMS) == get_args(SystemName)
