"""`atma export`: an imported model in the layout of its checkpoint again."""

from pathlib import Path
from typing import Literal


def run(model: Path, out: Path, /, dtype: Literal["float32", "bfloat16", "float16"] | None = None) -> None:
    """Write an imported model in the layout that it came in, for transformers and whatever else reads it.

    Weights that nobody changed are the same to the last bit; a fine-tuned model has its own, in the checkpoint's type.

    Args:
        model: A model folder that `atma import hf:FOLDER` wrote, or a run trained from one.
        out: The folder to write; it must not be there yet.
        dtype: The type of the weights; that of the checkpoint by default.
    """
    import torch

    from atma.layouts import export_checkpoint
    from atma.loading import model_folder

    folder = model_folder(model)
    export_checkpoint(folder, out, None if dtype is None else getattr(torch, dtype))
    print(f"exported: {out}")
