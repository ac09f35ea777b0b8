"""What the processes of one run agree on, and what becomes of them when one is lost or hangs.

A problem of one of them at the start ends all, and the first says what it is. Later a process that is gone closes its
connections, and one that hangs does not come to the next step in time: the others then end, each with one line.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from atma.config import Recipe, identity
from atma.hashes import code_hash
from atma.train.parallel import Ranks, where

MOST = 2000
"""Letters of a problem's text as processes tell it to each other."""


class ToldByFirst(ValueError):
    """A problem that the first process tells: this one ends in silence."""

    silent = True


@contextmanager
def agreeing(ranks: Ranks, group: Any = None) -> Iterator[None]:
    """What is done inside is done by all processes: if it is refused in any, it is in all, and the first says why.

    group: by which they speak, if not that of all that trains.
    """
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = error
    if ranks.world == 1 or not dist.is_initialized():
        if problem is not None:
            raise problem
        return
    told = texts(ranks, "" if problem is None else str(problem)[:MOST] or type(problem).__name__, group)
    found = next((rank for rank, text in enumerate(told) if text), None)
    if found is None:
        return
    if ranks.rank != 0:
        raise ToldByFirst(told[found])
    raise problem or ValueError(f"process {found}: {told[found]}")


def require_same_run(ranks: Ranks, recipe: Recipe, data: str) -> None:
    """ValueError, told by the first, unless all processes have one recipe, code, data (by hash) and PyTorch."""
    if ranks.world == 1:
        return
    told = {"recipe": identity(recipe), "code": code_hash(), "data": data, "PyTorch": torch.__version__}
    for what, text in told.items():
        all_of_them = texts(ranks, text)
        first, other = all_of_them[0], next((n for n, found in enumerate(all_of_them) if found != all_of_them[0]), None)
        if other is not None:
            words = f"process {other} has another {what} than process 0 ({all_of_them[other][:16]}, not {first[:16]})"
            raise (ToldByFirst if ranks.rank else ValueError)(f"{words}: start all of them with the same")


def texts(ranks: Ranks, text: str, group: Any = None) -> list[str]:
    """What each process tells, in their order. group: as of `agreeing`."""
    place = where(group)
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=place)
    sizes = [torch.empty(1, dtype=torch.int64, device=place) for _ in range(ranks.world)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=place), group)
    most = int(torch.cat(sizes).max())
    found = [torch.empty(most, dtype=torch.uint8, device=place) for _ in range(ranks.world)]
    dist.all_gather(found, torch.cat([data, data.new_zeros(most - len(data))]), group)
    told = zip(found, sizes, strict=True)
    return [bytes(one[: int(size)].tolist()).decode(errors="replace") for one, size in told]


@contextmanager
def answering(ranks: Ranks, seconds: float, step: Callable[[], int]) -> Iterator[None]:
    """Inside, a process that is lost, or that does not answer for so many seconds, is a ValueError of one line."""
    if ranks.world == 1:
        yield
        return
    try:
        yield
    except RuntimeError as error:
        cause = _cause(str(error), seconds)
        if cause is None:
            raise
        raise ValueError(f"process {ranks.rank}, step {step()}: {cause}; go on with --resume") from error


def _cause(text: str, seconds: float) -> str | None:
    """What an error of torch.distributed means, in words; None for any other."""
    first = text.splitlines()[0] if text else ""
    who = first.partition(": ")[0] if first.startswith("process ") else "another process"
    if "monitoredBarrier" in text:
        named = re.search(r"Ranks? ([\d, ]+) failed", text)
        return f"process {named[1].strip() if named else 0} did not answer for {seconds:g} s"
    if any(word in text for word in ("Timed out", "timed out", "timeout")):
        return f"{who} did not answer for {seconds:g} s"
    lost = (
        "Connection closed",
        "Connection reset",
        "Connection was",
        "Broken pipe",
        "Socket closed",
        "NCCL communicator",
    )
    return f"{who} was lost" if any(word in text for word in lost) else None


__all__ = ["ToldByFirst", "agreeing", "answering", "require_same_run", "texts"]
