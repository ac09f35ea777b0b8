"""Tokens to induction: training tokens until a repeated random span is predicted, per mixer and seed.

Each sequence is `--span` random tokens, repeated once; the loss and the accuracy are of the second half alone. The
model is small (width 64, one global layer of four), so that three seeds of six variants fit an hour of one core.
Variants are mixers as `atma compare` names them. Prints a line per run as it ends and a table of medians, of the best
accuracies too; `--out` keeps every measurement as JSON lines.

    python benchmarks/tokens_to_induction.py --seeds 0 1 2 --out induction.jsonl
    python benchmarks/tokens_to_induction.py --span 128 --rows 4 --tokens 300000 --variants poly_delta kda,start=recall
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch

from atma.config import ModelConfig, TrainConfig, from_dict, to_dict
from atma.eval.recall.mixers import mixer
from atma.model import Model
from atma.train.optim import Optimisers
from atma.train.schedule import rate_multiplier

GOALS = (0.5, 0.9)


def sequences(rows: int, span: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, 2·span) random tokens, the second half a copy of the first."""
    half = torch.randint(0, vocabulary, (rows, span), generator=generator)
    return torch.cat([half, half], 1)


@torch.no_grad()
def accuracy(model: Model, tokens: torch.Tensor, span: int) -> float:
    """Share of the second half predicted exactly, the first token of it left out."""
    hidden, _ = model(tokens[:, :-1])
    return float((model.logits(hidden[:, span:]).argmax(-1) == tokens[:, span + 1 :]).float().mean())


def run(config: ModelConfig, train: TrainConfig, span: int, every: int) -> dict:
    """Train until the last goal or the last token; tokens at which each goal was first met, or None."""
    generator = torch.Generator().manual_seed(train.seed)
    held_out = torch.Generator().manual_seed(1_000_003)
    model = Model(config, generator)
    optimisers = Optimisers(model, train)
    probe = sequences(64, span, config.vocab_size, held_out)
    reached: dict[float, int] = {}
    curve, began = [], time.perf_counter()
    for step in range(train.steps):
        tokens = sequences(train.batch_tokens // (2 * span), span, config.vocab_size, generator)
        hidden, _ = model(tokens[:, :-1])
        loss = model.loss(hidden[:, span:], tokens[:, span + 1 :]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimisers.step(rate_multiplier(step, train))
        if (step + 1) % every == 0:
            found = accuracy(model, probe, span)
            curve.append(((step + 1) * train.batch_tokens, round(found, 4), round(loss.item(), 4)))
            for goal in GOALS:
                if found >= goal:
                    reached.setdefault(goal, (step + 1) * train.batch_tokens)
            if found >= GOALS[-1]:
                break
    seconds = time.perf_counter() - began
    tokens = {f"tokens_to_{goal:.0%}": reached.get(goal) for goal in GOALS}
    return tokens | {"best": max(point[1] for point in curve), "seconds": round(seconds, 1), "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[f"{core}{memory}" for core in ("polar", "nope", "rope") for memory in ("+memory", "")],
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--span", type=int, default=48)
    parser.add_argument("--rows", type=int, default=32, help="sequences of a step")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--every", type=int, default=20, help="steps between measurements")
    parser.add_argument("--model", default="{}", help="JSON of ModelConfig fields to change")
    parser.add_argument("--train", default="{}", help="JSON of TrainConfig fields to change")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = ModelConfig(vocab_size=64, width=64, depth=4, query_heads=2, key_value_heads=1, head_width=32)
    length = 2 * options.span
    rates = TrainConfig(length=length, batch_tokens=options.rows * length, tokens=options.tokens, constant_share=1.0)
    table: dict[str, list[dict]] = {}
    for seed in options.seeds:
        for variant in options.variants:
            config = mixer(variant, base.changed(json.loads(options.model)))
            train = from_dict(TrainConfig, to_dict(dataclasses.replace(rates, seed=seed)) | json.loads(options.train))
            row = {"variant": variant, "seed": seed} | run(config, train, options.span, options.every)
            table.setdefault(variant, []).append(row)
            print({key: value for key, value in row.items() if key != "curve"}, flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row | {"model": to_dict(config), "train": to_dict(train)}) + "\n")
    print(
        f"\n{'variant':40} "
        + " ".join(f"{f'median to {goal:.0%}':>16}" for goal in GOALS)
        + f"{'best':>8}  (never: beyond the budget)"
    )
    for variant, found in table.items():
        cells = []
        for goal in GOALS:
            values = [row[f"tokens_to_{goal:.0%}"] or float("inf") for row in found]
            middle = statistics.median(values)
            cells.append(f"{'never' if middle == float('inf') else f'{middle:,.0f}':>16}")
        best = statistics.median(row["best"] for row in found)
        print(f"{variant:40} " + " ".join(cells) + f"{best:8.1%}")


if __name__ == "__main__":
    main()
