"""Documents as token ids for shards: texts, with a count of what the tokenizer cannot write, and conversations."""

import dataclasses
import hashlib
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from atma.chat.renderer import Renderer
from atma.chat.template import BUILT_IN, PLAIN, Template, built_in, find_template
from atma.checkpoint import load_config
from atma.data.answers import Answers, Told
from atma.data.conversations import CONVERSATIONS, MARK, messages_in
from atma.data.left_out import Document, LeftOut, NoField
from atma.data.preparation import Preparation
from atma.data.sources import documents
from atma.loading import base_folder
from atma.stop_tokens import declared
from atma.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"
"""The file of a folder of prepared conversations, or of a model, that holds its chat template."""


class Writer:
    """Encodes documents with one tokenizer and notes what is lost. Of a text no token is an answer."""

    def __init__(self, tokenizer: Tokenizer, left_out: LeftOut) -> None:
        self.tokenizer, self.left_out = tokenizer, left_out

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def encode(self, documents: Sequence[Document]) -> list[Told | None]:
        """Ids of each document, end-of-text before them; None for one that cannot be written, which is then noted."""
        texts = [document.text for document in documents]
        if not self.tokenizer.keeps_all:
            texts = [self._writable(text) for text in texts]
        found: list[Told | None] = []
        for ids in self.tokenizer.encode_many(texts):
            spelled = (ids == self.tokenizer.eot).any()
            if spelled or not len(ids):
                self.left_out.row("spelling the end-of-text token" if spelled else "without any token")
                found.append(None)
            else:
                found.append(Told(np.concatenate([[self.tokenizer.eot], ids]), np.empty(0, bool)))
        return found

    def manifest(self) -> dict[str, Any]:
        """What the manifest says beside."""
        return {}

    def save(self, folder: Path) -> None:
        """Write what belongs beside the shards."""

    def _writable(self, text: str) -> str:
        """The text, without characters that the tokenizer refuses; all that it loses are counted."""
        lost = self.tokenizer.lost(text)
        self.left_out.characters.update(lost)
        return self.tokenizer.without_unknown(text) if lost else text


class ChatWriter:
    """Encodes conversations through a chat template. Use it with `with`."""

    def __init__(
        self, tokenizer: Tokenizer, template: Template, most: int, left_out: LeftOut, ends: Collection[int] = ()
    ) -> None:
        self.tokenizer, self.template, self.left_out = tokenizer, template, left_out
        self._answers = Answers(Renderer(template), tokenizer, most, ends)

    def __enter__(self) -> "ChatWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.renderer.close()

    def encode(self, documents: Sequence[Document]) -> list[Told | None]:
        """Ids and answers of each conversation; None for one that is left out, which is noted. ValueError: as there."""
        return [self._one(document) for document in documents]

    def manifest(self) -> dict[str, Any]:
        """What the manifest says of the template."""
        digest = hashlib.sha256(self.template.text.encode()).hexdigest()
        built = next((name for name in BUILT_IN if built_in(name).text == self.template.text), None)
        return {"conversations": {"template": built, "sha256": digest, "names": self.template.names}}

    def save(self, folder: Path) -> None:
        """Write the template beside the shards."""
        (folder / TEMPLATE).write_text(self.template.text, encoding="utf-8")

    def _one(self, document: Document) -> Told | None:
        if not document.text.startswith(MARK):
            self.left_out.row("no conversation")
            return None
        try:
            return self._answers(messages_in(document.text))
        except ValueError as error:
            if not self.left_out.skips_bad:
                raise ValueError(f"{document.name}: {error}; --skip-bad leaves such conversations out") from None
            self.left_out.row("conversations that the template or the tokenizer refuses")
            return None


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


def writer_for(
    source: str | Path, tokenizer: Tokenizer, options: Preparation, left_out: LeftOut
) -> Writer | ChatWriter:
    """What encodes the documents of a source under `resolved` options. ValueError: there is no chat template."""
    if options.read != "conversations":
        return Writer(tokenizer, left_out)
    most = load_config(options.model).vocab_size if options.model else tokenizer.vocab_size
    template = _template(source, options)
    known = not options.model and options.tokenizer in ("bytes", "bpe")
    ends = () if known else declared(_place(options), tokenizer)
    return ChatWriter(tokenizer, template, most, left_out, ends)


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
