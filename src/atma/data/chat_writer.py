"""Conversations as token ids for shards, through a chat template."""

from collections.abc import Collection, Sequence

from atma.chat.renderer import Renderer
from atma.chat.template import Template
from atma.data.answers import Answers
from atma.data.conversations import MARK, messages_in
from atma.data.encoders import Told
from atma.data.left_out import Document, LeftOut
from atma.tokenizer import Tokenizer


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
