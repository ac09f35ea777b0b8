"""Many prompts through the engine in one call, for Python callers."""

from collections.abc import Sequence
from pathlib import Path

from atma.loading import load
from atma.serve.engine import Engine
from atma.serve.handle import Handle, Output
from atma.serve.request import Request
from atma.serve.settings import EngineConfig
from atma.settings import Settings
from atma.stop_tokens import declared

Prompt = str | Sequence[int]


class LLM:
    """A model by name or folder with an engine around it. ValueError: no such model, or it has no tokenizer."""

    def __init__(self, path: str | Path = "nano", config: EngineConfig | None = None) -> None:
        loaded = load(path)
        if loaded.tokenizer is None:
            raise ValueError(f"{loaded.path}: no tokenizer.json; put the one that the model was trained with there")
        self.tokenizer = loaded.tokenizer
        self._ends = declared(loaded.base, loaded.tokenizer)
        self.engine = Engine(loaded.model, loaded.tokenizer, config, keep_model=False)

    def generate(self, prompts: Sequence[Prompt], settings: Settings | None = None) -> list[Output]:
        """An answer to each prompt, in their order, as many at once as there is room for.

        Equal settings give equal answers whatever else is asked in the call; every prompt draws from the same seed.
        RequestError, before any is begun, if one of the prompts cannot be served.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of texts, not one text")
        requests = [self.request(prompt, settings or Settings()) for prompt in prompts]
        ready = [(request, self.engine.prepare(request)) for request in requests]
        handles: list[Handle] = []
        while len(handles) < len(ready) or not all(handle.done for handle in handles):
            scheduler = self.engine.scheduler
            room = scheduler.max_waiting - len(scheduler.waiting)
            for request, tokens in ready[len(handles) : len(handles) + room]:
                handles.append(self.engine.submit(request, tokens))
            self.engine.step()
        return [handle.outputs[0] for handle in handles]

    def request(self, prompt: Prompt, settings: Settings) -> Request:
        """The request for one prompt; max_tokens 0 writes as long as there is memory."""
        return Request(
            prompt,
            max_tokens=settings.max_tokens or self._most(prompt),
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            seed=settings.seed,
            stop=settings.stop,
            stop_tokens=(*settings.stop_tokens, *(() if settings.ignore_end else self._ends)),
            ignore_end=settings.ignore_end,
        )

    def _most(self, prompt: Prompt) -> int:
        read = (*self.tokenizer.beginning, *self.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
        length = max(1, len(read))
        return max(1, self.engine.store.longest_text - length)
