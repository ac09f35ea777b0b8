"""The files by which a model folder says how its model is talked to."""

from pathlib import Path

from atma.hub_files import GENERATION_CONFIG, TEMPLATE, TOKENIZER_CONFIG

TALK = (TEMPLATE, TOKENIZER_CONFIG, "special_tokens_map.json", GENERATION_CONFIG)


def talk_of(folder: Path) -> dict[str, str]:
    """The texts of those that a folder has, by name."""
    return {name: (folder / name).read_text(encoding="utf-8") for name in TALK if (folder / name).is_file()}
