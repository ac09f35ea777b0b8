"""Prompts as texts: one JSON object a line, for any other model or harness."""

import json
from collections.abc import Iterator
from pathlib import Path

from atma.eval.language_model import Row
from atma.eval.retrieval.maker import Maker
from atma.eval.retrieval.presets import Setting
from atma.eval.retrieval.prompts import Prompt
from atma.tokenizer import Tokenizer


def exported(maker: Maker, path: Path) -> int:
    """Write every trial of the suite and return their number. The same suite and tokenizer give the same bytes.

    Each line has `index`, `task`, `haystack`, `depth` (where chosen), `target` (the length asked for), `length`
    (of this text: the token that begins it, `input` and the room for the answer, counted by encoding `input`), `input`,
    `outputs`, `any` (whether one of the outputs is enough), `room` (tokens to write at most) and `seed`. A task that
    asks several questions has one line a question, the true answers to earlier ones in its input.
    """
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows(maker):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def rows(maker: Maker) -> Iterator[Row]:
    """The lines of an export, in the order of the suite; each way of scoring reads the same prompts."""
    shown = list(dict.fromkeys(setting._replace(scoring="greedy") for setting in maker.settings if not setting.absent))
    for length, count in maker.suite.trials().items():
        for setting in shown:
            for index in range(count):
                [prompt] = maker.prompts(setting, length, range(index, index + 1))
                yield from _lines(maker, setting, prompt, {"index": index, "target": length, "seed": maker.suite.seed})


def _lines(maker: Maker, setting: Setting, prompt: Prompt, about: Row) -> Iterator[Row]:
    tokenizer: Tokenizer = maker.encoder.tokenizer
    place = {} if setting.depth is None else {"depth": setting.depth}
    for ask in prompt.asks:
        text = tokenizer.decode(prompt.ids[1 : ask.start].tolist())
        length = 1 + len(tokenizer.encode(text)) + ask.room
        yield {
            "index": about["index"],
            "task": setting.task,
            "haystack": setting.haystack,
            **place,
            "target": about["target"],
            "length": length,
            "input": text,
            "outputs": list(ask.outputs),
            "any": ask.any,
            "room": ask.room,
            "seed": about["seed"],
        }
