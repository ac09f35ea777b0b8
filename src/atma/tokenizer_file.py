"""Reading a `tokenizer.json` and the files beside it: what is refused, and which token ends a text.

Whoever publishes a tokenizer says in one of several places which token ends a text. Taken is, in this order: the one
that the user names; the one recorded by us (config.json of a model, manifest.json of data); a well-known name among the
special tokens, the declared one before others; the one that tokenizer_config.json, special_tokens_map.json,
generation_config.json or a published config.json declares; a well-known name among ordinary tokens.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from atma.token_bytes import unsuitable

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|endofdoc|>",
    "[EOS]",
    "<EOS_TOKEN>",
    "<｜end▁of▁sentence｜>",
)
RECORD = "end_of_text"
"""The key of config.json that holds the end-of-text token of a model's tokenizer where no rule finds it."""
BEGINNING = "beginning"
"""The key of config.json that holds the ids which a text begins with, where an imported checkpoint says so itself."""
MOST_HOLES = 1 << 16
_OTHERS = "take --tokenizer bytes or --tokenizer bpe, or a byte-level or SentencePiece-like tokenizer.json"


def read_backend(path: Path) -> Backend:
    """The tokenizer in a file. ValueError: unreadable, or one that texts cannot be written with."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a tokenizer.json: not UTF-8 text") from None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a tokenizer.json: {error}") from None
    _check_ids(path, settings)
    try:
        why = unsuitable(settings)  # before the library reads it, which some of these end
    except RecursionError:
        why = "its decoder is nested without end"
    if why:
        raise ValueError(f"{path}: cannot be used: {why}; {_OTHERS}")
    try:
        backend = Backend.from_str(text)
    except Exception as error:
        if type(error) is not Exception:  # the library raises the base class for text that it cannot parse
            raise
        raise ValueError(f"{path}: not a tokenizer.json: {error}") from None
    return backend


def end_of_text(backend: Backend, path: Path, named: str | None = None) -> int:
    """The id of the token that ends a text. ValueError: there is none, or `named` is no token."""
    if named is not None:
        token = backend.token_to_id(named)
        if token is None:
            raise ValueError(f"{path}: the end-of-text token '{named}' is not in the vocabulary")
        return token
    beside = path.name == "tokenizer.json"
    recorded = _recorded(path.parent) if beside else None
    declared = _declared(backend, path.parent) if beside else None
    if recorded is not None:
        token = recorded if isinstance(recorded, int) else backend.token_to_id(str(recorded))
        if token is None or backend.id_to_token(token) is None:
            raise ValueError(f"{path}: the end-of-text token {recorded!r} recorded beside it is not in the vocabulary")
        return token
    if declared is not None and backend.id_to_token(declared) in END_OF_TEXT_NAMES:
        return declared
    found = known_end(backend, declared)
    if found is None:
        names = " ".join(END_OF_TEXT_NAMES)
        raise ValueError(
            f"{path}: no end-of-text token: none of {names}, and no eos_token in a tokenizer_config.json beside it; "
            "name it with --end-of-text TOKEN"
        )
    return found


def beginning_of(backend: Backend) -> list[int]:
    """The ids that a tokenizer.json puts before every text; none for many."""
    whole, bare = (backend.encode("a", add_special_tokens=special).ids for special in (True, False))
    at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:at]


def recorded_beginning(backend: Backend, path: Path) -> list[int] | None:
    """The ids that config.json beside a tokenizer.json says a text begins with; None where it says nothing.

    ValueError: they are none of the vocabulary.
    """
    found = _settings(path.parent / "config.json").get(BEGINNING) if path.name == "tokenizer.json" else None
    if found is None:
        return None
    if not isinstance(found, list) or not all(type(i) is int and backend.id_to_token(i) is not None for i in found):
        raise ValueError(f"{path.parent / 'config.json'}: '{BEGINNING}' must be a list of token ids, not {found!r}")
    return found


def known_end(backend: Backend, declared: int | None = None) -> int | None:
    """The end-of-text token by its name, special tokens first, then a declared one, then ordinary tokens."""
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    named = [i for name in END_OF_TEXT_NAMES if (i := backend.token_to_id(name)) is not None]
    found = [i for i in named if i in special]
    return next(iter([*found, *([] if declared is None else [declared]), *named]), None)


def make_special(backend: Backend, token: int) -> None:
    """Let a token be special if it is not: a text that spells it is then ordinary characters, and it has no bytes."""
    added = backend.get_added_tokens_decoder().get(token)
    if added is None or not added.special:
        backend.add_special_tokens([AddedToken(str(backend.id_to_token(token)), special=True, normalized=False)])


def written(backend: Backend, eot: int, beginning: Sequence[int] | None = None) -> str:
    """The text of a tokenizer.json, always the same for the same tokenizer.

    A post-processor that puts no more than end-of-text around a text is left out, for nobody here uses it. With
    `beginning` other libraries are to begin every text with those ids: such a one stays where it does so already, and
    else, if there are any, one that does stands in its place.
    """
    settings = json.loads(backend.to_str())
    own = settings.get("post_processor")
    if _adds_no_other(own or {}, backend.id_to_token(eot)):
        settings["post_processor"] = None
    if beginning is not None and settings["post_processor"] is None:
        stays = own is not None and _put_before(own) == list(beginning)
        settings["post_processor"] = own if stays else _beginning(backend, beginning)
    return json.dumps(settings, ensure_ascii=False, sort_keys=True, indent=1) + "\n"


def _beginning(backend: Backend, ids: Sequence[int]) -> dict[str, Any] | None:
    """The post-processor that begins every text with these tokens; none for none."""
    if not ids:
        return None
    names = {i: str(backend.id_to_token(i)) for i in ids}

    def begun(name: str, kind: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": names[i], "type_id": kind}} for i in ids]
        return [*before, {"Sequence": {"id": name, "type_id": kind}}]

    special = {token: {"id": token, "ids": [i], "tokens": [token]} for i, token in names.items()}
    pair = begun("A", 0) + begun("B", 1)
    return {"type": "TemplateProcessing", "single": begun("A", 0), "pair": pair, "special_tokens": special}


def _put_before(settings: Mapping[str, Any]) -> list[int]:
    """The ids that a template puts before a text."""
    before = itertools.takewhile(lambda part: "SpecialToken" in part, settings["single"])
    return [i for part in before for i in settings["special_tokens"][part["SpecialToken"]["id"]]["ids"]]


def _adds_no_other(settings: Mapping[str, Any], token: str | None) -> bool:
    """Whether a post-processor adds no token but one."""
    return settings.get("type") == "TemplateProcessing" and set(settings.get("special_tokens") or {}) <= {token}


def _check_ids(path: Path, settings: object) -> None:
    """ValueError where ids lie so far apart that their range is mostly empty, or two tokens share one."""
    model = settings.get("model") if isinstance(settings, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(settings, dict) or not isinstance(vocabulary, dict | list):
        raise ValueError(f"{path}: not a tokenizer.json: no vocabulary in its table 'model'")
    ids: list[Any] = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    added = settings.get("added_tokens") or []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    for i in ids:
        if type(i) is not int or i < 0:
            raise ValueError(f"{path}: not a tokenizer.json: a token has the id {i!r}, which must be 0 or more")
    if not ids:
        raise ValueError(f"{path}: not a tokenizer.json: its vocabulary is empty")
    count, last = len(set(ids)), max(ids)
    if last + 1 - count > max(MOST_HOLES, count):
        raise ValueError(
            f"{path}: a token has the id {last:,}, but there are only {count:,} tokens: a damaged file, or one that "
            "would need rows for all ids between; number its tokens without such a gap"
        )
    if isinstance(vocabulary, dict) and len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{path}: two tokens of its vocabulary have the same id: a damaged file")


def _recorded(folder: Path) -> Any:
    config, manifest = _settings(folder / "config.json"), _settings(folder / "manifest.json")
    return config.get(RECORD, manifest.get("eot"))


def _declared(backend: Backend, folder: Path) -> int | None:
    """The end-of-text token that published files beside the tokenizer name; None if they name none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _settings(folder / name).get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and (found := backend.token_to_id(text)) is not None:
            return found
    for name in ("generation_config.json", "config.json"):
        token = _settings(folder / name).get("eos_token_id")
        token = token[0] if isinstance(token, list) and token else token
        if type(token) is int and 0 <= token < 1 << 32 and backend.id_to_token(token) is not None:
            return token
    return None


def _settings(path: Path) -> dict[str, Any]:
    """A table of JSON; empty where there is none that can be read, for whoever needs the file says what is wrong."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
