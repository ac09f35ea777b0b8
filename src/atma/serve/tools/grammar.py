"""Grammars of answers that call tools: each call in the form of the template, its arguments by its tool's schema."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from atma.serve.guides import SPACES
from atma.serve.structure import Structure, quoted
from atma.serve.tools.formats import Format
from atma.tokenizer import Tokenizer

MOST_CALLS = 16
"""Calls of one answer that is held to them."""
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(NamedTuple):
    """A function that may be called: `parameters` is the JSON schema of its arguments, None for none at all."""

    name: str
    parameters: Any = None
    strict: bool = False
    given: Mapping[str, Any] = {}
    """As the client described it, for the template."""


def calls(form: Format, tools: Sequence[Tool], tokenizer: Tokenizer, several: bool, parameter: str) -> Structure:
    """An answer that is calls of these tools and nothing else: one, or `several` if the model wants."""
    first = "" if form.bare else form.opening
    more = f" ({_spelled(form.between, form, tokenizer)} call){{0,{MOST_CALLS - 1}}}" if several else ""
    parts = [_spelled(first + "[" * form.listed, form, tokenizer), f"call{more}"]
    parts += [_spelled("]" * form.listed + form.closing, form, tokenizer)]
    return Structure(grammar=f"start: {' '.join(filter(None, parts))}\n{_rules(form, tools)}", parameter=parameter)


def calls_or(answer: Structure, form: Format, tools: Sequence[Tool], tokenizer: Tokenizer, several: bool) -> Structure:
    """Calls, or an answer of a form of its own, which is JSON."""
    found = calls(form, tools, tokenizer, several, answer.parameter).grammar or ""
    schema = _json(json.loads(answer.json or '{"type": "object"}'), answer.lenient, answer.compact)
    grammar = f"start: calls | answer\nanswer: %json {schema}\ncalls: {found.removeprefix('start: ')}"
    return Structure(grammar=grammar, parameter=answer.parameter)


def freely(form: Format, tools: Sequence[Tool], tokenizer: Tokenizer, several: bool) -> Structure:
    """Any text, in which what follows a form's sign is calls of these tools."""
    sign, again = form.opening.strip(), several and form.listed
    token, head = special(sign, tokenizer), form.opening[len(form.opening.rstrip()) :] + "[" * form.listed
    more = f" ({quoted(form.between)} call){{0,{MOST_CALLS - 1}}}" if again else ""
    part = ["begin", _spelled(head, form, tokenizer), f"call{more}"]
    part += [_spelled("]" * form.listed + form.closing, form, tokenizer)]
    lines = ["start: part* TEXT", r"TEXT: /(.|\n)*/", " ".join(["part:", *part])]
    lines += [f"begin[lazy]: TEXT {quoted(sign)}" if token is None else f"begin: TEXT <[{token}]>"]
    return Structure(grammar="\n".join([*lines, _rules(form, tools)]), parameter="tools")


def _rules(form: Format, tools: Sequence[Tool]) -> str:
    lines = ["call: " + " | ".join(f"call{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.name)}, "{form.arguments}": '
        schema = NOTHING if tool.parameters is None else {"type": "object"} | tool.parameters
        lines.append(f'call{i}: {quoted(head)} %json {_json(schema, not tool.strict)} "}}"')
    return "\n".join(lines)


def _json(schema: Any, lenient: bool, compact: bool = False) -> str:
    """A schema as it stands in a grammar, which has no other place for how it is to be read."""
    options: dict[str, Any] = {"lenient": lenient} | (
        {"whitespace_flexible": False} if compact else {"whitespace_pattern": SPACES}
    )
    known = schema if isinstance(schema, dict) else {} if schema else {"not": {}}
    return json.dumps(known | {"x-guidance": options}, ensure_ascii=False)


def _spelled(text: str, form: Format, tokenizer: Tokenizer) -> str:
    """Characters as a grammar has them, and the form's signs as tokens where they are special ones."""
    found, signs = [], {sign: special(sign, tokenizer) for sign in (form.opening.strip(), form.closing.strip()) if sign}
    while text:
        places = {sign: text.find(sign) for sign, token in signs.items() if token is not None and sign in text}
        sign = min(places, key=lambda one: places[one], default=None)
        end = len(text) if sign is None else places[sign]
        found += [quoted(text[:end])] * (end > 0) + ([] if sign is None else [f"<[{signs[sign]}]>"])
        text = text[end + len(sign or "") :]
    return " ".join(found)


def special(sign: str, tokenizer: Tokenizer) -> int | None:
    """The id of a sign that is a special token, which gives no text by itself; None for one that is a text."""
    token = tokenizer.backend.token_to_id(sign)
    return token if token is not None and not tokenizer.token_bytes(token) else None
