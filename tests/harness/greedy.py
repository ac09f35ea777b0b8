"""What a model writes when it always takes the most likely token, by itself and by the engine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atma.model import Model
from atma.serve import Engine, Request
from atma.serve.handle import Output
from atma.tokenizer import byte_tokenizer


@torch.inference_mode()
def greedy(model: Model, tokens: Tensor, count: int) -> list[int]:
    """The next `count` tokens after tokens (1, T), each by a call over all of the text."""
    for _ in range(count):
        tokens = torch.cat([tokens, model.logits(model(tokens)[0][:, -1:]).argmax(-1)], 1)
    return tokens[0, -count:].tolist()


def outputs(model: Model, prompts: Sequence[list[int]], count: int) -> list[Output]:
    """What an engine writes after each of the prompts, which it serves together."""
    engine = Engine(model, byte_tokenizer())
    asked = [Request(prompt, max_tokens=count, temperature=0, ignore_end=True, logprobs=0) for prompt in prompts]
    handles = [engine.submit(request) for request in asked]
    while engine.busy:
        engine.step()
    return [handle.outputs[0] for handle in handles]


def served(model: Model, prompt: list[int], count: int) -> list[int]:
    """The tokens of `greedy` as an engine writes them."""
    return outputs(model, [prompt], count)[0].tokens
