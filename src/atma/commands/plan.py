"""`atma plan`: what a training costs, before it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from atma.commands.tables import print_table
from atma.commands.train import ASSIGNMENTS
from atma.display import bytes_text, count_text

if TYPE_CHECKING:
    import torch

    from atma.config import Recipe
    from atma.plan import Costs, Option, Pace, Plan


@dataclass(frozen=True)
class Where:
    """What it is to be trained on."""

    gpus: int = 1
    """Devices, each with one process."""
    device: str = "cpu"
    """A device of the table, such as h100, h200, a100-80, l40s or mi300x; cpu: this machine, which is measured."""
    mfu: float | None = None
    """Share of the device's peak that the model's products reach; what was measured on an H100 by default."""
    threads: int = 0
    """Processor threads of each process that measures this machine; as training has them by default."""


def run(
    recipe: Path,
    /,
    where: Annotated[Where, tyro.conf.OmitArgPrefixes] = Where(),
    assignments: Annotated[tuple[str, ...], ASSIGNMENTS] = (),
    most: int = 8,
    output: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Tell what a training costs before it: parameters, memory, speed, hours, communication, and which mesh fits.

    Nothing is trained. Work and memory are counted on single layers; speed is of a device's data sheet at an assumed
    utilisation, or, with --device cpu, of pieces of the training that are measured here. Every assumption is printed.
    A mesh is data × context × shard: ranks with rows of their own, ranks that share rows, and ranks that share weights.

    Args:
        recipe: A shipped recipe by its name, such as nano, or a TOML file.
        where: What it is to be trained on.
        assignments: Change settings of the recipe, such as train.length=1048576 train.batch_tokens=4194304.
        most: Meshes to show.
        output: Write everything as rows to this JSON file.
    """
    from atma.plan import HERE, costs_of, plan, rows
    from atma.train.start import load_run_recipe

    if most < 1:
        raise ValueError(f"--most {most}: at least 1")
    _check(where)
    chosen = load_run_recipe(recipe, assignments)
    costs = costs_of(chosen, _compute(chosen, where), "auto" if where.device == HERE else "cpu")
    made = plan(costs, where.gpus, _pace(costs, where))
    if output is not None:
        output.write_text(json.dumps(rows(made), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _show(made, most)
    context = made.best.mesh.context
    if context > 1:
        print(f"equal work for the ranks of a context: --set 'train.context_shares={costs.shares(context)}'")
    if made.best.checkpointing:
        print("the fastest that fits computes activations again (checkpointing)")


def _check(where: Where) -> None:
    from atma.plan import HERE, device_named

    if where.gpus < 1:
        raise ValueError(f"--gpus {where.gpus}: at least 1")
    if where.mfu is not None and not 0 < where.mfu <= 1:
        raise ValueError(f"--mfu {where.mfu:g}: a share of the peak, above 0 and at most 1")
    if where.device != HERE:
        device_named(where.device)
    elif where.mfu is not None:
        raise ValueError(f"--mfu {where.mfu:g}: this machine is measured; name a --device besides")


def _compute(recipe: "Recipe", where: Where) -> "torch.dtype":
    import torch

    from atma.plan import HERE
    from atma.train.precision import choose_precision

    if where.device == HERE:
        return choose_precision(recipe.train.precision, torch.device("cpu"), recipe.model.width)
    return torch.float32 if recipe.train.precision == "float32" else torch.bfloat16


def _pace(costs: "Costs", where: Where) -> "Pace":
    from atma.plan import ASSUMED_MFU, HERE, Sheet, device_named, measured, meshes

    meshes(costs.recipe.train, where.gpus)  # before minutes are spent on measuring
    if where.device == HERE:
        return measured(costs, where.gpus, threads=where.threads)
    return Sheet(costs, device_named(where.device), ASSUMED_MFU if where.mfu is None else where.mfu)


def _show(made: "Plan", most: int) -> None:
    costs, recipe = made.costs, made.costs.recipe
    size, train = costs.size, recipe.train
    parts = [[part, f"{n:,}", f"{n / size.total:.1%}"] for part, n in size.parameters.items()]
    print_table(f"{recipe.name}: {count_text(size.total)} parameters", ["part", "numbers", "share"], parts)
    products = costs.products(train.length)
    whole = sum(products.values())
    work = [[part, f"{n:,.0f}", f"{n / whole:.1%}"] for part, n in products.items()]
    print_table(f"multiply-adds of a token, forward, in rows of {train.length:,}", ["part", "number", "share"], work)
    _show_overtaking(costs)
    best = made.options[0]
    memory = [[part, bytes_text(n)] for part, n in best.held.parts.items() if n]
    held = [*memory, [f"most at one time ({best.held.when})", bytes_text(best.held.peak)]]
    if best.held.host:
        held.append(["of the parts, in the processor's memory (offload)", bytes_text(best.held.host)])
    print_table(f"memory of a rank, {_named(best)}", ["part", "bytes"], held)
    for message in best.sent:
        print(f"sent by a rank in a step: {message.what}, {bytes_text(message.bytes)}")
    _show_meshes(made, most)
    print("assumed:")
    for text in made.assumptions:
        print(f"- {text}")


def _show_overtaking(costs: "Costs") -> None:
    length = costs.overtakes()
    told = f"from rows of {length:,} tokens on" if length is not None else "at no length"
    print(f"attention is more work than all dense products {told}")


def _named(one: "Option") -> str:
    return f"mesh {one.mesh}" + (", checkpointing" if one.checkpointing else "")


def _show_meshes(made: "Plan", most: int) -> None:
    recipe = made.costs.recipe
    head = ["mesh", "checkpointing", "memory", "fits", "tokens/s", "hours", "computing", "update", "communication"]
    rows = [
        [
            str(one.mesh),
            "yes" if one.checkpointing else "no",
            bytes_text(one.held.peak),
            "yes" if one.fits else f"{bytes_text(one.held.peak - made.pace.room)} short",
            f"{one.tokens_per_second(recipe):,.0f}",
            f"{one.hours(recipe):,.3g}",
            *(f"{part / one.seconds:.0%}" for part in (one.compute, one.update, one.communication)),
        ]
        for one in made.options[:most]
    ]
    steps, each = recipe.train.steps, recipe.train.batch_tokens
    caption = f"{steps:,} steps of {each:,} tokens; {bytes_text(made.pace.room)} a rank; {len(made.options)} in all"
    print_table(f"meshes of {made.gpus} ranks, data × context × shard", head, rows, caption)
