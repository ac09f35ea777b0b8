"""Random JSON schemas of the kind that people write, each with answers that end: bounded texts, lists and depth."""

import random
from typing import Any

NAMES = ["id", "name", "größe", "a b", "kind", "tags", "value", "x-1", "", 'quo"te', "items", "$set"]
WORDS = ["red", "green", "", "two words", 'with "quotes"', "é€", "\\", "null", "-1"]
PATTERNS = ["^[a-z]{2,5}$", r"^[0-9]{3}-[0-9]{2}$", "^(ab|cd){1,3}x$", "^[A-F0-9]{4}$"]
FORMATS = ["date", "time", "uuid", "ipv4"]


def random_schema(seed: int) -> dict[str, Any]:
    """The schema of a seed: an object at the top, as clients ask for."""
    chance = random.Random(seed)
    schema = _object(chance, 3)
    if chance.random() < 0.2:
        schema["$defs"] = {"part": _any(chance, 1)}
        schema["properties"]["ref"] = {"$ref": "#/$defs/part"}
        schema["required"] = [*schema["required"], "ref"]
    return schema


def _any(chance: random.Random, depth: int) -> dict[str, Any]:
    plain = [_text, _number, _whole, _constant, _bool]
    deep = [_object, _list, _either, _tuple]
    if depth > 0 and chance.random() < 0.5:
        return chance.choice(deep)(chance, depth - 1)
    return chance.choice(plain)(chance)


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(NAMES, chance.randint(0, 4))
    required = [name for name in names if chance.random() < 0.6]
    properties = {name: _any(chance, depth) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _list(chance: random.Random, depth: int) -> dict[str, Any]:
    least = chance.randint(0, 2)
    return {"type": "array", "items": _any(chance, depth), "minItems": least, "maxItems": least + chance.randint(0, 2)}


def _tuple(chance: random.Random, depth: int) -> dict[str, Any]:
    parts = [_any(chance, depth) for _ in range(chance.randint(1, 2))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _either(chance: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(chance, depth), {"type": "null"}, _any(chance, depth)][: chance.randint(1, 3)]}


def _text(chance: random.Random) -> dict[str, Any]:
    kind = chance.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": chance.choice(PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": chance.choice(FORMATS)}
    least = chance.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + chance.randint(0, 8)}


def _whole(chance: random.Random) -> dict[str, Any]:
    low = chance.randint(-1000, 1000)
    bounds = {"minimum": low, "maximum": low + chance.randint(0, 10**6)}
    return {"type": "integer"} | (bounds if chance.random() < 0.8 else {"exclusiveMinimum": 0, "exclusiveMaximum": 9})


def _number(chance: random.Random) -> dict[str, Any]:
    return {"type": "number", "multipleOf": 0.25, "minimum": -8, "maximum": chance.randint(-7, 99)}


def _constant(chance: random.Random) -> dict[str, Any]:
    values: list[Any] = [*WORDS, 0, -1, 2.5, None, True, [1, "x"], {"a": None}]
    some = chance.sample(values, chance.randint(1, 4))
    return {"const": some[0]} if len(some) == 1 else {"enum": some}


def _bool(chance: random.Random) -> dict[str, Any]:
    return {"type": chance.choice(["boolean", "null", ["boolean", "null"]])}
