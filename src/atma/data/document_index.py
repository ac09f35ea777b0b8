"""The index beside a token shard: where its documents begin."""

import re
from pathlib import Path

import numpy as np

INDEX_HEAD = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '<i8', 'fortran_order': False, 'shape': \(([0-9]{1,12}),\), \} *\n", re.DOTALL
)
"""How a document index begins. NumPy's own reader takes it for Python source, and ends as that may when damaged."""


def read_index(path: Path, tokens: int) -> np.ndarray:
    """Starts of documents (documents,) int64 in a shard of so many tokens. ValueError: missing or damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such document index") from None
    head = INDEX_HEAD.match(data)
    if head is None or len(data) - head.end() != 8 * int(head[1]):
        raise ValueError(f"{path}: not a document index, or a damaged one")
    index = np.frombuffer(data, np.dtype("<i8"), offset=head.end())
    if len(index) == 0 or index[0] != 0 or index[-1] >= tokens or np.any(np.diff(index) <= 0):
        raise ValueError(f"{path}: damaged: document starts must rise from 0 and stay below {tokens:,}")
    return index
