"""Heads chosen one after the other by what moving their maps to the identity does to the loss at a length.

HeadHunter (arXiv 2506.10978, there for images): given calibration texts, try every head beside those already chosen,
keep the best, and go on. What is best on some texts is partly their luck, so half of them choose and the others, which
had no say, tell what the chosen heads do.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atma.diagnose.effects import estimate
from atma.diagnose.interpolation import interpolated, movable_heads
from atma.diagnose.parts import Head
from atma.diagnose.plan import Plan
from atma.diagnose.texts import Laid
from atma.eval.stream import Advance, Streaming, score
from atma.model import Model
from atma.report.content import size_text

Row = dict[str, Any]


def passes(plan: Plan, model: Model, texts: int) -> int:
    """How often one text is read, at most, in all."""
    heads, calibration = len(movable_heads(model)), -(-texts // 2)
    rounds = min(plan.choose_heads, heads)
    tried = sum(heads - i for i in range(rounds))
    return texts + calibration * tried + (texts - calibration) * rounds


def choose(model: Model, texts: Sequence[Laid], plan: Plan, chunk: int, advance: Advance) -> list[Row]:
    """One row a head chosen, in their order: the losses that each candidate would have left, and what it left."""
    length, half = plan.extent.lengths[-1], -(-len(texts) // 2)
    tokens = torch.stack([text.tokens[: length + 1] for text in texts])

    def losses(part: Tensor) -> list[float]:
        found = score(model, part, length // 2, Streaming(chunk), advance)
        return found.double().mean(1).tolist()

    before = {"calibration": losses(tokens[:half]), "rest": losses(tokens[half:]) if len(texts) > half else []}
    chosen: list[Head] = []
    rows: list[Row] = []
    last = _mean(before["calibration"])
    while len(chosen) < plan.choose_heads and (free := [head for head in movable_heads(model) if head not in chosen]):
        tried = {}
        for head in free:
            with interpolated(model, [*chosen, head], plan.choose_strength):
                tried[head] = losses(tokens[:half])
        best = min(free, key=lambda head: _worth(_mean(tried[head]) - last, plan.choose_by))
        if plan.choose_by == "help" and _mean(tried[best]) >= last:
            break
        chosen.append(best)
        with interpolated(model, chosen, plan.choose_strength):
            rest = losses(tokens[half:]) if before["rest"] else []
        rows.append(_row(plan, chosen, {head: _mean(values) for head, values in tried.items()}, before, rest))
        last = _mean(tried[best])
    return rows or [{"kind": "choice", "step": 0, "by": plan.choose_by, "length": length, "loss_before": last}]


def told(rows: Sequence[Row]) -> list[str]:
    """The order of the chosen heads in a sentence; nothing where none were to be chosen."""
    chosen = [row for row in rows if row["kind"] == "choice"]
    if not chosen:
        return []
    last = chosen[-1]
    if last["step"] == 0:
        return [f"Of no head does moving the map to the identity lower the loss at {size_text(last['length'])} tokens."]
    names = ", ".join(f"{row['head']} ({row['change']:+.2f})" for row in chosen)
    aim = "changes the loss most" if last["by"] == "change" else "lowers the loss most"
    text = f"Heads, one after the other, of which moving the map by {last['strength']:g} to the identity {aim} at "
    text += f"{size_text(last['length'])} tokens, with nats a token since none was moved: {names}"
    if last["rest_low"] is None:
        return [text + "."]
    span = f"[{last['rest_low']:+.2f}, {last['rest_high']:+.2f}]"
    return [f"{text}; on the texts that had no say, all of them together {last['rest_change']:+.2f} {span}."]


def _worth(change: float, by: str) -> float:
    """What the best head has least of."""
    return -abs(change) if by == "change" else change


def _row(
    plan: Plan, chosen: list[Head], tried: dict[Head, float], before: dict[str, list[float]], rest: list[float]
) -> Row:
    head, base = chosen[-1], _mean(before["calibration"])
    row: Row = {"kind": "choice", "step": len(chosen), "head": str(head), "chosen": list(map(str, chosen))}
    row |= {"by": plan.choose_by, "strength": plan.choose_strength, "length": plan.extent.lengths[-1]}
    row |= {"loss": tried[head], "loss_before": base, "change": tried[head] - base}
    row |= {"tried": {str(one): loss for one, loss in tried.items()}, "documents": len(before["calibration"])}
    row |= {"rest_change": None, "rest_low": None, "rest_high": None, "rest_documents": len(rest)}
    if rest:
        found = estimate([after - old for after, old in zip(rest, before["rest"], strict=True)])
        row |= {"rest_change": found.value, "rest_low": found.low, "rest_high": found.high}
    return row


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


__all__ = ["choose", "passes", "told"]
