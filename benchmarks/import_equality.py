"""How exactly imported checkpoints compute what transformers computes: the table of docs/checkpoints.md.

    PYTHONPATH=. python benchmarks/import_equality.py

Random models of every form of tests/layouts/checkpoints.py; the largest difference of a logit, in float32 and in
float64 (transformers' own float32 parts lifted, tests/layouts/in_double.py), read whole, in pieces, token by token.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from atma.layouts import import_checkpoint
from tests.layouts.checkpoints import FORMS, checkpoint
from tests.layouts.in_double import doubled
from tests.layouts.test_checkpoints import TOKENS, read

CUTS = ([40], [13, 26, 1], [1] * 40)


@torch.no_grad()
def row(form: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        theirs = checkpoint(Path(folder) / "theirs", form)
        ours = import_checkpoint(Path(folder) / "theirs", Path(folder) / "ours").eval()
    wanted = theirs(TOKENS).logits
    single = [(read(ours, TOKENS, cuts) - wanted).abs().max().item() for cuts in CUTS]
    exact = doubled(theirs, TOKENS)
    double = [(read(ours.double(), TOKENS, cuts) - exact).abs().max().item() for cuts in CUTS]
    return f"| {form} | " + " | ".join(f"{x:.0e}" for x in single + double) + " |"


def main() -> None:
    print("| | float32 whole | pieces | steps | float64 whole | pieces | steps |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for form in FORMS:
        print(row(form), flush=True)


if __name__ == "__main__":
    main()
