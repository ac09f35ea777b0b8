"""A plan: every mesh with its memory, speed and communication, the fastest that fits first."""

from typing import Any, NamedTuple

from atma.config import Recipe
from atma.display import bytes_text
from atma.mixers.stretches_prefix import composes
from atma.plan.costs import Costs
from atma.plan.memory import Held, held
from atma.plan.meshes import Mesh, Sent, meshes, sent
from atma.plan.paces import Pace

HOUR = 3600


class Option(NamedTuple):
    """One way to place the training."""

    mesh: Mesh
    checkpointing: bool
    held: Held
    sent: list[Sent]
    compute: float
    """Seconds of a step in forward and backward passes."""
    update: float
    communication: float
    seconds: float
    """Of a step, nothing of it hidden behind anything else."""
    fits: bool

    def tokens_per_second(self, recipe: Recipe) -> float:
        return recipe.train.batch_tokens / self.seconds

    def hours(self, recipe: Recipe) -> float:
        return recipe.train.steps * self.seconds / HOUR


class Plan(NamedTuple):
    """Of one recipe on so many devices."""

    costs: Costs
    gpus: int
    pace: Pace
    options: list[Option]
    """Those that fit first, the fastest first; of equals the plainest."""
    assumptions: list[str]

    @property
    def best(self) -> Option:
        """The fastest that fits. ValueError: none does; what is short of it by how much."""
        if self.options[0].fits:
            return self.options[0]
        raise ValueError(short(self))


def plan(costs: Costs, gpus: int, pace: Pace) -> Plan:
    """Every mesh of `gpus` ranks. ValueError: no number of ranks, or the batch divides over no mesh."""
    ways = [(mesh, again) for mesh in meshes(costs.recipe.train, gpus) for again in (False, True)]
    options = [_option(costs, mesh, again, pace) for mesh, again in ways]
    options.sort(key=lambda one: (not one.fits, one.seconds if one.fits else one.held.peak))
    return Plan(costs, gpus, pace, options, _assumptions(costs, pace))


def _option(costs: Costs, mesh: Mesh, checkpointing: bool, pace: Pace) -> Option:
    train = costs.recipe.train
    tokens = train.batch_tokens / mesh.ranks
    compute = _waiting(costs, mesh) * pace.compute(tokens, train.length, checkpointing)
    update = pace.update(1 / mesh.ranks)
    messages = sent(costs, mesh, checkpointing)
    communication = sum(pace.send(one) for one in messages)
    memory = held(costs, mesh, checkpointing, pace.program, pace.apart)
    seconds = compute + update + communication
    fits = memory.peak <= pace.room
    return Option(mesh, checkpointing, memory, messages, compute, update, communication, seconds, fits)


def _waiting(costs: Costs, mesh: Mesh) -> float:
    """Turns of a layer for each of them: a stretch of a row begins one after the stretch before it, unless composed."""
    layers = costs.recipe.model.depth
    alone = composes(layers, mesh.context) and all(one.composes for one in costs.layers.values())
    return 1.0 if alone else (layers + mesh.context - 1) / layers


def short(plan: Plan) -> str:
    """What is said where nothing fits: the mesh that is nearest to it, what it lacks, and the largest part of that."""
    least = min(plan.options, key=lambda one: one.held.peak)
    parts = {name: size for name, size in least.held.parts.items() if size}
    largest = max(parts, key=lambda name: parts[name])
    train, lacking = plan.costs.recipe.train, least.held.peak - plan.pace.room
    rows = least.mesh.rows(train)
    mend = (
        f"--set train.accumulation={2 * train.accumulation}" if rows > 1 else "more --gpus, or a shorter train.length"
    )
    return (
        f"nothing fits: mesh {least.mesh} (data × context × shard) with checkpointing needs "
        f"{bytes_text(least.held.peak)} a rank of {bytes_text(plan.pace.room)}, {bytes_text(lacking)} short; "
        f"most of it is {largest}, {bytes_text(parts[largest])}; try {mend}"
    )


def _assumptions(costs: Costs, pace: Pace) -> list[str]:
    compute = str(costs.compute).removeprefix("torch.")
    return [
        *pace.assumptions(),
        f"a pass computes in {compute}; weights, gradients and optimiser states are float32; the backward pass has "
        "twice the products of the forward pass, and checkpointing one more of the layers "
        f"({_again(costs)})",
        "every rank moves an equal part of the parameters, and keeps the optimisers' state of that part alone, and of "
        "sharded weights the whole of it; sharded matrices travel in the type of their products, the rest in float32",
        "activations are what autograd keeps on a CPU, counted at 128 to 512 tokens; blocked operations are taken to "
        "keep the same on every device",
        "communication is on a ring, whole and not hidden behind computing, without latency; a context's states go "
        "from rank to rank, so that L layers on N ranks take L + N - 1 turns of one, or of recurrences and "
        "convolutions alone, at most 2 layers for each rank after the first, L; its ranks have equal work, as "
        "with train.context_shares, and the memory of equal stretches",
        "reading data, validation and checkpoints are left out; from the first checkpoint on the first process, or of "
        "sharded weights each process of its part, also keeps a copy of all that is saved in the CPU's memory",
        *(["blocks are not compiled, as if train.compile were false"] if costs.recipe.train.compile else []),
        *(["activations are those of training every weight; adapters keep less"] if costs.recipe.lora else []),
    ]


def _again(costs: Costs) -> str:
    every = costs.recipe.train.checkpointing_every
    return "of all of them" if every == 1 else f"of one in {every}, train.checkpointing_every"


def rows(plan: Plan) -> list[dict[str, Any]]:
    """Everything as plain rows: the recipe, parameters, products by part, every mesh, and what is assumed."""
    costs, train = plan.costs, plan.costs.recipe.train
    whole = {"kind": "recipe", "name": costs.recipe.name, "gpus": plan.gpus, "length": train.length}
    whole |= {"batch_tokens": train.batch_tokens, "tokens": train.tokens, "steps": train.steps}
    whole |= {"parameters": costs.size.total, "trained": costs.size.trained, "room": plan.pace.room}
    found = [whole | {"overtakes": costs.overtakes()}]
    found += [{"kind": "parameters", "part": part, "count": n} for part, n in costs.size.parameters.items()]
    products = costs.products(train.length)
    found += [{"kind": "products", "part": part, "multiply_adds": n} for part, n in products.items()]
    found += [_option_row(plan, one) for one in plan.options]
    return [*found, *({"kind": "assumption", "text": text} for text in plan.assumptions)]


def _option_row(plan: Plan, one: Option) -> dict[str, Any]:
    recipe = plan.costs.recipe
    return {
        "kind": "mesh",
        "data": one.mesh.data,
        "context": one.mesh.context,
        "shard": one.mesh.shard,
        "context_shares": plan.costs.shares(one.mesh.context),
        "checkpointing": one.checkpointing,
        "fits": one.fits,
        "memory": one.held.parts,
        "peak": one.held.peak,
        "when": one.held.when,
        "host": one.held.host,
        "seconds": {"compute": one.compute, "update": one.update, "communication": one.communication},
        "tokens_per_second": one.tokens_per_second(recipe),
        "hours": one.hours(recipe),
        "gpu_hours": one.hours(recipe) * plan.gpus,
        "sent": {message.what: message.bytes for message in one.sent},
    }
