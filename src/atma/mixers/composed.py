"""The options of attention that is composed of a core and, where it has one, a memory: its own and those of both."""

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from atma.mixers.attention_config import Settings
from atma.mixers.heads import Attending
from atma.mixers.parts import name_of, open_options, part_of
from atma.mixers.table import Found, names
from atma.strict import from_dict, require


class Composed(Attending):
    """A mixer whose configuration is `Settings`: of its own, of its core and of its memory."""

    @classmethod
    def takes(cls, options: Mapping[str, Any]) -> dict[str, Field[Any]]:
        """`Mixer.takes`: its own options and those of its core and its memory."""
        own = {field.name: field for field in fields(cls.Config)}
        core, memory = (options.get(name, own[name].default) for name in ("core", "memory"))
        parts = [
            part_of(what, name) for what, name in (("core", core), ("memory", memory)) if name_of(name) in names(what)
        ]
        return own | {name: field for part in parts for name, field in open_options(part).items()}

    @classmethod
    def configure(cls, options: Mapping[str, Any], where: str = "") -> Settings:
        """`Mixer.configure`."""

        def chosen(part: Found) -> Any:
            given = {name: options[name] for name in open_options(part) if name in options}
            return from_dict(part.cls.Config, {**given, **part.fixed}, where)

        known = {field.name: options[field.name] for field in fields(cls.Config) if field.name in options}
        own = from_dict(cls.Config, known, where)
        core = part_of("core", own.core, where)
        memory = chosen(part_of("memory", own.memory, where)) if own.memory else None
        config = Settings(own, chosen(core), memory)
        single = own.canon_taps == 1 and own.canon_init == "previous" and core.cls.canon(config.core)
        summed = core.cls.plain_softmax or not own.window_sinks
        require(
            summed, f"{where}window_sinks", own.window_sinks, f'0 with core = "{own.core}", which is no plain softmax'
        )
        scaled = bool(own.memory) or not own.memory_scale
        require(scaled, f"{where}memory_scale", own.memory_scale, "false without a memory")
        require(not single, "canon_taps", 1, 'at least 2 for canon_init = "previous" ("uniform" takes one)')
        return config

    @classmethod
    def options(cls, config: Settings) -> dict[str, Any]:
        """`Mixer.options`."""
        own = config.own
        parts = [(config.core, part_of("core", own.core))]
        if own.memory:
            parts.append((config.memory, part_of("memory", own.memory)))
        told = {field.name: getattr(own, field.name) for field in fields(own)}
        return told | {name: getattr(chosen, name) for chosen, part in parts for name in open_options(part)}
