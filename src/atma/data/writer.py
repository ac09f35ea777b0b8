"""Which writer encodes the documents of a source: whether they are texts or conversations, and by what template."""

import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

from atma.chat.template import BUILT_IN, PLAIN, Template, built_in, find_template
from atma.checkpoint import load_config
from atma.data.conversations import CONVERSATIONS, MARK
from atma.data.encoders import Encoding
from atma.data.left_out import NoField
from atma.data.preparation import Preparation
from atma.data.sources import documents
from atma.loading import base_folder
from atma.stop_tokens import declared
from atma.tokenizer import Tokenizer


def resolved(source: str | Path, options: Preparation) -> Preparation:
    """The options with the model's folder, and with whether the source holds texts or conversations."""
    model = str(base_folder(options.model)) if options.model else ""
    reading = options.read
    if reading == "auto":
        reading = "conversations" if options.field == "text" and _holds_conversations(source, options) else "text"
    if reading == "text" and (options.chat_template or options.skip_bad):
        given = "chat_template" if options.chat_template else "skip_bad"
        raise ValueError(f"{source}: '{given}' is for conversations, and these are texts: leave it out")
    return dataclasses.replace(options, model=model, read=reading)


def encoding_for(source: str | Path, tokenizer: Tokenizer, options: Preparation) -> Encoding:
    """How the documents of a source are encoded under `resolved` options. ValueError: there is no chat template."""
    if options.read != "conversations":
        return Encoding(tokenizer)
    most = load_config(options.model).vocab_size if options.model else tokenizer.vocab_size
    known = not options.model and options.tokenizer in ("bytes", "bpe")
    ends = () if known else tuple(sorted(declared(_place(options), tokenizer)))
    return Encoding(tokenizer, _template(source, options), most, ends, options.skip_bad)


def _holds_conversations(source: str | Path, options: Preparation) -> bool:
    """Whether the first row of a source is a conversation and has no field "text"."""
    with_text = (document.text for document in documents(source, "text", split=options.split))
    as_chats = (document.text for document in documents(source, CONVERSATIONS, split=options.split))
    return not list(_first(with_text)) and any(text.startswith(MARK) for text in _first(as_chats))


def _first(texts: Any) -> list[str]:
    try:
        return list(islice(texts, 1))
    except NoField:
        return []
    except ValueError as error:
        return [] if "no text in it" in str(error) else [MARK]


def _place(options: Preparation) -> Path:
    """The folder of the model, or of the tokenizer."""
    place = Path(options.model or options.tokenizer)
    return place if place.is_dir() else place.parent


def _template(source: str | Path, options: Preparation) -> Template:
    """The template that is asked for, or else that of the model or of the tokenizer's folder."""
    known = ", ".join(f"{name} ({told})" for name, told in BUILT_IN.items())
    if options.chat_template in BUILT_IN:
        return built_in(options.chat_template)
    path = Path(options.chat_template) if options.chat_template else None
    if path is not None and not path.is_file():
        raise ValueError(f"'chat_template' {options.chat_template!r}: no such file, nor one of {known}")
    found = find_template(_place(options), path)
    if found.source == PLAIN or (not options.model and options.tokenizer in ("bytes", "bpe") and path is None):
        whose = options.model or f"the tokenizer {options.tokenizer}"
        raise ValueError(
            f"{source}: holds conversations, and {whose} has no chat template; name one with --chat-template: a Jinja "
            f"file, or {known}; --field messages reads chats as texts"
        )
    return found
