"""Token ids of a text that a chat template wrote, exactly as the `tokenizers` library reads the whole of it.

The library finds the special tokens in the text, takes the white space that they strip (`lstrip`, `rstrip`), keeps to
`single_word` and `normalized`, and knows for what is between them whether it begins the text. None of that can be had
by cutting the text first. So the whole goes to the library, by a second copy of the tokenizer.
Where a message itself spells one, it must stay ordinary characters: then the copy knows the special tokens, and the
template's own ones are written, by other names that stand in no text.
"""

import json
import re
from collections.abc import Mapping
from functools import cached_property

from tokenizers import Tokenizer as Backend


class Rendered:
    """Reads rendered texts with one tokenizer."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        names = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
        self._numbers = {name: number for number, name in enumerate(names)}
        self._spelled = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._renamed: dict[str, tuple[Backend, dict[int, int]]] = {}

    def encode(self, text: str, hidden: Mapping[str, str]) -> tuple[list[int], list[int]]:
        """Ids of a text, and at which of its characters each begins.

        `hidden` are the signs in it and the ordinary characters that each stands for.
        """
        found = [sign for sign in hidden if sign in text]
        if not found:
            read = self._reader.encode(text, add_special_tokens=False)
            return read.ids, [start for start, _ in read.offsets]
        used = set(text).union(*hidden.values())
        mark = next(c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used)
        written, places = self._written(text, {sign: hidden[sign] for sign in found}, mark)
        if mark not in self._renamed:
            self._renamed = {mark: self._with_names(mark)}
        reader, own = self._renamed[mark]
        read = reader.encode(written, add_special_tokens=False)
        return [own.get(i, i) for i in read.ids], [places[start] for start, _ in read.offsets]

    def _written(self, text: str, hidden: Mapping[str, str], mark: str) -> tuple[str, list[int]]:
        """The text with special tokens by their numbers and with what was hidden, and the place in `text` of each of
        its characters and of its end."""
        parts, places, last = [], [], 0
        either = re.compile("|".join([*map(re.escape, hidden), *filter(None, [self._spelled.pattern])]))
        for match in either.finditer(text):
            spelled = hidden[match[0]] if match[0] in hidden else f"{mark}{self._numbers[match[0]]}{mark}"
            parts += [text[last : match.start()], spelled]
            places += [*range(last, match.start()), *[match.start()] * len(spelled)]
            last = match.end()
        return "".join([*parts, text[last:]]), [*places, *range(last, len(text) + 1)]

    @cached_property
    def _reader(self) -> Backend:
        reader = Backend.from_str(self._backend.to_str())
        reader.encode_special_tokens = False
        return reader

    def _with_names(self, mark: str) -> tuple[Backend, dict[int, int]]:
        """A copy whose special tokens are spelled by marks, and which of our ids each id of its added tokens means."""
        settings = json.loads(self._backend.to_str())
        ids = {}
        for token in settings["added_tokens"]:
            if token["special"]:
                token["content"] = f"{mark}{self._numbers[token['content']]}{mark}"
            ids[token["content"]] = token["id"]
        settings["post_processor"] = None  # it may name special tokens, which this copy has not, and is not used
        reader = Backend.from_str(json.dumps(settings))
        reader.encode_special_tokens = False
        return reader, {found: i for name, i in ids.items() if (found := reader.token_to_id(name)) is not None}
