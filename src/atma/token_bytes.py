"""The bytes that each token of a `tokenizer.json` stands for, by the rules of its decoder.

Three families say it token by token: byte-level ones, which write every byte as a visible character; SentencePiece-like
ones, which write a space as "▁" and may spell a byte as <0x0A>; and those whose tokens are simply joined. Others put
white space between tokens by context, or drop it, so that no token has bytes of its own: `unsuitable` says why.
"""

import re
from typing import Any

DECODERS = {"ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Strip", "Replace", "Sequence"}
_ESCAPED = re.compile("<0x([0-9A-Fa-f]{2})>")


class Spelling:
    """How the tokens of one tokenizer are spelled; `settings` is the data of its tokenizer.json."""

    def __init__(self, settings: dict[str, Any]) -> None:
        found = kinds(settings.get("decoder"))
        self.byte_level = "ByteLevel" in found
        self._escapes = "ByteFallback" in found
        self._known = self.byte_level or bool(found & {"Metaspace", "ByteFallback", "Fuse", "Replace"})
        self._replaced = dict(_replaced(settings.get("decoder")))

    def bytes_of(self, text: str) -> bytes:
        """The bytes of an ordinary token that is spelled `text`. ValueError: its bytes depend on its neighbours."""
        if self.byte_level:
            known = [_CHARACTER_BYTES.get(character) for character in text]
            return text.encode() if None in known else bytes(byte for byte in known if byte is not None)
        if not self._known:
            raise ValueError("its bytes are unknown: bits per byte need a byte-level or SentencePiece-like tokenizer")
        escaped = _ESCAPED.fullmatch(text) if self._escapes else None
        if escaped:
            return bytes.fromhex(escaped[1])
        for old, new in self._replaced.items():
            text = text.replace(old, new)
        return text.encode()


def unsuitable(settings: dict[str, Any]) -> str | None:
    """Why texts cannot be written with a tokenizer, given the data of its tokenizer.json; None if they can."""
    model, decoder = settings.get("model"), settings.get("decoder")
    model = model if isinstance(model, dict) else {}
    if model.get("type") == "WordPiece":
        return "a WordPiece tokenizer, whose tokens do not say where white space was"
    for key, where in (("end_of_word_suffix", "ends"), ("continuing_subword_prefix", "begins")):
        if model.get(key):
            return f"it {where} parts of words with '{model[key]}', so its tokens do not say where white space was"
    found = kinds(decoder)
    if strange := sorted(found - DECODERS):
        return f"its decoder '{strange[0]}' joins tokens in a way that gives none its own bytes"
    if not found - {"Sequence", "Strip"}:
        return "it has no decoder that says how tokens are joined to text"
    if any(isinstance(part, dict) and "Regex" in part for part in _patterns(decoder)):
        return "its decoder replaces by a regular expression, which gives no token its own bytes"
    return None


def kinds(settings: object) -> set[str]:
    """Every "type" named in a part of a tokenizer.json."""
    return {part["type"] for part in _parts(settings) if isinstance(part.get("type"), str)}


def unknown_token(settings: dict[str, Any]) -> str | int | None:
    """What stands for characters that a tokenizer has no token for: its text or its id; None if nothing does."""
    model = settings.get("model")
    if not isinstance(model, dict):
        return None
    return model.get("unk_id") if model.get("type") == "Unigram" else model.get("unk_token")


def byte_characters() -> list[str]:
    """The visible character that byte-level tokenizers write for each byte, 0 to 255."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    table = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]


_CHARACTER_BYTES = {character: byte for byte, character in enumerate(byte_characters())}


def _parts(settings: object) -> list[dict[str, Any]]:
    """Every table in a part of a tokenizer.json."""
    if isinstance(settings, list):
        return [part for item in settings for part in _parts(item)]
    if isinstance(settings, dict):
        return [settings, *(part for item in settings.values() for part in _parts(item))]
    return []


def _patterns(decoder: object) -> list[object]:
    return [part.get("pattern") for part in _parts(decoder) if part.get("type") == "Replace"]


def _replaced(decoder: object) -> list[tuple[str, str]]:
    """What a decoder replaces in every token, and by what."""
    found = []
    for part in _parts(decoder):
        pattern = part.get("pattern")
        if part.get("type") == "Metaspace":
            found.append((str(part.get("replacement", "\u2581")), " "))
        elif part.get("type") == "Replace" and isinstance(pattern, dict) and isinstance(pattern.get("String"), str):
            found.append((pattern["String"], str(part.get("content", ""))))
    return found
