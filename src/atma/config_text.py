"""A model's configuration for people: as Python that makes it, and in facts by name."""

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atma.model_config import ModelConfig

MOST = 100
"""Characters of the layers that are told."""


def written(config: "ModelConfig") -> str:
    """Python that makes an equal configuration: what is not at its default."""
    kind = type(config)
    own = {one.name: getattr(config, one.name) for one in dataclasses.fields(config) if one.name != "options"}
    default = {one.name: one.default for one in dataclasses.fields(config)} | {"mixers": {}}
    plain = kind(**own)
    given = {name: value for name, value in own.items() if value != default[name]}
    given |= {name: value for name, value in config.options.items() if _differs(plain, name, value)}
    return f"{kind.__name__}({', '.join(f'{name}={_python(value)}' for name, value in given.items())})"


def facts(config: "ModelConfig") -> dict[str, str]:
    """Its layers and sizes, by name."""
    inner = config.mlp_multiple * config.width if config.mlp_width is None else config.mlp_width
    return {
        "layers": f"{config.depth}: {layers(config)}",
        "width": f"{config.width:,}" + (f", {inner:,} within the MLPs" if inner else ", no MLPs"),
        "vocabulary": f"{config.vocab_size:,} tokens",
    }


def layers(config: "ModelConfig") -> str:
    """The mixers of its layers, first to last, those of equal name together."""
    pattern, repeats = config.pattern, config.depth > len(config.pattern)
    runs = [(name, len(list(same))) for name, same in itertools.groupby(pattern if repeats else config.layers)]
    kinds = {name: f" ({config.mixers[name]['kind']})" for name in config.mixers}
    told = ", ".join((f"{count} × " if count > 1 else "") + name + kinds.get(name, "") for name, count in runs)
    told = told if len(told) <= MOST else f"{told[: MOST - 1]}…"
    return told + (", repeated" if repeats else "")


def _differs(plain: "ModelConfig", name: str, value: Any) -> bool:
    try:
        return getattr(plain, name) != value
    except AttributeError:
        return True


def _python(value: Any) -> str:
    """A value as Python spells it; infinity too."""
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f"float('{value}')"
    return repr(value)
