"""Cores and memories by name: what a name stands for, and which options its line of the table leaves open."""

from dataclasses import Field, fields
from typing import Any

from atma.mixers.table import Found, find


def part_of(what: str, name: Any, where: str = "") -> Found:
    """What the name of a core or a memory stands for."""
    try:
        return find(name_of(name), what)
    except ValueError as error:
        raise ValueError(f"'{where}{what}': {error}") from None


def open_options(part: Found) -> dict[str, Field[Any]]:
    """The options of a core or a memory that its line of the table leaves open."""
    return {field.name: field for field in fields(part.cls.Config) if field.name not in part.fixed}


def name_of(name: Any) -> str:
    return "delta" if name is True else str(name)
