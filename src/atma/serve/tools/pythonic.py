"""Calls written as in Python, [search(query="x", limit=3), now()]: read as data, nothing is run."""

import ast
import json

WORDS = {"true": True, "false": False, "null": None}
"""What JSON spells otherwise than Python."""


def calls(text: str) -> list[tuple[str, str]]:
    """Names and arguments, as JSON, of a list of calls or of one. ValueError: the text is none of these."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        found = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
        return [_call(one) for one in found]
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"no calls: {error}") from None


def _call(node: ast.expr) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call with named arguments")
    given = {}
    for one in node.keywords:
        if one.arg is None:
            more = _value(one.value)
            if not isinstance(more, dict):
                raise ValueError("no table of arguments")
            given |= more
        else:
            given[one.arg] = _value(one.value)
    return _name(node.func), json.dumps(given, ensure_ascii=False, allow_nan=False)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if not isinstance(node, ast.Name):
        raise ValueError("no name")
    return node.id


def _value(node: ast.expr) -> object:
    if isinstance(node, ast.Name) and node.id in WORDS:
        return WORDS[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {str(_value(key)): _value(value) for key, value in pairs if key is not None}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("no value that JSON has")
    return value
