"""START HERE to use a model from Python: texts, chats and streams, many at once, by the engine that also serves.

    llm = LLM("nano")
    print(llm.generate("def read_lines(path):", max_tokens=40))

One prompt gives one `Completion`, a list of prompts a list of them.
"""

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypedDict, Unpack, cast, overload

from atma.chat.asking import Message, chat_ids, chat_template
from atma.chat.renderer import Renderer
from atma.deprecation import deprecated
from atma.device import device_of
from atma.display import bytes_text, count_text
from atma.loading import dtype_of, load
from atma.narrow import numbers_in
from atma.serve.adapter_files import read_adapters
from atma.serve.completion import Completion
from atma.serve.engine import Engine
from atma.serve.handle import Handle
from atma.serve.prompts import Prompt, checked, several
from atma.serve.request import Request
from atma.serve.settings import EngineConfig
from atma.serve.stream import CompletionStream, Steps
from atma.serve.structure import Structure
from atma.settings import Settings, SettingsOptions, merged
from atma.stop_tokens import declared

if TYPE_CHECKING:
    import torch


class Former(TypedDict, total=False):
    """What `LLM` is still told by names that it had before."""

    path: str | Path


class LLM:
    """A model with an engine around it: many prompts at once, and nothing read twice.

    States of what was read and written are kept, so that the next turn of a chat, or another prompt with the same
    beginning, reads only what is new. Several threads may use one LLM; they take turns. Close it, or use it with
    `with`, to free its memory and end its chat templates' processes.
    """

    def __init__(
        self,
        model: str | Path = "nano",
        config: EngineConfig | None = None,
        *,
        dtype: "torch.dtype | str | None" = None,
        device: str | None = None,
        threads: int | None = None,
        select: str | None = None,
        weights: str | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        **former: Unpack[Former],
    ) -> None:
        """Load a packaged model ("nano"), a model folder, a run folder or a folder of adapters.

        config: sizes of the engine, 512 MiB beside the weights by default. dtype: of weights and arithmetic, such as
        "bfloat16"; float32 by default. device: "cpu" (the default) or "cuda". threads: PyTorch's, of the whole process.
        select: a selection policy, such as "top_pages k=64", as of `atma.select`. weights: "int8" or "int4" reads the
        large ones in so few bits, as of `atma.load`. adapters: folders of LoRA adapters on this model, of our training
        or PEFT's, by the names that calls ask for.
        ValueError: no such model, it has no tokenizer, no such device, or adapters of another model.
        """
        if unknown := former.keys() - {"path"}:
            raise TypeError(f"LLM has no argument '{min(unknown)}'")
        if "path" in former:
            deprecated("LLM(path=...)", "LLM(model=...)", "0.1.0")
            model = former["path"]
        if threads is not None:
            _set_threads(threads)
        loaded = load(model, dtype_of(dtype), select, weights)
        if loaded.tokenizer is None:
            raise ValueError(f"{loaded.path}: no tokenizer.json; put the one that the model was trained with there")
        worn = read_adapters(adapters or {}, model, loaded.model)
        if device is not None:
            loaded.model.to(device_of(device, "device"))
        self.name, self.tokenizer, self._folder = loaded.path.name, loaded.tokenizer, loaded.base
        self._ends = declared(loaded.base, loaded.tokenizer)
        self._parameters = numbers_in(loaded.model)
        self.engine = Engine(loaded.model, loaded.tokenizer, config, False, worn)
        self._steps = Steps(self.engine)
        self._renderers: dict[str, Renderer] = {}
        weakref.finalize(self, _close, self._renderers)

    @overload
    def generate(
        self,
        prompts: Prompt,
        settings: Settings | None = None,
        structure: Structure | None = None,
        adapter: str | None = None,
        **options: Unpack[SettingsOptions],
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: Settings | None = None,
        structure: Structure | None = None,
        adapter: str | None = None,
        **options: Unpack[SettingsOptions],
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        settings: Settings | None = None,
        structure: Structure | None = None,
        adapter: str | None = None,
        **options: Unpack[SettingsOptions],
    ) -> Completion | list[Completion]:
        """Continue a prompt, or each of a list of prompts: one gives one `Completion`, a list a list in its order.

            llm.generate("import os\\n", max_tokens=20, temperature=0)

        structure: the form of the answers, such as `atma.Structure(json=SCHEMA)`; it needs the extra "guided".
        adapter: the name of one of `adapters`, in whose words it answers; the model's own by default.
        options: fields of `Settings`, in the place of those of `settings`. Equal settings give equal answers whatever
        else is asked in the call; every prompt draws from the same seed. max_tokens 0 writes as far as memory goes.
        RequestError, before any is begun, if one of the prompts cannot be served. What fails later is raised for one
        prompt, and told in `Completion.error` for one of a list.
        """
        chosen = merged(settings, options)
        listed = several(prompts)
        if listed is None:
            return self._one(self.request(cast(Prompt, prompts), chosen, structure, adapter))
        return self._all([self.request(prompt, chosen, structure, adapter) for prompt in listed])

    def stream(
        self,
        prompt: Prompt,
        settings: Settings | None = None,
        structure: Structure | None = None,
        adapter: str | None = None,
        **options: Unpack[SettingsOptions],
    ) -> CompletionStream:
        """Continue a prompt, piece by piece as it is written; arguments as of `generate`.

        for piece in llm.stream("import os\\n", max_tokens=20):
            print(piece, end="")
        """
        return self._begun(self.request(prompt, merged(settings, options), structure, adapter))

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        settings: Settings | None = None,
        *,
        stream: Literal[False] = False,
        template: str | Path | None = None,
        structure: Structure | None = None,
        adapter: str | None = None,
        **options: Unpack[SettingsOptions],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        settings: Settings | None = None,
        *,
        stream: Literal[True],
        template: str | Path | None = None,
        structure: Structure | None = None,
        adapter: str | None = None,
        **options: Unpack[SettingsOptions],
    ) -> CompletionStream: ...
    def chat(
        self,
        messages: Sequence[Message],
        settings: Settings | None = None,
        *,
        stream: bool = False,
        template: str | Path | None = None,
        structure: Structure | None = None,
        adapter: str | None = None,
        **options: Unpack[SettingsOptions],
    ) -> Completion | CompletionStream:
        """The next turn of a chat, by the model's chat template; what earlier turns had in common is not read again.

            llm.chat([{"role": "user", "content": "Good morning"}], max_tokens=40, template="plain")

        messages: tables of "role" ("system", "user", "assistant") and "content". template: "plain", "chatml", "text" or
        a file, in the place of the model's own. stream: give the pieces as they are written. Others as of `generate`.
        ValueError: the model has no template and none is chosen, or the template does not render the messages.
        """
        chosen = merged(settings, options)
        with self._steps.lock:
            renderer = self._renderer(template)
            ids = chat_ids(renderer, self.tokenizer, messages)
        ending = merged(chosen, {"stop": (*chosen.stop, *renderer.template.stop)})
        request = self.request(ids, ending, structure, adapter)
        return self._begun(request) if stream else self._one(request)

    def request(
        self, prompt: Prompt, settings: Settings, structure: Structure | None = None, adapter: str | None = None
    ) -> Request:
        """The request for one prompt; max_tokens 0 writes as long as there is memory. RequestError: it is no prompt."""
        prompt = checked(prompt)
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
            structure=structure,
            adapter=adapter,
        )

    def close(self) -> None:
        """End what is under way, write kept states to their folder if there is one, and take no more."""
        with self._steps.lock:
            self.engine.close()
            _close(self._renderers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        served, stats = self.engine.served, self.engine.stats()
        size = (
            f"{count_text(self._parameters)} parameters, {str(served.dtype).removeprefix('torch.')} on {served.device}"
        )
        kept = f"{stats['kept_states']} states kept ({bytes_text(stats['kept_bytes'])})"
        return f"LLM({self.name!r}: {size}; {kept})"

    def _one(self, request: Request) -> Completion:
        """The answer to one request. RequestError: it could not go on."""
        [completion] = self._all([request])
        if completion.error is not None:
            raise completion.error
        return completion

    def _all(self, requests: list[Request]) -> list[Completion]:
        """The answers to requests, as many at once as there is room for."""
        engine, ready = self.engine, [(request, self.engine.prepare(request)) for request in requests]
        handles: list[Handle] = []
        try:
            while len(handles) < len(ready) or not all(handle.done for handle in handles):
                with self._steps.lock:
                    room = max(0, engine.scheduler.max_waiting - len(engine.scheduler.waiting))
                    for request, tokens in ready[len(handles) : len(handles) + room]:
                        handles.append(self._steps.submit(request, tokens))
                    self._steps.step()
        finally:
            for handle in handles:
                if not handle.done:
                    self._steps.leave(handle.id)
        return [Completion.of(handle.outputs[0]) for handle in handles]

    def _begun(self, request: Request) -> CompletionStream:
        return CompletionStream(self._steps, request, self.engine.prepare(request))

    def _renderer(self, template: str | Path | None) -> Renderer:
        """The process of a template, begun when it is first needed. RequestError: nothing would end it any more."""
        self.engine.check_open()
        key = str(template or "")
        if key not in self._renderers:
            self._renderers[key] = Renderer(chat_template(self._folder, template))
        return self._renderers[key]

    def _most(self, prompt: Prompt) -> int:
        read = (*self.tokenizer.beginning, *self.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
        length = max(1, len(read))
        return max(1, self.engine.store.longest_text - length)


def _set_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise ValueError(f"'threads' must be at least 1, not {threads}")
    torch.set_num_threads(threads)


def _close(renderers: dict[str, Renderer]) -> None:
    for renderer in renderers.values():
        renderer.close()
    renderers.clear()
