"""A short model given length by each way, on three seeds: what `docs/extending.md` tells, part by part.

    python benchmarks/extending.py --data data/stdlib --out runs/extending --teachers nano-rope-canon SEED1 SEED2

Each way extends each teacher with at most a tenth of its training tokens; losses on fixed targets and teacher-forced
needles are then measured at 1, 4, 16 and 64 times the training length, beside the teacher as it is, interpolated and
with YaRN. What is there already is passed over, so that it goes on after any stop. `rows.jsonl` has a row for each
model and length.
"""

import argparse
import json
from pathlib import Path

import torch

from atma.bars import bars
from atma.config import DataConfig, EvaluationConfig, Recipe, TrainConfig, from_dict
from atma.data.dataset import TokenSet
from atma.eval.lengths import evaluate
from atma.eval.rope import Stretch
from atma.extend.measuring import Row, cells, cost
from atma.extend.run import Extension, extend, own_training, rates_of, recipe_for
from atma.extend.settings import ExtendConfig
from atma.loading import Loaded, load
from atma.model import Model
from atma.train import terminal_progress

WAYS = {
    "polar": (ExtendConfig(way="polar"), {}),
    "window-memory": (ExtendConfig(way="window-memory", memory="poly_delta"), {}),
    "linear": (ExtendConfig(way="linear"), {}),
}
"""By name, the settings, and what differs in [train]."""
CONTROLS = ("none", "window", "linear", "yarn")
"""The teacher as it is, with a window of its training length, with positions interpolated, and with YaRN."""
TOKENS = 600_000
LENGTHS = (256, 1024, 4096, 16_384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teachers", nargs="+", default=["nano-rope-canon"], help="one for each seed, in order")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--controls", nargs="*", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--needle-tokens", type=int, default=None, help="the most to read for needles at one length")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for way in options.ways:
        for seed, name in enumerate(options.teachers):
            after = extended(options, way, seed, load(name))
            keep(options, way, seed, load(after), None, cost(after.parent, TRAINED[after]))
    for kind in options.controls:
        for seed, name in enumerate(options.teachers):
            teacher = load(name)
            length = own_training(teacher)["train"]["length"]
            stretch = Stretch(kind, length) if kind in ("linear", "yarn") else None
            keep(
                options,
                f"teacher, {kind}",
                seed,
                windowed(teacher, length) if kind == "window" else teacher,
                stretch,
                {},
            )


def windowed(loaded: Loaded, window: int) -> Loaded:
    """The same weights with a window in every layer that can have one: what a model does without any training."""
    model = Model(loaded.model.config.changed({"window": window}))
    model.load_state_dict(loaded.model.state_dict())
    return loaded._replace(model=model.eval())


TRAINED: dict[Path, Recipe] = {}


def extended(options: argparse.Namespace, way: str, seed: int, teacher: Loaded) -> Path:
    """The final model of a way on a teacher, trained now unless it is there."""
    settings, changes = WAYS[way]
    own, out = own_training(teacher), options.out / f"{way}-{seed}"
    sizes = {"length": own["train"]["length"], "batch_tokens": own["train"]["batch_tokens"], "tokens": TOKENS}
    shape = {"seed": seed, "constant_share": 0.5, "evaluate_every": 50, "checkpoint_every": 50}
    train = from_dict(TrainConfig, sizes | shape | rates_of(teacher, settings.rate) | changes)
    data = DataConfig(path=str(options.data), recall_share=own["data"]["recall_share"])
    recipe = recipe_for(teacher, settings, data, train, f"{way}-{seed}")
    TRAINED[out / "final"] = recipe
    if not (out / "final").is_dir():
        extend(Extension(teacher, recipe, settings), out, (out / "recipe.toml").is_file(), terminal_progress())
    return out / "final"


def keep(options: argparse.Namespace, name: str, seed: int, loaded: Loaded, stretch: Stretch | None, paid: Row) -> None:
    """Measure a model at every length, and add what is new to rows.jsonl."""
    path = options.out / "rows.jsonl"
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    texts = TokenSet.open(options.data, "validation")
    plan = EvaluationConfig(
        tuple(options.lengths),
        documents=8,
        needle_trials=options.trials,
        needle_tokens=options.needle_tokens,
        junk=False,
    )
    with bars() as progress:
        rows = evaluate(
            loaded, texts, plan, progress, options.out / f"{name.replace(', ', '-')}.jsonl", stretch=stretch
        )
    for cell in cells(rows):
        row = {"model": name, "seed": seed, **cell._asdict(), **paid}
        if row not in known:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
