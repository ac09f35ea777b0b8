"""Does an answer depend on its company? Requests alone, and again in batches that change from step to step."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from atma.config import ModelConfig
from atma.model import Model
from atma.serve.engine import Engine
from atma.serve.handle import Handle, Output
from atma.serve.request import Request


class Differences(NamedTuple):
    """Answers that are not the same, and log-probabilities that differ in any bit."""

    texts: int
    tokens: int
    logprobs: int


def speaking(config: ModelConfig, seed: int = 0) -> Model:
    """A model with random weights, none of its projections zero, so that every path speaks in the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(0, 2 / parameter.shape[1] ** 0.5, generator=generator)
    return model.eval()


def random_requests(count: int, corpus: Sequence[int], seed: int, prompt: int = 300, answer: int = 48) -> list[Request]:
    """Greedy requests for up to `answer` tokens after prompts of up to `prompt` tokens cut from `corpus`."""
    chance, made = random.Random(seed), []
    for _ in range(count):
        length = min(len(corpus) - 1, round(prompt ** chance.random()))
        at = chance.randrange(len(corpus) - length)
        text, most = list(corpus[at : at + length]), chance.randint(1, answer)
        made.append(Request(text, max_tokens=most, temperature=0, logprobs=0, ignore_end=True))
    return made


def alone(engine: Engine, requests: Sequence[Request]) -> list[Output]:
    """Each request when the one before has ended."""
    found = []
    for request in requests:
        handle = engine.submit(request)
        while not handle.done:
            engine.step()
        found.append(handle.outputs[0])
    return found


def together(engine: Engine, requests: Sequence[Request], seed: int, most: int = 32) -> tuple[list[Output], list[int]]:
    """Requests in bursts of random size with random steps between, up to `most` at once; and the rows of each step."""
    chance, handles, rows = random.Random(seed), [], []

    def step() -> None:
        engine.step()
        rows.append(len(engine.writing.sequences))

    under_way: list[Handle] = []
    while len(handles) < len(requests):
        under_way = [handle for handle in under_way if not handle.done]
        size = min(chance.randint(1, most), most - len(under_way))
        new = [engine.submit(request) for request in requests[len(handles) : len(handles) + size]]
        handles, under_way = handles + new, under_way + new
        for _ in range(chance.randint(1, 30)):
            step()
    while not all(handle.done for handle in handles):
        step()
    return [handle.outputs[0] for handle in handles], rows


def differences(one: Sequence[Output], other: Sequence[Output]) -> Differences:
    """Of two runs of the same requests."""
    pairs = list(zip(one, other, strict=True))
    logprobs = [(x, y) for a, b in pairs for x, y in zip(a.logprobs, b.logprobs, strict=False)]
    return Differences(
        sum(a.text != b.text for a, b in pairs),
        sum(a.tokens != b.tokens for a, b in pairs),
        sum(x.logprob != y.logprob for x, y in logprobs),
    )
