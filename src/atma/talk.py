"""The files by which a model folder says how its model is talked to, and which folders with them may be rewritten."""

from pathlib import Path

from atma.checkpoint import MANIFEST, read_json, require_replaceable
from atma.hub_files import SIDE_FILES
from atma.replacing import OURS

TALK = ("chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def talk_of(folder: Path) -> dict[str, str]:
    """The texts of those that a folder has, by name."""
    return {name: (folder / name).read_text(encoding="utf-8") for name in TALK if (folder / name).is_file()}


def require_rewritable(folder: Path) -> None:
    """ValueError unless a folder may become a model folder: it is replaceable, or was written with all that it holds.

    A chat template that somebody put into a folder is not to be lost; one that was written with the model is.
    """
    if not (folder / MANIFEST).is_file():
        require_replaceable(folder)
        return
    written = {*read_json(folder / MANIFEST).get("files", {}), MANIFEST, *SIDE_FILES, *OURS}
    others = sorted(path.name for path in folder.iterdir() if path.name not in written)
    if others:
        raise ValueError(f"{folder}: holds something other than a model ('{others[0]}'); name a new folder")
