"""The suites of `atma eval` that a sweep asks of every cell: which there are, their options, and how they are run.

A recipe names them under `[suites.NAME]`, with the options of `atma eval NAME` (its dataclass, read strictly). Factors
may set them too, as "suites.NAME.OPTION".
"""

import dataclasses
import difflib
import functools
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from atma.data.dataset import TokenSet
from atma.eval.language_model import LanguageModel
from atma.eval.suite import Progress, Untrained, run
from atma.strict import from_dict, plain

SUITES = {
    "likelihood": ("atma.eval.likelihood.suite", "Likelihood"),
    "retrieval": ("atma.eval.retrieval.suite", "Retrieval"),
    "reasoning": ("atma.eval.reasoning.suite", "Reasoning"),
    "tasks": ("atma.eval.tasks", "Tasks"),
    "recall": ("atma.eval.recall.suite", "Recall"),
}
"""The module and the dataclass of each suite, imported when it is asked for; they are run in this order."""
Row = dict[str, Any]
Suites = dict[str, Any]
"""The configuration of each suite by its name."""


def kind(name: str) -> type:
    """The dataclass of a suite's options."""
    module, options = SUITES[name]
    return getattr(importlib.import_module(module), options)


@functools.cache
def settings() -> frozenset[str]:
    """Every option of every suite, as a factor sets it."""
    return frozenset(f"suites.{name}.{one.name}" for name in SUITES for one in dataclasses.fields(kind(name)))


def read_suites(table: Any) -> Suites:
    """The table `[suites]`, strictly. ValueError names the nearest suite or option."""
    if not isinstance(table, dict):
        raise ValueError(f"'suites' must be tables such as [suites.likelihood], not {table!r}")
    for name, options in table.items():
        if name not in SUITES:
            near = difflib.get_close_matches(name, SUITES, 1, 0.0)[0]
            raise ValueError(f"unknown suite 'suites.{name}'; did you mean 'suites.{near}'?")
        if not isinstance(options, dict):
            raise ValueError(f"'suites.{name}' must be a table, not {options!r}")
    return {name: from_dict(kind(name), table[name], f"suites.{name}.") for name in SUITES if name in table}


def options(suites: Suites) -> dict[str, Row]:
    """Every option of the suites as JSON has it, a path as its text."""
    told = {name: plain(dataclasses.asdict(suite)) for name, suite in suites.items()}
    return json.loads(json.dumps(told, default=str))


def measure(
    suites: Suites, model: LanguageModel, device: str, results: Path, progress: Progress
) -> Iterator[tuple[str, list[Row]]]:
    """Name and rows of each suite in turn, the rows kept in `results` as they come. ValueError: it cannot be run."""
    for name, suite in suites.items():
        if name == "recall":
            from atma.eval.recall.suite import recall

            yield name, recall(suite, results, progress, device=device)
        else:
            yield name, run(suite, model, results, progress)


def check_suites(suites: Suites, data: str) -> None:
    """ValueError, with the mend, for a suite that models of this data's tokenizer, which it has, can never be asked."""
    tokenizer = TokenSet.open(data, "validation").tokenizer if suites else None
    for name, suite in suites.items():
        try:
            if name == "recall":
                suite.lessons()
            else:
                assert tokenizer is not None
                suite.measurements(cast(LanguageModel, Untrained(tokenizer)), suite.trials())
        except ValueError as error:
            raise ValueError(f"[suites.{name}] cannot work: {error}") from None
