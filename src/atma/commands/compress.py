"""`atma compress`: a model folder whose caches hold fewer numbers a key."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from atma.commands.machine import Machine

if TYPE_CHECKING:
    from atma.model import Model


def run(
    model: Path,
    out: Path,
    /,
    texts: str,
    tolerance: float = 0.01,
    tokens: int = 65_536,
    length: int = 2048,
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = Machine(),  # noqa: B008
) -> None:
    """Narrow the keys that a trained model caches to the directions that matter on texts like these.

    Args:
        model: A packaged model (see `atma info`), a model folder or a run folder.
        out: The model folder to write.
        texts: Texts to calibrate on, as `atma prepare` takes them.
        tolerance: The share of what the scores vary by that may be lost, for each layer and head.
        tokens: How many tokens of the texts are read.
        length: The most tokens that are read in one piece.
        machine: Where to compute.
    """
    from atma.checkpoint import require_replaceable, save_model
    from atma.compress import compress, moments
    from atma.loading import load_floats

    if min(tokens, length) < 2:
        raise ValueError(f"tokens and length must be at least 2, not {tokens} and {length}")
    require_replaceable(out)
    where, (source, tokenizer, _, info) = machine.take(), load_floats(model)
    source.to(where)
    if tokenizer is None:
        raise ValueError(f"{model}: no tokenizer.json in it, so no texts can be read")
    pieces = _pieces(texts, tokenizer.encode, tokens, length)
    made, kept = compress(source, moments(source, pieces), tolerance)
    told = {"tolerance": tolerance, "texts": texts, "tokens": sum(map(len, pieces))}
    save_model(out, made, tokenizer, {**info.get("extra", {}), "compressed": told})
    for layer, one in kept.items():
        heads = ", ".join(map(str, one.ranks))
        print(f"layer {layer}: {one.rank} of {one.basis.shape[-1]} numbers a key (by head {heads})")
    print(f"compressed: {out}, {_bytes(made)} bytes a token of cache in place of {_bytes(source)}")
    print(f"nats a token on these texts: {_loss(source, pieces):.4f} before, {_loss(made, pieces):.4f} after")


def _pieces(texts: str, encode: Callable[[str], list[int]], tokens: int, length: int) -> list[list[int]]:
    """So many tokens of the texts, in pieces of at most `length`, each within one text."""
    from atma.data.sources import documents

    pieces: list[list[int]] = []
    for document in documents(texts):
        read = encode(document.text)[:tokens]
        pieces += [piece for i in range(0, len(read), length) if len(piece := read[i : i + length]) > 1]
        tokens -= len(read)
        if tokens < 2:
            break
    return pieces


def _bytes(model: "Model") -> int:
    """What a token adds to a state."""
    from atma.state import nbytes

    return nbytes(model.init_state(1, 2)) - nbytes(model.init_state(1, 1))


def _loss(model: "Model", pieces: Sequence[Sequence[int]]) -> float:
    """Mean nats a token."""
    import torch

    with torch.inference_mode():
        device = model.embed.weight.device
        rows = [torch.tensor(piece, device=device)[None] for piece in pieces]
        return float(torch.cat([model.loss(model(row[:, :-1])[0], row[:, 1:])[0] for row in rows]).mean())
