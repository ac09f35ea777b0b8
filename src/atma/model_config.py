"""What a model is, as frozen data: its shape, and its mixers by name.

`pattern` names the mixer of each layer. A name is one of the table of mixers (atma.mixers.table), or a table of
`mixers` that has its `kind` there and options of its own. An option that stands beside the model's own fields is
shared: it is set in every mixer that has it. So `window = 64` is the window of every layer that has one.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from atma import config_text
from atma.ops.dense import Gate
from atma.strict import LATER, UnknownKey, check_fields, require

if TYPE_CHECKING:
    from atma.mixers.base import Mixer
    from atma.mixers.table import Found

Norms = Literal["before", "after", "both"]
KIND, PACKAGE = "kind", "package"
"""Keys of a mixer's table that are no options: its name in the table of mixers, and the package it came from."""


class Named(NamedTuple):
    """A mixer as a configuration names it: its kind, what that stands for, and its configuration."""

    kind: str
    found: "Found"
    config: Any

    @property
    def options(self) -> dict[str, Any]:
        """Every option by name."""
        return self.found.cls.options(self.config)


@dataclass(frozen=True, init=False, eq=False, repr=False)
class ModelConfig:
    """Shape of a model, and the options of its mixers. Sizes are counts. Source: maths.md, sections 1 to 6."""

    vocab_size: int = 50_304
    """Token ids that the model knows, at least as many as the tokenizer of its data has."""
    width: int = 1024
    """D, numbers of a token in the residual stream."""
    depth: int = 16
    """Blocks, each a mixer and an MLP."""
    pattern: tuple[str, ...] = ("local", "local", "global", "local")
    """The mixer of each layer, by name, repeated to `depth`."""
    mlp_multiple: int = 4
    """Inner numbers of every MLP as a multiple of the width, unless `mlp_width` says them."""
    mlp_width: int | None = field(default=None, metadata=LATER)
    """Inner numbers of every MLP; mlp_multiple times the width where it is left out, and no MLP for 0."""
    mlp_gate: Gate = field(default="square", metadata=LATER)
    """φ of every MLP's g ⊙ φ(a): relu(a)² ("square"), a σ(a) ("silu": SwiGLU) or GELU's tanh form ("gelu": GeGLU)."""
    mlp_bias: bool = field(default=True, metadata=LATER)
    """Biases of both projections of every MLP."""
    logit_cap: float = 15.0
    """Bound of the logits, softly reached (maths.md, section 1); 0 for none."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in every RMS norm."""
    norms: Norms = field(default="before", metadata=LATER)
    """Where a block's norms stand: before a mixer or MLP, after it and before its sum with the stream, or both."""
    norm_plus_one: bool = field(default=False, metadata=LATER)
    """Whether norms multiply by one plus their weight, as Gemma's do."""
    tied_head: bool = False
    """One matrix for embedding and head."""
    head_bias: bool = field(default=True, metadata=LATER)
    """A bias for every token id in the head."""
    embedding_scale: float = field(default=1.0, metadata=LATER)
    """What an embedding is multiplied by before the first block."""
    mixers: dict[str, Any] = field(default_factory=dict)
    """Mixers with options of their own, by name: tables of a `kind` and options."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options shared by the mixers that have them; given so, those that none has are left out."""

    def __init__(
        self,
        vocab_size: int = 50_304,
        width: int = 1024,
        depth: int = 16,
        pattern: Collection[str] = ("local", "local", "global", "local"),
        mixers: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> None:
        """The fields by name; every further keyword is a shared option. ValueError names what is wrong."""
        own = {"vocab_size": vocab_size, "width": width, "depth": depth, "pattern": pattern, "mixers": mixers or {}}
        self._fill(own | given, options or {}, "")

    def _fill(self, given: Mapping[str, Any], options: Mapping[str, Any], where: str) -> None:
        """Set every field. `given` are fields and shared options, whose names an error tells behind `where`."""
        given = dict(given)
        for one in dataclasses.fields(self):
            default = {} if one.name in ("mixers", "options") else one.default
            object.__setattr__(self, one.name, given.pop(one.name, default))
        check_fields(self, where)
        self._check()
        shared = self._shared(options, given, where)
        names = dict.fromkeys((*self.pattern, *self.mixers))
        object.__setattr__(self, "_named", {name: _named(name, self.mixers.get(name), shared, where) for name in names})
        object.__setattr__(self, "options", {key: self._coerced(key, value) for key, value in shared.items()})

    def _check(self) -> None:
        for name in ("vocab_size", "width", "depth", "mlp_multiple"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.mlp_width is None or self.mlp_width >= 0, "mlp_width", self.mlp_width, "0 or more, or left out")
        for name in ("norm_epsilon", "embedding_scale"):
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        require(self.logit_cap >= 0, "logit_cap", self.logit_cap, "positive, or 0 for none")
        require(len(self.pattern) > 0, "pattern", self.pattern, "at least one layer")

    def _shared(self, options: Mapping[str, Any], given: dict[str, Any], where: str) -> dict[str, Any]:
        """The options that some mixer has. ValueError for one given by name that none has."""
        known, fixed = _takes(self.pattern, self.mixers, {**options, **given}, where)
        given = {key: value for key, value in given.items() if key in known or fixed.get(key, ("",))[1:] != (value,)}
        for key, value in ((key, value) for key, value in given.items() if key not in known):
            if key in fixed:
                raise ValueError(f"'{where}{key}' is {fixed[key][1]!r} by the kind '{fixed[key][0]}', not {value!r}")
            if key in self._own_options():
                raise ValueError(f"'{where}{key}' is not shared: set {where}mixers.NAME.{key} in a table of its own")
            own = (one.name for one in dataclasses.fields(self) if one.name != "options")
            raise UnknownKey(key, (*own, *sorted(known)), where)
        return {key: value for key, value in options.items() if key in known} | given

    def _own_options(self) -> set[str]:
        """Options that are not shared."""
        taken = (_found(name, self.mixers.get(name), "").cls.takes({}) for name in self.pattern)
        return set().union(*(fields.keys() - _shared(fields) for fields in taken))

    def _coerced(self, key: str, value: Any) -> Any:
        """The value of a shared option as a mixer has taken it."""
        for name, one in self._named.items():
            taken = _shared(one.found.cls.takes(one.options)) - one.found.fixed.keys()
            if key in taken - self.mixers.get(name, {}).keys():
                return one.options[key]
        from atma.mixers import flat

        return flat.checked(key, value) if key in flat.FIELDS else value

    def __getattr__(self, name: str) -> Any:
        """An option of the mixers, as the first that has it has it."""
        if not name.startswith("_"):
            for one in self._named.values():
                if name in one.options:
                    return one.options[name]
            from atma.mixers import flat

            if name in flat.FIELDS and flat.is_flat(self.pattern, self.mixers):
                return flat.whole(self.options)[name]
        raise AttributeError(f"a model has no '{name}', and no mixer of its pattern has it")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and self.to_table() == other.to_table()

    def __hash__(self) -> int:
        return hash((self.vocab_size, self.width, self.depth, self.pattern))

    def __repr__(self) -> str:
        return config_text.written(self)

    def facts(self) -> dict[str, str]:
        """Layers and sizes for people, by name."""
        return config_text.facts(self)

    @property
    def layers(self) -> tuple[str, ...]:
        """The name of each layer's mixer, first to last."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.depth))

    def mixer(self, layer: int) -> "Mixer":
        """A new mixer of a layer, its parameters not set."""
        from atma.mixers.base import Place

        one = self._named[self.layers[layer]]
        alike = [i for i, name in enumerate(self.layers) if self._named[name].kind == one.kind]
        count = alike.index(layer), len(alike)
        return one.found.cls(
            one.config, Place(self.width, self.norm_epsilon, layer, self.depth, *count, self.norm_plus_one)
        )

    def named(self) -> dict[str, Named]:
        """Every mixer of the pattern and of the tables, by name."""
        return dict(self._named)

    @property
    def following(self) -> dict[str, Any]:
        """Options of the mixers that a recipe's training length bounds, as they are."""
        taken = [(one, one.found.cls.takes(one.options)) for one in self._named.values()]
        return {key: one.options[key] for one, keys in taken for key in keys if keys[key].metadata.get("follows")}

    @classmethod
    def from_table(cls, values: Mapping[str, Any], where: str = "") -> "ModelConfig":
        """From plain data: fields, shared options, and `mixers`. ValueError says which key is wrong."""
        return cls().changed(values, where)

    def changed(self, values: Mapping[str, Any], where: str = "") -> "ModelConfig":
        """With these fields, shared options and tables of mixers; an option that no mixer has any more is left out."""
        own = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        tables, options = values.get("mixers", {}), own.pop("options")
        if not isinstance(tables, dict):
            raise ValueError(f"'{where}mixers' must be tables, not {tables!r}")
        if "options" in values:
            raise UnknownKey("options", ("pattern", "mixers"), where)
        made = object.__new__(ModelConfig)
        made._fill({**own, **values, "mixers": own["mixers"] | tables}, options, where)
        return made

    def to_table(self) -> dict[str, Any]:
        """Plain data that `from_table` reads to an equal configuration, whatever defaults become."""
        from atma.mixers import flat

        own = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        options, mixers = own.pop("options"), own.pop("mixers")
        if flat.is_flat(self.pattern, mixers):
            return own | flat.whole(options)
        return own | {"mixers": {name: _table(one) for name, one in self._named.items()}}

    def canonical(self) -> dict[str, Any]:
        """`to_table` without what is no part of an identity: what came later and is not set, and packages."""
        table = self.to_table()
        named = {name: _said(self._named[name], one) for name, one in table.pop("mixers", {}).items()}
        own = {key: value for key, value in table.items() if not _came_later(key, value)}
        return own | {"mixers": named} if named else own


def _said(one: Named, table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a mixer without its package, and without what came after tables had identities and is not set."""
    fields = one.found.cls.takes(one.options)
    unsaid = {key for key, field in fields.items() if field.metadata.get("unsaid") and table[key] == field.default}
    return {key: value for key, value in table.items() if key != PACKAGE and key not in unsaid}


def _came_later(key: str, value: Any) -> bool:
    """Whether a field or a flat option came after models were made, and is not set."""
    from atma.mixers import flat

    known = ModelConfig.__dataclass_fields__ | flat.FIELDS
    return key in known and known[key].metadata.get("later", False) and value == known[key].default


def _takes(
    pattern: Collection[str], mixers: Mapping[str, Any], shared: Mapping[str, Any], where: str
) -> tuple[set[str], dict[str, tuple[str, Any]]]:
    """The shared options that there are to set, and those that a kind has fixed, by which and to what."""
    from atma.mixers import flat

    known, fixed = set(flat.FIELDS) if flat.is_flat(pattern, mixers) else set(), {}
    for name in dict.fromkeys((*pattern, *mixers)):
        table = mixers.get(name)
        found = _found(name, table, where)
        taken = found.cls.takes(dict(shared) | dict(table or {}) | dict(found.fixed))
        known |= {key for key in _shared(taken) if key not in found.fixed}
        kind = name if table is None else table[KIND]
        fixed |= {key: (kind, value) for key, value in found.fixed.items()}
    return known, fixed


def _found(name: str, table: Any, where: str) -> "Found":
    """What a name of the pattern stands for."""
    from atma.mixers.table import find, names

    if table is None:
        try:
            return find(name)
        except ValueError as error:
            raise ValueError(f"'{where}pattern': {error}") from None
    if not isinstance(table, dict):
        raise ValueError(f"'{where}mixers.{name}' must be a table, not {table!r}")
    if KIND not in table:
        raise ValueError(f"'{where}mixers.{name}' has no kind; write kind = \"NAME\", one of {', '.join(names())}")
    if table[KIND] != name and name in names():
        raise ValueError(f"'{where}mixers.{name}': there is a mixer '{name}' already; give this one another name")
    return find(str(table[KIND]), package=str(table.get(PACKAGE, "")))


def _named(name: str, table: Any, shared: Mapping[str, Any], where: str) -> Named:
    """The mixer of a name with its options: its own before the shared ones. ValueError."""
    found = _found(name, table, where)
    own = {key: value for key, value in (table or {}).items() if key not in (KIND, PACKAGE)}
    taken = found.cls.takes(dict(shared) | own | dict(found.fixed))
    for key, value in own.items():
        if key not in taken:
            raise UnknownKey(key, taken, f"{where}mixers.{name}.")
        fixed = found.fixed.get(key, value)
        require(fixed == value, f"{where}mixers.{name}.{key}", value, f"left out, or {fixed!r} as the kind has it")
    mine = {key: value for key, value in shared.items() if key in _shared(taken)}
    inner = f"{where}mixers.{name}." if own else where
    return Named(table[KIND] if table else name, found, found.cls.configure(mine | own | dict(found.fixed), inner))


def _shared(taken: Mapping[str, dataclasses.Field[Any]]) -> set[str]:
    """Those of a mixer's options that one beside the model's own fields sets."""
    return {key for key, one in taken.items() if not one.metadata.get("own")}


def _table(one: Named) -> dict[str, Any]:
    package = {PACKAGE: one.found.package} if one.found.package else {}
    return {KIND: one.kind, **package, **one.options}
