"""What zeroing the local mixers' input projections costs: validation loss at equal tokens, three seeds.

The published training script zeroes every parameter whose name contains "proj", the convolution's input projection
included; both ends of a local mixer are then zero, its gradient is zero for ever, and it never learns. Both sides run
in turn, seed by seed, on the same batches.

    python benchmarks/zero_input_projections.py --data data/stdlib --tokens 500000
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

from atma.config import DataConfig, Recipe, TrainConfig, preset
from atma.train import read_record, train


def validation_loss(recipe: Recipe) -> float:
    """Final validation loss, nats per token."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(recipe, run)
        return [row["loss"] for row in read_record(run) if row["kind"] == "validation"][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/stdlib")
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    losses: dict[bool, list[float]] = {True: [], False: []}
    for seed in options.seeds:
        for zeroed in (True, False):
            model = dataclasses.replace(preset("nano"), depth=options.depth, zero_input_projections=zeroed)
            rates = TrainConfig(batch_tokens=4096, tokens=options.tokens, seed=seed, checkpoint_every=10**6)
            recipe = Recipe("zeroed" if zeroed else "ours", model, DataConfig(path=options.data), rates)
            losses[zeroed].append(validation_loss(recipe))
            print(f"seed {seed} {recipe.name:6} {losses[zeroed][-1]:.4f} nats/token", flush=True)
    difference = [a - b for a, b in zip(losses[True], losses[False], strict=True)]
    print(
        f"zeroed − ours: mean {statistics.mean(difference):+.4f}, range {min(difference):+.4f} … {max(difference):+.4f}"
    )


if __name__ == "__main__":
    main()
