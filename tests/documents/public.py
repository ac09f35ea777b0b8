"""The public names: what docs/reference.md tells of, found in the source without importing it.

A directive `::: PLACE` of that page is a module, of which it tells the members that it lists, or those of `__all__`, or
one name. Of a class public are its methods, properties and annotated fields that do not begin with an underscore, its
own and those of classes of atma that it comes from.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import griffe
import yaml

from tests.documents.reading import ROOT

PAGE = ROOT / "docs" / "reference.md"
DIRECTIVE = re.compile(r"^::: ([\w.]+)\n((?: {4}.*\n)*)", re.M)


@cache
def package() -> griffe.Module:
    """atma, as its source has it."""
    loader = griffe.GriffeLoader(search_paths=[ROOT / "src"], allow_inspection=False)
    found = loader.load("atma", submodules=True)
    loader.resolve_aliases(external=False)
    assert isinstance(found, griffe.Module)
    return found


def named(place: str) -> griffe.Object:
    """What a name such as "atma.lora.merge" stands for. KeyError: there is none."""
    return package() if place == "atma" else _target(package()[place.removeprefix("atma.")])


def told(page: Path = PAGE) -> dict[str, griffe.Object]:
    """Every name that the page tells of, by the place where it is told."""
    found = {}
    for place, options in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
        one = named(place)
        chosen = (yaml.safe_load(options) or {}).get("options", {}).get("members")
        if isinstance(one, griffe.Module):
            names = chosen or [str(name) for name in one.exports or ()]
            found |= {f"{place}.{name}": _target(one.members[name]) for name in names if not name.startswith("__")}
        else:
            found[place] = one
    return found


def parts(name: str, one: griffe.Object) -> Iterator[tuple[str, griffe.Object]]:
    """A name with all that is public within it."""
    yield name, one
    if isinstance(one, griffe.Class):
        for key, member in one.all_members.items():
            inner = _target(member)
            field = isinstance(inner, griffe.Attribute) and "instance-attribute" in inner.labels and _assigned(inner)
            if not key.startswith("_") and not field and inner.path.startswith("atma."):
                yield f"{name}.{key}", inner


def has_words(name: str, one: griffe.Object, every: dict[str, griffe.Object]) -> bool:
    """Whether it has a docstring, or is a field that the docstring of its class names in backticks."""
    owner = every.get(name.rpartition(".")[0])
    text = owner.docstring.value if owner is not None and owner.docstring else ""
    return one.has_docstring or f"`{one.name}`" in text


def _assigned(one: griffe.Attribute) -> bool:
    """Whether an attribute is only set within a method, and stands in no line of the class."""
    return "class-attribute" not in one.labels and one.annotation is None


def _target(one: griffe.Object | griffe.Alias) -> griffe.Object:
    return one.final_target if isinstance(one, griffe.Alias) else one
