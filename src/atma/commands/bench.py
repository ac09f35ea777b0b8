"""`atma bench`: operations and models beside their peers and the machine's floor."""

import json
from pathlib import Path
from typing import Annotated

import tyro

from atma.bench.plan import Plan


def run(
    kind: str,
    /,
    plan: Annotated[Plan, tyro.conf.OmitArgPrefixes] = Plan(),  # noqa: B008
    out: Path = Path("runs/bench"),
) -> None:
    """Time ours and its peers in turn, with the floor that this machine sets; refuses if a result is wrong.

    KIND is ops (the operations beside PyTorch's and Hugging Face's), train (a whole optimiser step), decode (the next
    token at a context) or prefill (reading a prompt). The peers of the last three are LFM2 and Qwen3-Next of the
    package transformers (pip install 'atma-lm[bench]') at our size. Prints a table and writes bench.json and
    roofline.html.

    Args:
        kind: ops, train, decode or prefill.
        plan: What to measure.
        out: The folder for bench.json and roofline.html.
    """
    from atma.bench.measure import bench
    from atma.bench.roofline import write
    from atma.bench.table import show

    if plan.weights and kind not in ("decode", "prefill"):
        raise ValueError(f"--weights is for decode and prefill, not for {kind}: narrow weights are only read")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    result = bench(kind, plan)
    out.mkdir(parents=True, exist_ok=True)
    page = write(result, out / "roofline.html")
    text = json.dumps(result.as_dict(), indent=1, allow_nan=False)
    (out / "bench.json").write_text(text + "\n", encoding="utf-8")
    show(result)
    print(f"written: {out / 'bench.json'}, {page}")
