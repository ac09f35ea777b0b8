"""Texts as token ids for shards, with a count of what the tokenizer cannot write."""

from collections.abc import Sequence

import numpy as np

from atma.data.left_out import Document, LeftOut
from atma.tokenizer import Tokenizer


class Writer:
    """Encodes documents with one tokenizer and notes what is lost."""

    def __init__(self, tokenizer: Tokenizer, left_out: LeftOut) -> None:
        self.tokenizer, self.left_out = tokenizer, left_out

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray | None]:
        """Ids of each document; None for one that cannot be written, which is then noted."""
        texts = [document.text for document in documents]
        if not self.tokenizer.keeps_all:
            texts = [self._writable(text) for text in texts]
        found: list[np.ndarray | None] = []
        for ids in self.tokenizer.encode_many(texts):
            spelled = (ids == self.tokenizer.eot).any()
            if spelled or not len(ids):
                self.left_out.row("spelling the end-of-text token" if spelled else "without any token")
                found.append(None)
            else:
                found.append(ids)
        return found

    def _writable(self, text: str) -> str:
        """The text, without characters that the tokenizer refuses; all that it loses are counted."""
        lost = self.tokenizer.lost(text)
        self.left_out.characters.update(lost)
        return self.tokenizer.without_unknown(text) if lost else text
