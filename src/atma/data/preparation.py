"""How to prepare a source, as frozen data: the options of `atma prepare`."""

from dataclasses import dataclass
from typing import Literal

from atma.data.shards import MOST_TOKENS
from atma.strict import check_fields

Reading = Literal["auto", "text", "conversations"]


@dataclass(frozen=True)
class Preparation:
    """How to prepare a source."""

    tokenizer: str = "bytes"
    """"bytes", "bpe" (trained on the source), or the path of a tokenizer.json."""
    vocab_size: int = 1024
    """Ids of a trained "bpe" tokenizer; the others bring their own."""
    validation_share: float = 0.05
    """Share of documents held out, about; see `atma.data.split`."""
    shard_tokens: int = 100_000_000
    """Most tokens of a shard; a longer document has a shard of its own."""
    seed: int = 0
    """Chooses the documents that are held out, their order and a tokenizer's sample."""
    field: str = "text"
    """Key or column of the text in records and tables; meta.text for a key within a key, or messages for chats."""
    split: str | None = None
    """Which split to read where the source has several; train by default."""
    end_of_text: str | None = None
    """The token that ends a text in a tokenizer.json where neither it nor the files beside it say so."""
    model: str = ""
    """A model folder, run or packaged model to prepare for: its tokenizer and chat template are taken."""
    read: Reading = "auto"
    """Rows as "text" or as "conversations"; by default what the first row is."""
    chat_template: str = ""
    """How conversations are written: a Jinja file, or plain, chatml or text; the folder's own by default."""
    skip_bad: bool = False
    """Leave out and count conversations that cannot be used; without it the first one ends the preparation."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.read == "conversations" and self.field != "text":
            raise ValueError(
                f"'field' {self.field!r} is for texts; conversations are read from whole rows: leave it out"
            )
        if not 0 <= self.validation_share <= 0.5:
            raise ValueError(f"'validation_share' must be between 0 and 0.5, not {self.validation_share!r}")
        if not 1 <= self.shard_tokens <= MOST_TOKENS:
            raise ValueError(f"'shard_tokens' must be between 1 and {MOST_TOKENS}, not {self.shard_tokens!r}")
        if self.seed < 0:
            raise ValueError(f"'seed' must be 0 or more, not {self.seed!r}")
        if self.model and self.tokenizer != "bytes":
            raise ValueError(f"'model' {self.model!r} brings its tokenizer: leave 'tokenizer' {self.tokenizer!r} out")
        if self.end_of_text is not None and self.model:
            raise ValueError("'end_of_text' is for a tokenizer.json; a model knows its own: leave it out")
        if self.end_of_text is not None and self.tokenizer in ("bytes", "bpe"):
            raise ValueError(f"'end_of_text' is for a tokenizer.json; '{self.tokenizer}' has its own: leave it out")
