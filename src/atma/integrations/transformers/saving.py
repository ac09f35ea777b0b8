"""What a folder written by transformers has beside its own files: the way to the classes, and a model card."""

from pathlib import Path

from atma.folders import MANIFEST
from atma.hub_files import SHIM, SHIM_TEXT
from atma.integrations.transformers.configuration import AtmaConfig

CARD = "README.md"
_EMPTY = "[More Information Needed]"
"""What the card says that transformers makes for a model without one."""


def write_beside(folder: Path, config: AtmaConfig, repository: str | None = None) -> None:
    """Write the shim and, where there is none, a card. A manifest of older files is taken away: it vouches no longer.

    repository: where on the Hub the folder goes; a card that nobody has filled in is then replaced.
    """
    (folder / SHIM).write_text(SHIM_TEXT, encoding="utf-8")
    (folder / MANIFEST).unlink(missing_ok=True)
    place = folder / CARD
    empty = repository is not None and place.is_file() and _EMPTY in place.read_text(encoding="utf-8")
    if empty or not place.exists():
        place.write_text(card(repository or folder.name, config), encoding="utf-8")


def card(name: str, config: AtmaConfig) -> str:
    """A model card: what the model is, and how it is used under its name, that of a folder or of a repository."""
    model = config.model_config()
    mixers = ", ".join(dict.fromkeys(model.named()[name].kind for name in model.layers))
    facts = {
        "layers": f"{model.depth} ({mixers})",
        "width": model.width,
        "vocabulary": model.vocab_size,
        "tied head": "yes" if model.tied_head else "no",
    } | {key: value for key, value in (config.extra or {}).items() if key in ("name", "data", "tokens", "step")}
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return _CARD.format(title=name.rpartition("/")[2], name=name, rows=rows)


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- atma
---

# {title}

A language model made with [atma](https://pypi.org/project/atma-lm/). It keeps a state in place of a cache of keys, and
reads and writes texts of any length.

| | |
| --- | --- |
{rows}

## Use

```
pip install "atma-lm[hf]"
```

```python
import atma.integrations.transformers  # makes the model known
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

The same folder is a model of `atma`: `atma generate "Once upon a time" --model {name}`.
"""

__all__ = ["CARD", "card", "write_beside"]
