"""What `atma train` says and does around training: which rows are synthetic, and the evaluation of its recipe."""

import dataclasses
import os
import shlex
from pathlib import Path

from atma.config import EvaluationConfig, Recipe


def announce(recipe: Recipe, evaluates: bool) -> None:
    """Tell what a user may not expect, before the first step. ValueError: the evaluation asked for can never work."""
    from atma.eval.lengths import check_recipe

    if evaluates and _conversations(recipe):
        told = "holds conversations, and --evaluate measures texts by their length: leave it out, or use atma eval with"
        raise ValueError(f"{recipe.data.path}: {told} --data of texts")
    lines = check_recipe(recipe, evaluates)
    if not _first():
        return
    data = recipe.data
    if data.recall_share:
        print(
            f"{data.recall_share:.0%} of the rows are synthetic recall, the rest is {data.path}; "
            "--set data.recall_share=0 leaves it out"
        )
    if data.copy_warmup_tokens:
        print(
            f"the first {data.copy_warmup_tokens:,} tokens are synthetic copies; "
            "--set data.copy_warmup_tokens=0 leaves them out"
        )
    for line in [*short_bounds(recipe), *lines]:
        print(line)


def short_bounds(recipe: Recipe) -> list[str]:
    """A line for each bound of the model that is shorter than what it is trained on, which it then is not for."""
    model, length = recipe.model, recipe.train.length
    first = "" if recipe.train.init_from else "leave it out of the recipe with a preset, or "
    return [
        f"{name} = {value:g} is below train.length = {length}; {first}--set model.{name}={length}"
        for name, value in model.following.items()
        if value is not None and value < length
    ]


def ended(recipe: Recipe, folder: Path, final: Path, device: str | None, evaluates: bool) -> None:
    """Tell what there is after a run; its last line says what it came to."""
    if _first():
        best = folder / "best"
        if recipe.train.keep_best and best.is_dir():
            print(f"lowest validation loss: {best}")
        print(f"try it: atma generate --model {shlex.quote(str(folder))} PROMPT")
    measured(recipe, folder, device, evaluates)
    if _first():
        print(f"trained: {summary(folder)}, model in {final}")


def summary(folder: Path) -> str:
    """A run in a line: its name, losses, tokens and time, as its record has them."""
    from atma.bars import clock
    from atma.runs.reading import read_run

    run = read_run(folder)
    parts = [] if run.loss is None else [f"loss {run.loss:.4f}"]
    parts += [] if run.validation is None else [f"validation {run.validation:.4f}"]
    pace = f" ({run.rate:,.0f} tokens/s)" if run.rate else ""
    return f"{run.name}: {', '.join([*parts, f'{run.tokens:,} tokens in {clock(run.seconds)}{pace}'])}"


def measured(recipe: Recipe, folder: Path, device: str | None, evaluates: bool) -> None:
    """Evaluate a finished run, or say the command that does."""
    if not _first() or (_conversations(recipe) and not evaluates):
        return
    if not evaluates:
        print(f"measure it: {command(recipe, folder)}")
        return
    import torch

    from atma.bars import bars
    from atma.commands.eval_lengths import show
    from atma.data.dataset import TokenSet
    from atma.eval import evaluate
    from atma.loading import load

    loaded, out = load(folder), folder / "evaluation.jsonl"
    if device is not None or torch.cuda.is_available():
        loaded.model.to(device or "cuda")
    with bars() as progress:
        rows = evaluate(loaded, TokenSet.open(recipe.data.path, "validation"), recipe.evaluation, progress, out)
    show(rows, f"{recipe.name} on {recipe.data.path}")
    print(f"rows: {out}")


def _conversations(recipe: Recipe) -> bool:
    """Whether the data are conversations, whose model no evaluation by length fits."""
    from atma.data.dataset import TokenSet
    from atma.data.remote import is_remote

    path = recipe.data.path
    return bool(TokenSet.open(path).masks) if is_remote(path) else (Path(path) / "chat_template.jinja").is_file()


def _first() -> bool:
    """Whether this is the one of several processes (torchrun) that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def command(recipe: Recipe, folder: Path) -> str:
    """The `atma eval lengths` that does what the recipe's [evaluation] says."""
    words = ["atma", "eval", "lengths", "--model", str(folder), "--data", recipe.data.path]
    for one in dataclasses.fields(EvaluationConfig):
        value, name = getattr(recipe.evaluation, one.name), one.name.replace("_", "-")
        if value == one.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)
