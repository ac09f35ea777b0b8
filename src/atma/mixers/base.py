"""What every mixer is: `y, state = mixer(x, state)`, and the little that the rest of the library asks of one.

A mixer moves information between the tokens of each text. It is one class in one module, which also holds its frozen
`Config` with its checks, the class of its state, and `SMALL`, tiny options over which the laws are tested. A line of
the table (atma.mixers.table), or an entry point of the group `atma.mixers` of an installed package, gives it its name.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from atma.layers import init_linear
from atma.mixers.stretches import Stretch, chained
from atma.mixers.stretches_prefix import Transition, prefixed
from atma.strict import from_dict


class Place(NamedTuple):
    """Where in a model a mixer stands."""

    width: int
    """D, numbers of a token in the residual stream."""
    epsilon: float
    """Of the model's norms."""
    layer: int = 0
    """Which of the model's layers, from 0."""
    layers: int = 1
    """How many layers the model has."""
    among: int = 0
    """Which of those of the same kind, from 0."""
    alike: int = 1
    """How many layers are of the same kind."""
    norm_plus_one: bool = False
    """Whether the model's norms multiply by one plus their weight."""


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Of a mixer that has nothing to choose."""


@dataclasses.dataclass
class Call:
    """What one call of the model carries to all of its layers. A mixer gets it as `call=` where it `reads_call`."""

    embedding: Tensor
    """The embedded tokens (B, T, D) of the call."""
    left: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What a layer leaves for those after it in this call, such as a selection of keys."""
    noise: int | None = None
    """The seed of what layers draw in this call; None, as everywhere but in training: nothing is drawn."""
    stretch: Stretch | None = None
    """What of each row this process holds, where rows are shared by several; None: all of them."""


class Mixer(nn.Module):
    """Something that reads x (B, T, D) and gives y (B, T, D), with a state or without one.

    A subclass has `Config`, a frozen dataclass of its options, and is built as `cls(config, place)`. It gives
    `init_state` and `forward`; everything else has an answer here that is true of any mixer.
    """

    Config: ClassVar[type] = NoOptions
    """Frozen dataclass of the options."""
    reads_call: bool = False
    """Whether `forward` takes the record of the model's call as `call`."""
    vectors: ClassVar[tuple[str, ...]] = ()
    """Parameters of more than one dimension that are no matrices to the optimiser."""
    exact: ClassVar[tuple[str, ...]] = ()
    """Weights of its linear layers that it reads in float32 by itself too, so that they may not travel in bfloat16."""
    heads: int = 1
    """Parts side by side in the inputs of each of the `channels`."""

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Set every parameter from `generator`, so that a seed is all that a training begins from.

        By default linear layers, those of `channels` at zero, so that a block starts as the identity; what else there
        is stays as it was built.
        """
        outputs = {id(projection) for projection in self.channels().values()}
        for layer in [module for module in self.modules() if isinstance(module, nn.Linear)]:
            init_linear(layer, generator, zero=id(layer) in outputs)

    def embedded(self, weight: Tensor) -> None:
        """Copy what is wanted of the embedding (vocabulary, D) of a model just built; here nothing."""

    def init_state(self, batch: int, capacity: int) -> Any:
        """A NamedTuple of what is known before the first token, batch first, with room for `capacity` tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no state")

    def forward(self, x: Tensor, state: Any = None, *, segment_ids: Tensor | None = None) -> tuple[Tensor, Any]:
        """x (B, T, D) to y (B, T, D) and the state moved on by T tokens, None for None.

        segment_ids (B, T), only without a state: packed documents, of which none sees anything of another.
        """
        raise NotImplementedError(f"{type(self).__name__} computes nothing")

    def forward_shard(self, x: Tensor, stretch: Stretch, call: Call | None = None) -> Tensor:
        """`forward` of rows that several processes share: x (B, tokens, D) of this one's stretch to y of the same.

        By default the state goes from process to process, which is exact for any mixer (atma.mixers.stretches); where
        it has a `transition` and the stretch asks for it, that is composed instead (atma.mixers.stretches_prefix).
        """
        form = prefixed if stretch.prefix and self.composes else chained
        return form(self, x, stretch, call)

    @property
    def composes(self) -> bool:
        """Whether processes that share rows can compose what is before each, by its `transition`."""
        # Of the class whose `forward` this is, or of one that knows of it.
        own = next(one for one in type(self).__mro__ if {"forward", "transition"} & vars(one).keys())
        known = "transition" in vars(own) and own is not Mixer
        return known and self.reach is not None and not (self.reach and self.reads_call)

    def transition(self, x: Tensor, state: Any, begun: bool) -> Transition:
        """What tokens x (B, T, D) do to a state that is linear in what it was, and what they read where it was zero.

        state: as `forward` takes it, of which everything but the linear fields counts; it must follow from the last
        `reach` tokens before x and from `length`. begun: whether anything is before x; else factors are not asked for.
        With `call` where the mixer `reads_call`, and then only without a `reach`.
        """
        raise NotImplementedError(f"{type(self).__name__} knows no transition")

    def channels(self) -> dict[str, nn.Linear]:
        """The projections by which the mixer reaches the residual stream, by name; y is the sum of their outputs.

        Their inputs are the heads' side by side, so that diagnosis can take a head of a channel away.
        """
        return {}

    def share_weights(self, first: "Mixer") -> None:
        """Take from the model's first layer of the same kind what is one for all of them; by default nothing is."""

    def steady(self, on: bool = True) -> bool:
        """Take, or leave, the form whose bits depend neither on how a text is cut into calls nor on the rows beside it.

        False where there is none; texts are then served equal up to rounding.
        """
        return False

    chooses: ClassVar[bool] = False
    """Whether it chooses what it reads by what it has learned; it then takes only policies that say how much."""

    @property
    def selects(self) -> bool:
        """Whether it holds keys and values that grow with a text, of which a selection policy may read less."""
        return False

    def select(self, policy: Any, reads_call: bool = False) -> None:
        """Where it `selects`: from here on read as a policy says (atma.mixers.policies); None: everything."""
        raise ValueError(f"{type(self).__name__} takes no selection policy")

    @property
    def reach(self) -> int | None:
        """How many tokens back anything but a memory carries a token to an output; None for any number."""
        return None

    def retention(self) -> nn.Module | None:
        """What forgets: itself or a part, which takes its decays from its `log_decay(x)` and has a `bound(head)`."""
        return self if type(self).log_decay is not Mixer.log_decay else None

    def log_decay(self, x: Tensor) -> Tensor:
        """log γ ≤ 0 (B, H, T) that each head applies at each token of x (B, T, D), float32 or wider."""
        raise NotImplementedError(f"{type(self).__name__} forgets nothing")

    def bound(self, head: int) -> float:
        """The longest half-life, in tokens, that a head can have; inf where nothing bounds it."""
        return math.inf

    @classmethod
    def takes(cls, options: Mapping[str, Any]) -> dict[str, dataclasses.Field[Any]]:
        """The options there are to be set, by name, where `options` are."""
        return {field.name: field for field in dataclasses.fields(cls.Config)}

    @classmethod
    def configure(cls, options: Mapping[str, Any], where: str = "") -> Any:
        """The configuration of these options. ValueError names, behind `where`, one that is none or is wrong."""
        return from_dict(cls.Config, dict(options), where)

    @classmethod
    def options(cls, config: Any) -> dict[str, Any]:
        """Every option of a configuration, by name."""
        return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


__all__ = ["Call", "Mixer", "Place"]
