"""Words and prose from a seed: the same letters on every machine, and no text of anyone's.

Made-up words serve where a word must have no meaning, the prose where a haystack must read like text and yet be the
same everywhere.
"""

from collections.abc import Iterator

import numpy as np

from atma.data.phrases import WORDS


def listed(text: str) -> tuple[str, ...]:
    """What stands between bars."""
    return tuple(text.split("|"))


VOCABULARY = tuple(WORDS.split())
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
ADJECTIVES = listed(
    "bright|careful|distant|early|famous|gentle|heavy|hidden|hollow|humble|large|lonely|modern|narrow|noisy|old|"
    "open|patient|plain|proud|quick|rare|rough|shallow|silent|simple|small|strange|sunny|tall|warm|wide|young"
)
PLACES = listed(
    "by the lake|near the mill|behind the school|under the bridge|along the canal|beyond the hills|"
    "at the crossroads|inside the courtyard|on the north shore|across the square|beside the railway|"
    "above the old town"
)
TIMES = listed(
    "in the first week of spring|after the rain|before the market opened|late in the evening|for many years|"
    "during the long winter|at the end of the season|every other day|once the road was clear|on quiet mornings"
)
DEEDS = listed(
    "was repaired|was painted again|was moved|was measured twice|was sold|was almost forgotten|"
    "was opened to visitors|was carried away|was shown to the council|was described in a letter|"
    "was kept under glass|was found again"
)
FORMS = (
    "The {a} {n} {place} {deed} {time}.",
    "People say that the {n} {deed} {time}.",
    "Nobody {place} remembers why the {a} {n} {deed}.",
    "One {a} {n} and one {b} {m} stood {place}.",
    "When the {n} {deed}, the {a} {m} was still {place}.",
    "It took the {a} {n} and some patience {time}.",
    "There was talk of the {n} {place}, and later of the {a} {m}.",
    "Whoever looks {place} will see the {a} {n} and little else.",
    "The {m} {deed}, but the {n} stayed where it was.",
    "Of all that was kept {place}, the {a} {n} mattered most {time}.",
)
SENTENCES = 16_384
PARAGRAPH = 6
FILLER = (
    " The river runs past the mill.",
    " A cart goes up the hill.",
    " The bell rings at noon.",
    " Rain falls and then it stops.",
    " So the day goes on as before.",
)


def filler() -> str:
    """Five short sentences, about 140 characters: the synthetic haystack is these, over and over."""
    return "".join(FILLER)


def prose(seed: int) -> str:
    """About a megabyte of sentences in paragraphs, each drawn from a few forms."""
    rng = np.random.default_rng([seed, 1 << 20])
    slots = {
        "form": FORMS, "a": ADJECTIVES, "b": ADJECTIVES, "n": VOCABULARY, "m": VOCABULARY,
        "place": PLACES, "time": TIMES, "deed": DEEDS,
    }  # fmt: skip
    drawn = {name: rng.integers(0, len(words), SENTENCES).tolist() for name, words in slots.items()}
    text = []
    for i in range(SENTENCES):
        chosen = {name: words[drawn[name][i]] for name, words in slots.items()}
        text.append(("\n" if i % PARAGRAPH == 0 else " ") + chosen["form"].format_map(chosen))
    return "".join(text)


def made_up(rng: np.random.Generator) -> Iterator[str]:
    """Every word of three syllables once, in random order: 343,000 of them."""
    n = len(SYLLABLES)
    for index in rng.permutation(n**3).tolist():
        yield SYLLABLES[index // (n * n)] + SYLLABLES[index // n % n] + SYLLABLES[index % n]


def uuid(rng: np.random.Generator) -> str:
    """32 random hexadecimal digits in the groups of a UUID."""
    digits = rng.bytes(16).hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def hyphenated(rng: np.random.Generator, parts: int) -> str:
    """So many words of the vocabulary, such as amber-falcon."""
    return "-".join(VOCABULARY[i] for i in rng.integers(0, len(VOCABULARY), parts).tolist())
