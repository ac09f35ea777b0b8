"""Language models that train short and run long.

Write with a model. One prompt gives one completion, a list of prompts a list:

    import atma

    llm = atma.LLM("nano")
    print(llm.generate("def read_lines(path):", max_tokens=20, temperature=0))

Watch it write, and stop when you like:

    for piece in llm.stream("import os\\n", max_tokens=20):
        print(piece, end="")

Ask whether a model holds at length: losses and needles by length, of ours or of transformers ("hf:FOLDER"):

    results = atma.measure("nano", lengths=[256, 512], documents=2, trials=2)
    print(results.table())

Train one on your own text:

    atma.prepare("my_texts", "data/own", atma.Preparation(tokenizer="bpe", vocab_size=512))
    recipe = {"model": {"preset": "nano-test", "vocab_size": 512}, "data": {"path": "data/own"}}
    run = atma.train_model(recipe, "runs/own", set={"train.tokens": 4096, "train.batch_tokens": 1024})

Use the model itself; its state is all that it keeps of what it has read:

    import torch

    model, tokenizer, *_ = atma.load("nano")
    state = model.init_state(batch=1, capacity=64)
    hidden, state = model(torch.tensor([tokenizer.encode("import os\\n")]), state)
    print(state, model.logits(hidden[:, -1:]).shape)

Every name is imported when it is first used, so that `import atma` costs nothing. `atma --help` on the command line.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atma.config import (
        DataConfig,
        EvaluationConfig,
        LoraConfig,
        ModelConfig,
        Recipe,
        TrainConfig,
        load_recipe,
        preset,
    )
    from atma.data.preparation import Preparation
    from atma.data.prepare import prepare
    from atma.eval.measure import measure
    from atma.eval.measured import Measured
    from atma.eval.results_table import Results
    from atma.eval.retrieval.suite import Retrieval
    from atma.generation import Generation, generate, stream
    from atma.loading import Loaded, load
    from atma.model import Model
    from atma.report.chart import Chart
    from atma.selection import select
    from atma.serve.asynchronous import AsyncEngine
    from atma.serve.completion import Completion
    from atma.serve.engine import Engine
    from atma.serve.llm import LLM
    from atma.serve.request import Request, RequestError
    from atma.serve.settings import EngineConfig
    from atma.serve.stream import CompletionStream
    from atma.serve.structure import Structure
    from atma.settings import Settings
    from atma.state import ModelState
    from atma.tokenizer import Tokenizer
    from atma.train.python import TrainingRun, train_model

if sys.platform == "win32":  # file locks, signals and the server's sockets are not there
    raise ImportError("atma runs on Linux and macOS; on Windows install it in WSL (`wsl --install`)")

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncEngine",
    "Chart",
    "Completion",
    "CompletionStream",
    "DataConfig",
    "Engine",
    "EngineConfig",
    "EvaluationConfig",
    "Generation",
    "Loaded",
    "LoraConfig",
    "Measured",
    "Model",
    "ModelConfig",
    "ModelState",
    "Preparation",
    "Recipe",
    "Request",
    "RequestError",
    "Results",
    "Retrieval",
    "Settings",
    "Structure",
    "Tokenizer",
    "TrainConfig",
    "TrainingRun",
    "__version__",
    "generate",
    "load",
    "load_recipe",
    "measure",
    "prepare",
    "preset",
    "select",
    "stream",
    "train_model",
]

_HOMES = {
    "config": "DataConfig EvaluationConfig LoraConfig ModelConfig Recipe TrainConfig load_recipe preset",
    "data.preparation": "Preparation",
    "data.prepare": "prepare",
    "eval.measure": "measure",
    "eval.measured": "Measured",
    "eval.results_table": "Results",
    "eval.retrieval.suite": "Retrieval",
    "generation": "Generation generate stream",
    "loading": "Loaded load",
    "model": "Model",
    "report.chart": "Chart",
    "selection": "select",
    "serve.asynchronous": "AsyncEngine",
    "serve.completion": "Completion",
    "serve.engine": "Engine",
    "serve.llm": "LLM",
    "serve.request": "Request RequestError",
    "serve.settings": "EngineConfig",
    "serve.stream": "CompletionStream",
    "serve.structure": "Structure",
    "settings": "Settings",
    "state": "ModelState",
    "tokenizer": "Tokenizer",
    "train.python": "TrainingRun train_model",
}
"""The module of every name; more of them are told by the modules themselves."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(f"atma.{module}"), name)
    raise AttributeError(f"module 'atma' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
