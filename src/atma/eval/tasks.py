"""The suite `tasks`: lm-eval's tasks on any model, as rows that resume, and compare in pairs.

lm-eval does the asking and the scoring (its `simple_evaluate`); here its results become rows: each metric with its
standard error, what came of each document, and hashes of the documents, the prompts and the task.
"""

import difflib
import importlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from atma.eval.language_model import LanguageModel, Row
from atma.eval.stream import Advance
from atma.eval.suite import Measurement, sha256
from atma.statistics import wilson
from atma.strict import check_fields

PRESETS = {
    "short-context": (
        "lambada_openai",
        "hellaswag",
        "piqa",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
        "boolq",
    )
}
"""short-context: the eight of the ATMA paper."""
OUTCOMES = ("acc", "exact_match", "acc_norm")
"""Metrics that pair two models, the first that a task has."""


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval."""

    tasks: tuple[str, ...] = ()
    """Names of tasks or groups, with commas or blanks between; groups are measured as the tasks in them."""
    preset: Literal["none", "short-context"] = "none"
    """A list of tasks: short-context is LAMBADA, HellaSwag, PIQA, WinoGrande, ARC-E, ARC-C, OpenBookQA and BoolQ."""
    limit: int = 0
    """The first so many documents of each task; 0 for all."""
    num_fewshot: int | None = None
    """Examples in the prompt; left out, the task's own number."""
    include_path: Path | None = None
    """A folder of further tasks in YAML."""
    prefix: Literal["auto", "on", "off"] = "auto"
    """Whether a context begins with the token that begins a text; auto: for our models and where the tokenizer says."""
    seed: int = 1234
    """Draws the examples."""

    name = "tasks"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.limit < 0 or self.seed < 0 or (self.num_fewshot or 0) < 0:
            given = f"{self.limit}, {self.num_fewshot} and {self.seed}"
            raise ValueError(f"'limit', 'num_fewshot' and 'seed' must be 0 or more, not {given}")

    def names(self) -> list[str]:
        """Those asked for, each once."""
        asked = [name for part in self.tasks for name in part.split(",") if name]
        return list(dict.fromkeys([*PRESETS.get(self.preset, ()), *asked]))

    def trials(self) -> dict[int, int]:
        """`Suite.trials`: none to choose; `limit` does."""
        return {}

    def cells(self) -> int:
        """`Suite.cells`."""
        return 0

    def measurements(self, model: LanguageModel, trials: Mapping[int, int]) -> list[Measurement]:
        """`Suite.measurements`, one a task. The data of all is loaded first, so that what is missing is told."""
        if not self.names():
            raise ValueError(f"no tasks: give --tasks NAME ..., or --preset {', '.join(PRESETS)}")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ValueError(f"{self.include_path}: no such folder of tasks")
        library = lm_eval()
        manager = self.manager()
        found = [
            self._measurement(library, model, manager, name, task)
            for asked in self.names()
            for name, task in self._loaded(manager, asked).items()
        ]
        kept: dict[str, Measurement] = {}
        for one in found:
            if kept.setdefault(one.name, one).spec != one.spec:
                raise ValueError(f"task {one.name} is asked for twice, with different settings; measure one at a time")
        return list(kept.values())

    def manager(self) -> Any:
        """What lm-eval knows of tasks: those of the folder, and its own thousands unless all asked for are there."""
        make = importlib.import_module("lm_eval.tasks").TaskManager
        if self.include_path is not None:
            manager = make(include_path=str(self.include_path), include_defaults=False)
            if all(name in manager.task_index for name in self.names()):
                return manager
        return make(include_path=str(self.include_path) if self.include_path else None)

    def _loaded(self, manager: Any, name: str) -> dict[str, Any]:
        """A task, or those of a group. ValueError: no such task, or its data cannot be had."""
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.task_index, 3)
            raise ValueError(f"no task '{name}'" + (f"; near it: {', '.join(near)}" if near else ""))
        try:
            return dict(manager.load([name])["tasks"])
        except Exception as error:
            if isinstance(error, AssertionError | TypeError | AttributeError):
                raise
            told = " ".join(str(error).split())[:200]
            raise ValueError(
                f"task {name}: its data cannot be loaded ({type(error).__name__}: {told}); the tasks of lm-eval "
                "download from the Hugging Face hub: run once with a network, or give local tasks by --include-path"
            ) from None

    def _measurement(self, library: Any, model: LanguageModel, manager: Any, name: str, task: Any) -> Measurement:
        documents = min(self.limit or math.inf, len(task.eval_docs))
        config = sha256(str(sorted((k, _plain(v)) for k, v in task.dump_config().items() if k != "metadata")))
        spec: Row = {
            "task": name,
            "version": str(task.VERSION),
            "lm_eval": library.__version__,
            "config_sha256": config,
            "documents_sha256": self._documents(task),
        }
        spec |= {"num_fewshot": self.num_fewshot, "prefix": self.prefix, "documents": documents}

        def run(advance: Advance) -> list[Row]:
            from atma.eval.eleuther import AtmaLM

            adapter = AtmaLM(model, self.prefix)
            results = library.simple_evaluate(
                adapter,
                tasks=[task],  # by its name it would be loaded again, without the settings of its group
                task_manager=manager,
                limit=self.limit or None,
                num_fewshot=self.num_fewshot,
                random_seed=self.seed,
                numpy_random_seed=self.seed,
                torch_random_seed=self.seed,
                fewshot_random_seed=self.seed,
            )
            advance(int(documents))
            hashes = {"prompts_sha256": sha256(adapter.shown), "config_sha256": config}
            return [row | hashes for row in rows_of(results, name)]

        return Measurement(name, spec, int(documents), run)

    def _documents(self, task: Any) -> str:
        """Hash of what is asked and of what examples are drawn from: a configuration only says where they are."""
        asked = list(islice(task.eval_docs, self.limit or None))
        shots = task.config.num_fewshot if self.num_fewshot is None else self.num_fewshot
        examples = list(task.fewshot_docs()) if shots else []
        return sha256(json.dumps([asked, examples], sort_keys=True, default=str))


def rows_of(results: Mapping[str, Any], task: str) -> list[Row]:
    """lm-eval's results of a task as rows, one for each of its filters."""
    figures, samples = results["results"][task], results["samples"][task]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    found = []
    for which in filters:
        own = sorted((s for s in samples if s["filter"] == which), key=lambda s: s["doc_id"])
        row: Row = {"kind": "task", "task": task, "filter": which, "trials": len(own)}
        row |= {"num_fewshot": results["n-shot"].get(task), "version": str(results["versions"].get(task))}
        row |= {
            name.split(",")[0]: float(value)
            for name, value in figures.items()
            if name.endswith(f",{which}") and isinstance(value, int | float) and math.isfinite(value)
        }
        row |= _paired(own)
        hashes = [[sample["doc_hash"], sample["target_hash"]] for sample in own]
        found.append(row | {"trials_sha256": sha256(hashes)})
    return found


def _paired(samples: Sequence[Mapping[str, Any]]) -> Row:
    """What came of each document: right or wrong, or, of whole texts, bits per byte."""
    for name in OUTCOMES:
        values = [sample.get(name) for sample in samples]
        if all(value in (0, 1) for value in values):
            outcomes = [int(value) for value in values if value is not None]
            low, high = wilson(sum(outcomes), len(outcomes))
            return {"outcome": name, "outcomes": outcomes, "outcome_low": low, "outcome_high": high}
    pairs = [sample.get("bits_per_byte") for sample in samples]
    if all(isinstance(pair, list | tuple) and pair[1] for pair in pairs):
        return {"document_losses": [-pair[0] / pair[1] / math.log(2) for pair in pairs if pair]}
    return {}


def _plain(value: Any) -> Any:
    """A configuration with the source of functions in their place: their addresses are new in every process."""
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not callable(value):
        return str(value)
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return getattr(value, "__qualname__", type(value).__qualname__)


def lm_eval() -> Any:
    """The library. ValueError where it is not installed."""
    try:
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise ValueError(f"tasks need lm-eval ({error}): pip install 'atma-lm[lm-eval]'") from None
