"""Contrasts and subsets as a user types them: `memory where attention=polar`, `polar+memory - nope+memory`.

A term is `factor=level`; or a level alone, where only one factor has it; or an on-off factor's name, meaning on, with
`no ` before it meaning off. Terms are joined by `+`. A factor alone is each of its levels against the first. After
`where`, `factor=level|level` leaves several levels in.
"""

import dataclasses
import re

from atma.sweep.contrasts import Effect, contrast, where_text
from atma.sweep.table import Level, Table, is_on, is_switch, level_text


def read_contrasts(table: Table, metric: str, text: str) -> list[Effect]:
    """The effects that `text` asks for, each labelled with its subset. ValueError says what it does not know."""
    sides, _, subset = text.partition(" where ")
    where = read_where(table, subset)
    more, minus, less = (part.strip() for part in re.sub("[−–]", "-", sides).partition(" - "))
    if minus:
        pairs = [(read_choice(table, more), read_choice(table, less))]
    elif more in table.levels:
        first, *others = table.levels[more]
        pairs = [({more: level}, {more: first}) for level in others]
    else:
        raise ValueError(f"contrast '{text}': write a factor ({', '.join(table.levels)}) or two sides as 'A - B'")
    if not pairs:
        raise ValueError(f"contrast '{text}': factor '{more}' has one level, so there is nothing to compare")
    found = [contrast(table, metric, *pair, where) for pair in pairs]
    return [_labelled(effect, where_text(where, table)) for effect in found]


def read_where(table: Table, text: str) -> dict[str, list[Level]]:
    """The subset that terms joined by `+` mean; empty text is every cell. ValueError as in `read_choice`."""
    where: dict[str, list[Level]] = {}
    for term in _terms(text):
        factor, equals, levels = (part.strip() for part in term.partition("="))
        if equals and "|" in levels:
            found = [read_level(table, factor, level.strip()) for level in levels.split("|")]
        else:
            factor, level = _term(table, term)
            found = [level]
        if factor in where:
            raise ValueError(f"'{text.strip()}' names factor '{factor}' twice; write {factor}=one|other")
        where[factor] = found
    return where


def read_choice(table: Table, text: str) -> dict[str, Level]:
    """The levels that terms joined by `+` (or commas) mean. ValueError for an unknown, unclear or repeated term."""
    choice: dict[str, Level] = {}
    for term in _terms(text):
        factor, level = _term(table, term)
        if factor in choice:
            raise ValueError(f"'{text.strip()}' names factor '{factor}' twice")
        choice[factor] = level
    if not choice:
        raise ValueError("a side of a contrast is empty; write levels joined by +, such as polar+memory")
    return choice


def read_level(table: Table, factor: str, text: str) -> Level:
    """The level of a factor that reads like `text`; on, off, true, false, 1 and 0 for an on-off factor."""
    if factor not in table.levels:
        raise ValueError(f"{table.name}: no factor '{factor}'; factors: {', '.join(table.levels)}")
    levels = table.levels[factor]
    switched = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
    for level in levels:
        if text == level_text(level) or (is_switch(levels) and switched.get(text.lower()) == is_on(level)):
            return level
    raise ValueError(f"factor '{factor}' has no level '{text}'; levels: {', '.join(map(level_text, levels))}")


def _terms(text: str) -> list[str]:
    return [part.strip() for part in re.split("[+,]", text) if part.strip()]


def _term(table: Table, term: str) -> tuple[str, Level]:
    factor, equals, level = (part.strip() for part in term.partition("="))
    if equals:
        return factor, read_level(table, factor, level)
    off = term.startswith("no ")
    name = term.removeprefix("no ").strip()
    if name in table.levels and is_switch(table.levels[name]):
        return name, read_level(table, name, "off" if off else "on")
    owners = [f for f, levels in table.levels.items() if any(isinstance(v, str) and v == term for v in levels)]
    if len(owners) != 1:
        known = "no factor has that level" if not owners else f"factors {', '.join(owners)} all have it"
        raise ValueError(f"'{term}': {known}; write factor=level, factors: {', '.join(table.levels)}")
    return owners[0], term


def _labelled(effect: Effect, subset: str) -> Effect:
    return dataclasses.replace(effect, label=f"{effect.label} where {subset}") if subset else effect
