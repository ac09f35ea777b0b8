"""What is shipped beside the code: recipes by name, and the documentation. In a wheel both lie in the package, in a
clone at its root."""

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """Where "recipes" or "docs" are. ValueError: this installation has none."""
    for place in (_PACKAGE / name, _PACKAGE.parents[1] / name):
        if place.is_dir():
            return place
    raise ValueError(f"this installation has no {name}; install atma-lm from a wheel, or work in a clone")


def recipe_names() -> list[str]:
    """The shipped recipes, such as "nano" and "stacks/based-nano"."""
    root = folder("recipes")
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.toml"))


def recipe_path(word: str | Path) -> Path:
    """A recipe's file: the path as it stands if there is a file, else the shipped recipe of that name, "own-data" or
    "recipes/own-data.toml". ValueError: neither; the nearest name is told. A file's name alone is never a shipped one:
    whoever stands in the wrong folder would train another recipe than theirs."""
    if Path(word).is_file():
        return Path(word)
    text, names = str(word), recipe_names()
    if text in names:
        return folder("recipes") / f"{text}.toml"
    name = text.removeprefix("recipes/").removesuffix(".toml")
    if name in names and text == f"recipes/{name}.toml":
        return folder("recipes") / f"{name}.toml"
    near = difflib.get_close_matches(name, names, 1, 0.6)
    told = f"did you mean '{near[0]}'?" if near else f"shipped are {', '.join(n for n in names if '/' not in n)}"
    raise ValueError(f"{word}: no such recipe; {told}")


__all__ = ["folder", "recipe_names", "recipe_path"]
