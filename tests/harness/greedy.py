"""What a model writes when it always takes the most likely token, by itself and by the engine."""

import torch
from torch import Tensor

from atma.model import Model
from atma.serve import Engine, Request
from atma.tokenizer import byte_tokenizer


@torch.inference_mode()
def greedy(model: Model, tokens: Tensor, count: int) -> list[int]:
    """The next `count` tokens after tokens (1, T), each by a call over all of the text."""
    for _ in range(count):
        tokens = torch.cat([tokens, model.logits(model(tokens)[0][:, -1:]).argmax(-1)], 1)
    return tokens[0, -count:].tolist()


def served(model: Model, prompt: list[int], count: int) -> list[int]:
    """The same tokens as an engine writes them."""
    engine = Engine(model, byte_tokenizer())
    handle = engine.submit(Request(prompt, max_tokens=count, temperature=0, ignore_end=True))
    while engine.busy:
        engine.step()
    return list(handle.outputs[0].tokens)
