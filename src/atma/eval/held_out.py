"""The text that a model is measured on: named, or that of its own training, or else the standard library's.

The held-out files of the standard library are prepared once with the model's own tokenizer and kept in the user's cache
(`XDG_CACHE_HOME`, or ~/.cache; for this one command where that cannot be written).
"""

import atexit
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from atma import notebook
from atma.data.dataset import MANIFEST, TokenSet
from atma.data.prepare import Preparation, Progress, prepare
from atma.data.remote import is_remote
from atma.data.sources import STDLIB
from atma.eval.loaded import check_tokenizer, tokenizer_of
from atma.tokenizer import Tokenizer


def open_text(loaded: Any, data: Path | None, progress: Progress | None = None) -> TokenSet:
    """The validation split of `data`, or, without, of the data that the model was trained on if they are here, or else
    of the standard library. ValueError, with the mend, for data of another tokenizer."""
    tokenizer = tokenizer_of(loaded)
    if data is not None:
        if not data.exists():
            raise ValueError(f"{data}: no such data; make it with `atma prepare`, or leave --data out")
        token_set = TokenSet.open(data, "validation")
        check_tokenizer(token_set, tokenizer, loaded.path)
        return token_set
    return _own(loaded, tokenizer) or TokenSet.open(_library(tokenizer, progress), "validation")


def _own(loaded: Any, tokenizer: Tokenizer) -> TokenSet | None:
    """What the model was trained on, if its folder says where, and that is here and still of its tokenizer."""
    recipe = loaded.info.get("extra", {}).get("recipe", {})
    path = recipe.get("data", {}).get("path") if isinstance(recipe, dict) else None
    if path is None or is_remote(path) or not (Path(path) / MANIFEST).is_file():
        return None
    token_set = TokenSet.open(path, "validation")
    return token_set if token_set.tokenizer is not None and token_set.tokenizer.hash() == tokenizer.hash() else None


def _library(tokenizer: Tokenizer, progress: Progress | None) -> Path:
    """The folder of the prepared standard library of this Python, made where it is not there."""
    name = f"{STDLIB}-{platform.python_version()}-{tokenizer.hash()[:16]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atma" / "data"
    if (cache / name / MANIFEST).is_file():
        return cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        home = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
    except OSError:
        home = cache = Path(tempfile.mkdtemp(prefix="atma-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    if not notebook.active():  # whose output has a bar, and shows what goes to stderr as if it were an error
        print(f"preparing the standard library with the model's tokenizer (once; kept in {cache})", file=sys.stderr)
    tokenizer.save(home / "tokenizer.json")
    options = Preparation(tokenizer=str(home / "tokenizer.json"), end_of_text=tokenizer.end_to_record)
    prepare(STDLIB, home / name, options, progress)
    try:
        (home / name).rename(cache / name)
    except OSError:  # another process was quicker
        return cache / name if (cache / name / MANIFEST).is_file() else home / name
    return cache / name
