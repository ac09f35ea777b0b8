"""Documents as token ids for shards: texts, with a count of what the tokenizer cannot write, and conversations.

`encode_batch` is all that a preparation computes with a tokenizer, here or in a process of its own (`atma.data.worker`,
which begins at once because nothing imported here is large).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer as Backend

from atma.data.left_out import Document, LeftOut
from atma.hub_files import TEMPLATE
from atma.tokenizer import Tokenizer

if TYPE_CHECKING:
    from atma.chat.template import Template
    from atma.data.chat_writer import ChatWriter

RECORD = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("hash", "<u8"), ("held_out", "?")])
"""What is kept of a document beside its tokens: how many, the bytes and a hash of its text, whether for validation."""


class Told(NamedTuple):
    """A document as it is learned: token ids (n,) int64, and of a conversation which are answers (n,) bool."""

    ids: np.ndarray
    answers: np.ndarray


class Encoded(NamedTuple):
    """A batch of documents as bytes for the spool, and what was left out of it."""

    ids: bytes
    answers: bytes
    """Of conversations: which tokens are answers, a byte each."""
    records: bytes
    """Of the documents that are not left out, a RECORD each."""
    counts: Mapping[str, int]
    characters: Mapping[str, int]


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

    def _writable(self, text: str) -> str:
        """The text, without characters that the tokenizer refuses; all that it loses are counted."""
        lost = self.tokenizer.lost(text)
        self.left_out.characters.update(lost)
        return self.tokenizer.without_unknown(text) if lost else text


class Encoding(NamedTuple):
    """How documents are encoded: texts, or conversations where there is a template. A process is told it as JSON."""

    tokenizer: Tokenizer
    template: "Template | None" = None
    most: int = 0
    """The ids that the model has."""
    ends: tuple[int, ...] = ()
    """Those that end a turn beside the tokenizer's own."""
    skips_bad: bool = False
    """Whether conversations that cannot be used are counted instead of ending the preparation."""

    def writer(self) -> "Writer | ChatWriter":
        """What encodes so; use it with `with`. ValueError: the template cannot be read."""
        left_out = LeftOut()
        left_out.skips_bad = self.skips_bad
        if self.template is None:
            return Writer(self.tokenizer, left_out)
        from atma.data.chat_writer import ChatWriter  # imports PyTorch, and texts need it not

        return ChatWriter(self.tokenizer, self.template, self.most, left_out, self.ends)

    def manifest(self) -> dict[str, Any]:
        """What the manifest says of the template."""
        if self.template is None:
            return {}
        from atma.chat.template import BUILT_IN, built_in

        text, digest = self.template.text, hashlib.sha256(self.template.text.encode()).hexdigest()
        built = next((name for name in BUILT_IN if built_in(name).text == text), None)
        return {"conversations": {"template": built, "sha256": digest, "names": self.template.names}}

    def save(self, folder: Path) -> None:
        """Write what belongs beside the shards."""
        self.tokenizer.save(folder / "tokenizer.json")
        if self.template is not None:
            (folder / TEMPLATE).write_text(self.template.text, encoding="utf-8")

    def told(self) -> bytes:
        """All of it as JSON."""
        one = self.tokenizer
        tokenizer = [one.backend.to_str(), one.eot, one.start, one.beginning]
        return json.dumps([tokenizer, self.template, self.most, self.ends, self.skips_bad]).encode()

    @staticmethod
    def heard(data: bytes) -> "Encoding":
        """What `told` wrote."""
        (backend, *tokens), template, most, ends, skips_bad = json.loads(data)
        if template is not None:
            from atma.chat.template import Template

            template = Template(*template)
        return Encoding(Tokenizer(Backend.from_str(backend), *tokens), template, most, tuple(ends), skips_bad)


def encode_batch(writer: "Writer | ChatWriter", batch: Sequence[tuple[Document, bool]], dtype: np.dtype) -> Encoded:
    """Documents, each with whether it is for validation, as ids of a type. ValueError: one that may not be left out."""
    noted = LeftOut()
    noted.skips_bad, writer.left_out = writer.left_out.skips_bad, noted
    found = writer.encode([document for document, _ in batch])
    kept = [(told, document.text.encode(), mark) for told, (document, mark) in zip(found, batch, strict=True) if told]
    records = np.array([(len(told.ids), len(data), _hash(data), mark) for told, data, mark in kept], RECORD)
    ids = b"".join(told.ids.astype(dtype).tobytes() for told, _, _ in kept)
    answers = b"".join(told.answers.tobytes() for told, _, _ in kept)
    return Encoded(ids, answers, records.tobytes(), dict(noted.counts), dict(noted.characters))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
