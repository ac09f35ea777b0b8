"""How much of a chat is read again: `python benchmarks/serving.py chats`.

Chats of ten turns over /v1/chat/completions, their answers sent back as they came, with the plain dialogue and with a
template that ends every turn by end-of-text. Answers end by end-of-text (made likelier by a bias), by a stop text, or
by `max_tokens`. Of the tokens of earlier turns (the last prompt and the text of its answer), the share that is not read
again over all turns but the first; and the share of turns that read at most four of them again. Exit status 1: the
former is below `--least`.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from serving_client import post, served
from serving_harness import option_parser

TEMPLATE = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}{{ 'assistant\n' }}"
LINES = (
    "def read(path):",
    "why?",
    "class Node:\n    left = None",
    "import os, sys",
    "and the other way round?",
    "x = [1, 2]",
)
ENDS: dict[str, dict[str, Any]] = {
    "end-of-text": {"max_tokens": 200},
    "a stop text": {"max_tokens": 200, "stop": ["\n    return", "\n\n", "):\n"], "ignore_eos": True},
    "max_tokens": {"max_tokens": 12, "ignore_eos": True},
}
FEW = 4


class Turn(NamedTuple):
    finish: str
    prompt: int
    answer: int
    """Tokens of its text."""
    cached: int


def main(arguments: list[str]) -> int:
    parser = option_parser(__doc__, "chats")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--chats", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--least", type=float, default=0.0)
    options = parser.parse_args(arguments)
    print("template | ends by | turns | answers, tokens | not read again | turns that read at most 4")
    worst = 1.0
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder, "turns.jinja")
        own.write_text(TEMPLATE, encoding="utf-8")
        for name, extra in (("plain dialogue", ()), ("with end-of-text", ("--chat-template", str(own)))):
            settings = ("--threads", str(options.threads), *extra)
            with served(options.model, Path(folder, "log"), *settings) as server:
                worst = min(worst, _shares(server.port, name, options))
    return int(worst < options.least)


def _shares(port: int, name: str, options: argparse.Namespace) -> float:
    """One row for each end; the lowest share."""
    shares = []
    [end] = _ask(port, "/tokenize", {"prompt": ""})["tokens"]
    for kind, fields in ENDS.items():
        fields = fields if "ignore_eos" in fields else fields | {"logit_bias": {str(end): 6}}
        chats = [
            _chat(port, fields | {"seed": i, "temperature": options.temperature}, options.turns, i)
            for i in range(options.chats)
        ]
        shares.append(_row(name, kind, chats))
    return min(shares)


def _chat(port: int, fields: dict[str, Any], turns: int, seed: int) -> list[Turn]:
    messages: list[dict[str, str]] = []
    found = []
    for i in range(turns):
        messages.append({"role": "user", "content": LINES[(i + seed) % len(LINES)]})
        told = _ask(
            port, "/v1/chat/completions", fields | {"messages": messages, "cache_salt": f"{fields} {seed}"[:128]}
        )
        choice, usage = told["choices"][0], told["usage"]
        messages.append({"role": "assistant", "content": choice["message"]["content"]})
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        plain = {"prompt": messages[-1]["content"], "add_special_tokens": False}
        answer = _ask(port, "/tokenize", plain)["count"]
        found.append(Turn(choice["finish_reason"], usage["prompt_tokens"], answer, cached))
    return found


def _row(name: str, kind: str, chats: list[list[Turn]]) -> float:
    wanted = "length" if kind == "max_tokens" else "stop"
    pairs = [pair for chat in chats for pair in itertools.pairwise(chat) if pair[0].finish == wanted]
    earlier = [before.prompt + before.answer for before, _ in pairs]
    kept = [min(turn.cached, count) for (_, turn), count in zip(pairs, earlier, strict=True)]
    share = sum(kept) / max(1, sum(earlier))
    few = sum(count - cached <= FEW for count, cached in zip(earlier, kept, strict=True)) / max(1, len(pairs))
    answers = sum(before.answer for before, _ in pairs) / max(1, len(pairs))
    print(f"{name} | {kind} | {len(pairs)} | {answers:.0f} | {share:.1%} | {few:.0%}", flush=True)
    return share


def _ask(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return json.loads(post(port, path, body))
