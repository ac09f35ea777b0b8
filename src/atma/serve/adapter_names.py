"""What adapters are called on a command line."""

from pathlib import Path


def named_folders(given: tuple[str, ...]) -> dict[str, Path]:
    """Folders by the names of adapters, of texts like "NAME=FOLDER". ValueError for anything else, or a name twice."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name.strip() and equals and folder.strip()):
            raise ValueError(f"--adapter '{text}' must be like NAME=FOLDER")
        if name in found:
            raise ValueError(f"--adapter '{text}': another adapter is called '{name}'; give each a name of its own")
        found[name] = Path(folder)
    return found
