"""From structures to masks: which tokens an answer may go on with, found by `llguidance` (the extra "guided").

A structure is compiled once and remembered; every answer has a copy of where it stands in it. Before a token is
drawn, the logits of all others become −inf: so log-probabilities are those of what the structure allows, and rows
without a structure are left as they are, to the bit. When the structure may end, the tokens that end an answer are
allowed, and when it must, they alone.
"""

import functools
import importlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Many
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor

from atma.ops.rows import forbid
from atma.serve.request import Request, RequestError
from atma.serve.structure import Structure, quoted
from atma.tokenizer import Tokenizer

REMEMBERED = 128
"""Compiled structures, those asked for last."""
REMEMBERED_BYTES = 128 << 20
"""That all of them together may take, by what they may be inside and by the tokens that were written by them."""
PART_BYTES, TOKEN_BYTES = 256, 16 << 10
"""At most, of a part of a structure, and of what a token adds that leads where none has led: it is remembered too."""
FEW_PARTS, MANY_PARTS, MOST_PARTS = 4 << 10, 32 << 10, 128 << 10
"""Parts that a structure may come to: most keep to the few. Those of a large one go by its characters, for "a{99999}"
is short, takes 200 MiB, and holds everybody up for 0.1 s a token."""
MOST_STATES = 64 << 10
"""That an answer may lead a structure into."""
SPACES = "( |\\r?\\n[ \\t]{0,24})"
"""White space between the parts of JSON: without an end to it a small model writes nothing else."""
MOST_ITEMS = 5000
"""Of the parser in a step: an ambiguous grammar ends its own answer before its masks hold everybody up."""
TRIED = 3
"""Tokens that a structure is tried with when it is compiled, three times: some are too wide for any but the first."""
MEND = "pip install 'atma-lm[guided]' where the model runs"


class Compiled:
    """A structure that answers can begin from."""

    def __init__(self, matcher: Any, size: int) -> None:
        self.matcher, self.bytes = matcher, size


class Guide:
    """Where one answer stands in its structure."""

    def __init__(self, compiled: Compiled, request: Request, end: int, vocabulary: int) -> None:
        self._compiled, self._matcher = compiled, compiled.matcher.deep_copy()
        assert request.structure is not None
        self._parameter = request.structure.parameter
        self.bits = np.zeros(-(-vocabulary // 32), np.uint32)
        """Of the tokens that may come next, as `allow` found them."""
        self._address, self._bytes = self.bits.ctypes.data, self.bits.nbytes
        self._ends = set(request.stop_tokens) | (set() if request.ignore_end else {end})
        self._end = end
        self.ended = False

    def allow(self) -> np.ndarray:
        """`bits` of the tokens that may come next: (V / 32,) uint32, none where it cannot go on. RequestError: a
        limit was reached."""
        matcher, bits = self._matcher, self.bits
        matcher.unsafe_compute_mask_ptr(self._address, self._bytes)
        if matcher.is_error():  # the mask is then the end alone, as if the form were complete
            raise self.stuck()
        if matcher.is_accepting():
            bits[self._end >> 5] &= ~np.uint32(1 << (self._end & 31))
            for token in self._ends | ({self._end} if matcher.is_stopped() else set()):
                bits[token >> 5] |= np.uint32(1 << (token & 31))
        return bits

    def spared(self, ends: Many[int]) -> Many[int]:
        """Those of these tokens that can be forbidden too: all, or none where nothing else may come by `bits`."""
        left = self.bits.copy()
        for token in ends:
            left[token >> 5] &= ~np.uint32(1 << (token & 31))
        return ends if left.any() else ()

    def stuck(self) -> RequestError:
        """Why no token may come next, which is the structure's own fault."""
        reason = _brief(self._matcher.get_error()) or "no token goes on with it"
        return RequestError("invalid", f"'{self._parameter}' cannot be written on: {reason}", self._parameter)

    def take(self, token: int) -> None:
        """The token that was drawn. RequestError: the structure has no place for it."""
        matcher = self._matcher
        self._compiled.bytes += TOKEN_BYTES
        if matcher.is_accepting() and (token == self._end or token in self._ends):
            self.ended = True
        elif not matcher.consume_token(token):
            raise self.stuck()


class Guides:
    """Structures compiled for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: OrderedDict[Structure, Compiled] = OrderedDict()
        self._lock = threading.Lock()

    def compiled(self, structure: Structure) -> Compiled:
        """What `begin` begins from; in any thread. RequestError: it cannot be compiled, or the extra is missing."""
        with self._lock:
            known = self._known.get(structure)
            if known is not None:
                return self._remembered(structure, known)
        if find_spec("llguidance") is None:
            told = f"'{structure.parameter}' needs the package llguidance: {MEND}"
            raise RequestError("invalid", told, structure.parameter)
        try:
            found = _compiled(structure, self._reader)
        except ValueError as error:
            told = f"'{structure.parameter}' cannot be compiled: {_brief(str(error))}"
            raise RequestError("invalid", told, structure.parameter) from None
        with self._lock:
            return self._remembered(structure, found)

    def prepared(self, tokens: list[int], structure: Structure | None) -> "Prepared":
        """A prompt's tokens with the structure of its answers. RequestError as of `compiled`."""
        return Prepared(tokens, None if structure is None else self.compiled(structure))

    def allows(self, compiled: "Compiled", text: str) -> bool:
        """Whether a text is a whole answer by what `compiled` gave, which may be forgotten since."""
        matcher = compiled.matcher.deep_copy()
        return matcher.consume_tokens(self._reader.tokenize_bytes(text.encode())) and matcher.is_accepting()

    def begin(self, prepared: "Prepared", request: Request) -> Guide | None:
        """The guide of a new answer; None where it is free."""
        compiled = prepared.structure
        return None if compiled is None else Guide(compiled, request, self.tokenizer.eot, self.tokenizer.vocab_size)

    def _remembered(self, structure: Structure, compiled: Compiled) -> Compiled:
        """The same, as the one that was asked for last; what there is no room for is forgotten, if need be itself."""
        known = self._known
        known[structure] = compiled
        known.move_to_end(structure)
        while known and (len(known) > REMEMBERED or sum(one.bytes for one in known.values()) > REMEMBERED_BYTES):
            known.popitem(last=False)
        return compiled

    @functools.cached_property
    def _reader(self) -> Any:
        """The tokenizer as llguidance knows it."""
        library: Any = importlib.import_module("llguidance")
        return library.LLTokenizer(library.TokenizerWrapper(_Spelled(self.tokenizer)))


class Prepared(list[int]):
    """A prompt's tokens, and the compiled structure of its answers."""

    def __init__(self, tokens: list[int], structure: Compiled | None = None) -> None:
        super().__init__(tokens)
        self.structure = structure


def restrict(logits: Tensor, guides: Many[Guide | None]) -> None:
    """−inf in the rows (N, V) of those that have a guide, in place, for tokens it does not allow."""
    held = [(i, guide.allow()) for i, guide in enumerate(guides) if guide is not None]
    if held:
        forbid(logits, held)


class _Spelled:
    """What llguidance asks of a tokenizer. Tokens without bytes have names, which begin with 0xFF."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        data = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.eos_token_id, self.bos_token_id = tokenizer.eot, None
        self.special_token_ids = [i for i, own in enumerate(data) if not own]
        self.tokens = [own or self._name(i) for i, own in enumerate(data)]
        self._ids = {own: i for i, own in reversed(list(enumerate(data))) if own}
        self._longest = max(map(len, self._ids), default=0)
        self._divided = functools.lru_cache(4096)(self._divide)

    def __call__(self, data: bytes) -> list[int]:
        """Tokens of a text that the structure leaves no choice about, as the tokenizer divides it."""
        return self._divided(data)

    def _divide(self, data: bytes) -> list[int]:
        try:
            ids = self._tokenizer.encode(data.decode())
        except ValueError:
            return self._greedy(data)
        same = b"".join(self._tokenizer.token_bytes(i) for i in ids) == data
        return ids if same else self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        """Tokens whose bytes are these, as far as there are any; a tokenizer may put a space before a text."""
        found: list[int] = []
        while data:
            sizes = range(min(self._longest, len(data)), 0, -1)
            size = next((size for size in sizes if data[:size] in self._ids), None)
            if size is None:
                break
            found.append(self._ids[data[:size]])
            data = data[size:]
        return found

    def _name(self, token: int) -> bytes:
        text = self._tokenizer.backend.id_to_token(token) or f"<none {token}>"
        return b"\xff" + text.encode()


def _compiled(structure: Structure, reader: Any) -> Compiled:
    """ValueError with the reason."""
    library: Any = importlib.import_module("llguidance")
    many = min(MOST_PARTS, MANY_PARTS + 2 * _characters(structure))
    for parts in (FEW_PARTS, many):
        matcher = library.LLMatcher(reader, _source(structure), log_level=0, limits=_limits(parts))
        if not matcher.is_error():
            break
    _require_sound(matcher)
    for part in (0.0, 0.5, 1.0):
        _try(matcher.deep_copy(), part)
    return Compiled(matcher, parts * PART_BYTES)


def _try(matcher: Any, part: float) -> None:
    """Write with it, of the tokens that may come always the one at such a part of them. ValueError: it breaks down."""
    for _ in range(TRIED):
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        _require_sound(matcher)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        if matcher.is_stopped() or not len(allowed):
            break
        matcher.consume_token(int(allowed[int(part * (len(allowed) - 1))]))


def _require_sound(matcher: Any) -> None:
    if matcher.is_error():
        raise ValueError(matcher.get_error())


def _limits(parts: int) -> Any:
    library: Any = importlib.import_module("llguidance")
    states = {"step_max_items": MOST_ITEMS, "max_lexer_states": MOST_STATES}
    return library.LLParserLimits(verbose_errors=False, initial_lexer_fuel=parts, **states)


def _source(structure: Structure) -> str:
    """The structure in llguidance's words."""
    library: Any = importlib.import_module("llguidance")
    matcher, kind = library.LLMatcher, structure.kind
    if kind == "regex":
        return matcher.grammar_from_regex(structure.regex)
    if kind == "choice":
        return matcher.grammar_from_lark(one_of(structure.choice or ()))
    if kind == "grammar":
        gbnf = "::=" in (structure.grammar or "")
        return library.grammar_from("gbnf" if gbnf else "lark", structure.grammar)
    form = {"whitespace_flexible": False} if structure.compact else {"whitespace_pattern": SPACES}
    schema = '{"type":"object"}' if kind == "json_object" else structure.json
    return matcher.grammar_from_json_schema(schema, overrides=form | {"lenient": structure.lenient})


def _characters(structure: Structure) -> int:
    """Of its source."""
    return sum(
        map(len, (structure.json or "", structure.regex or "", structure.grammar or "", *(structure.choice or ())))
    )


def one_of(texts: Iterable[str]) -> str:
    """A Lark grammar of texts: one terminal, as a row of the parser has room for 2,000."""
    return "start: TEXT\nTEXT: " + " | ".join(map(quoted, texts))


def _brief(reason: str) -> str:
    """One line of what llguidance says."""
    line = " ".join(reason.replace("<non-verbose/>", "").split())
    if "does not fetch" in line:
        return f"{line.partition(' is not present')[0]} is elsewhere, and nothing is fetched: put it under '$defs'"
    if "too many expressions" in line or "too big (limit" in line:
        return f"{line}: shorten it, or its repetitions such as {{1000}}"
    return line if len(line) <= 300 else line[:300] + "…"
