"""What a text's logits are when it is read alone, cold, in one call: what every served answer is compared with."""

import torch
from torch import Tensor

from atma.model import Model
from atma.serve.batch import table_of
from atma.serve.carry import Carrier
from atma.serve.exact import Served
from atma.serve.handle import Output
from atma.serve.pages import PagePool
from atma.serve.sampler import scores


class Cold:
    """A model with an empty pool of its own for every text."""

    def __init__(self, model: Model, vocabulary: int, page: int) -> None:
        self.model, self.vocabulary, self.page = model, vocabulary, page
        self.served, self.carrier = Served(model), Carrier(model)

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """(T, vocabulary)."""
        pages = -(-len(tokens) // self.page)
        pool = PagePool(self.model.config, pages, self.page, self.model.embed.weight.detach())
        table = table_of([list(range(pages))], self.model.embed.weight.device)
        state = self.carrier.state(self.carrier.empty(), [0], table, pool)
        hidden, _ = self.served(torch.tensor([tokens]), state)
        return self.served.logits(hidden[0])[:, : self.vocabulary]

    def differences(self, prompt: list[int], output: Output) -> tuple[int, int]:
        """Of a greedy answer with log-probabilities: tokens that are not the most likely, and log-probabilities that
        differ in any bit, when prompt and answer are read in one call."""
        logits = self.logits(prompt + output.tokens)[len(prompt) - 1 : -1]
        tokens = logits.argmax(-1).tolist()
        logprobs = [one.logprob for one in scores(logits, output.tokens, 0)]
        wrong = sum(a != b for a, b in zip(tokens, output.tokens, strict=True))
        return wrong, sum(a != b.logprob for a, b in zip(logprobs, output.logprobs, strict=True))
