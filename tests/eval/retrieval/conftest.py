"""Four kinds of tokenizer, and a perfect copier behind the protocol of language models."""

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from atma.eval.language_model import Scored
from atma.eval.retrieval.words import prose
from atma.eval.stream import DEFAULT
from atma.loading import load
from atma.tokenizer import Tokenizer, byte_tokenizer
from atma.tokenizer_file import END_OF_TEXT

KINDS = ("bytes", "bpe", "gpt2", "llama3")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def tokenizer_of_kind(kind):
    if kind == "bytes":
        return byte_tokenizer()
    if kind == "bpe":
        return load("nano").tokenizer
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    if kind == "gpt2":
        return byte_level_bpe(own)
    return byte_level_bpe(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), own]))


def byte_level_bpe(splitting):
    """Trained on prose and numbers. GPT-2's splitting joins digits; Llama 3's, by threes, and line ends to a full stop.

    GPT-4's and Qwen's treat line ends as Llama 3's does.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = splitting
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, show_progress=False, initial_alphabet=alphabet)
    numbers = "".join(f" {i * 7919 % 100_000}" for i in range(20_000))
    lines = prose(2)[:100_000].replace(". ", ".\n") + "\n\n".join(prose(3)[:100_000].split("\n"))
    backend.train_from_iterator([prose(1)[:300_000], lines, numbers], trainer)
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend, backend.token_to_id(END_OF_TEXT))


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(request):
    return tokenizer_of_kind(request.param)


@pytest.fixture(scope="session")
def byte_level():
    return byte_tokenizer()


class Finder:
    """Goes on as the text went on after the longest earlier match of its end: it finds every needle."""

    longest, truncated, streaming = None, 0, DEFAULT

    def __init__(self, tokenizer, name="finder"):
        self.tokenizer, self.name = tokenizer, name
        self.read = 0

    def predict(self, tokens, last, progress=None):
        T = tokens.shape[1] - 1
        rows = [
            [guess(ids[: T + 1 - last + i]) == ids[T + 1 - last + i] for i in range(last)] for ids in tokens.tolist()
        ]
        right = np.array(rows)
        self.read += tokens.numel()
        if progress is not None:
            progress(len(tokens) * T)
        return Scored(np.where(right, 0.0, 10.0), right)

    def score(self, tokens, last=None, progress=None):
        return self.predict(tokens, last or tokens.shape[1] - 1, progress).nats

    def generate(self, prompt, most, stop=()):
        ids = list(prompt)
        while len(ids) < len(prompt) + most:
            ids.append(guess(ids))
        return ids[len(prompt) :]

    def provenance(self):
        return {"model": self.name, "tokenizer_sha256": self.tokenizer.hash()}


def guess(ids):
    """The token after the latest of the longest earlier matches of the end, at most 48 tokens long."""
    candidates = [j for j in range(1, len(ids)) if ids[j - 1] == ids[-1]]
    return ids[max(candidates, key=lambda j: (match(ids, j), j))] if candidates else ids[0]


def match(ids, j):
    size = 0
    while size < 48 and size < j and ids[j - 1 - size] == ids[-1 - size]:
        size += 1
    return size


@pytest.fixture
def finder(byte_level):
    return Finder(byte_level)


@pytest.fixture(scope="session")
def joins_digits():
    return tokenizer_of_kind("gpt2")


@pytest.fixture
def make_finder():
    return Finder
