"""Common words and frequent words: what must be counted over the whole of a context. Source: arXiv 2404.06654."""

import itertools
from collections.abc import Iterator

import numpy as np

from atma.eval.retrieval.prompts import Ask, Encoder, NoRoom, Prompt, asked, listing
from atma.eval.retrieval.words import made_up

COMMON = 10
FREQUENCIES = ((30, 3), (6, 1))
"""How often a common word and another one stand in the list; the second pair where the first takes half of it."""
TOP = 3
NOISE = " ..."
CODED_LETTERS = 6
EXAMPLE = ("kiteve", "rolasa")


def common_words(encoder: Encoder, rng: np.random.Generator, length: int, room: int) -> Prompt:
    """cwe: a numbered list in random order; the ten words that stand in it more often than the others."""
    words = (word for word in made_up(rng) if word not in EXAMPLE)
    common = list(itertools.islice(words, COMMON))

    def context(size: int) -> np.ndarray:
        often, seldom = _frequencies(encoder, common, size)
        first = [f" {word}" for word in common for _ in range(often)]
        more = (f" {word}" for word in words for _ in range(seldom))
        return listing(encoder, first, more, size, lambda number: f" {number}.", rng)

    listed = " ".join(f"{i}. {word}" for i, word in enumerate((*EXAMPLE[:1] * 3, EXAMPLE[1]), 1))
    before = (
        "Below is a numbered list of words. Some come often, the others seldom. Name at the end those that come most "
        f"often.\nExample: {listed}\nAnswer: The word that comes most often is {EXAMPLE[0]}\n\nList:"
    )
    after = f"\nQuestion: which {COMMON} words come most often in the list?\nAnswer: The {COMMON} words are"
    return asked(encoder, length, before, context, after, Ask(0, 0, room, tuple(common)))


def frequent_words(encoder: Encoder, rng: np.random.Generator, length: int, room: int) -> Prompt:
    """fwe: coded words whose frequencies fall as rank to the power -2, the first rank being dots; the next three."""
    coded = _coded(rng)
    top = list(itertools.islice(coded, TOP))

    def context(size: int) -> np.ndarray:
        words = [*top, *itertools.islice(coded, max(10, size // 50))]
        sizes = np.array([len(ids) for ids in encoder.many([NOISE, *(f" {word}" for word in words)])])
        counts = _zeta_counts(sizes, size)
        if counts[TOP] <= counts[TOP + 1]:
            raise NoRoom(f"{size} tokens are too few for {TOP} words to be the most frequent")
        counts[0] += (size - int(counts @ sizes)) // sizes[0]
        ids = encoder.many([NOISE, *(f" {word}" for word in words)])
        places = rng.permutation(np.repeat(np.arange(len(counts)), counts)).tolist()
        return np.concatenate([ids[i] for i in places]).astype(np.int64)

    before = "Below are coded words among dots. Ignore the dots, and count how often each coded word comes.\nText:"
    after = f"\nQuestion: which {TOP} coded words come most often?\nAnswer: The {TOP} coded words are"
    return asked(encoder, length, before, context, after, Ask(0, 0, room, tuple(top)))


def _frequencies(encoder: Encoder, common: list[str], size: int) -> tuple[int, int]:
    for often, seldom in FREQUENCIES:
        words = [f" {word}" for word in common]
        heads = [f" {number}." for number in range(1, COMMON * often + 1)]
        cost = often * sum(map(len, encoder.many(words))) + sum(map(len, encoder.many(heads)))
        if cost <= size // 2:
            return often, seldom
    raise NoRoom(f"{size} tokens of list have no room for {COMMON} words that come often and others")


def _zeta_counts(sizes: np.ndarray, size: int) -> np.ndarray:
    """How often each rank's word stands in the longest text of at most `size` tokens: floor(n · rank**-2 / ζ(2))."""
    share = 6 / np.pi**2 / np.arange(1, len(sizes) + 1) ** 2
    low, high = 0, size * 2
    while high - low > 1:
        n = (low + high) // 2
        fits = int((n * share).astype(np.int64) @ sizes) <= size
        low, high = (n, high) if fits else (low, n)
    return (low * share).astype(np.int64)


def _coded(rng: np.random.Generator) -> Iterator[str]:
    """Distinct words of six letters, endless."""
    used: set[str] = set()
    while True:
        for letters in rng.integers(97, 123, (64, CODED_LETTERS), dtype=np.uint8):
            word = letters.tobytes().decode()
            if word not in used:
                used.add(word)
                yield word
