"""`atma narrow`: a model folder whose large weights are in 8 or 4 bits."""

from pathlib import Path
from typing import Literal


def run(model: str, out: Path, /, weights: Literal["int8", "int4"] = "int8") -> None:
    """Write a model with its large weights in 8 or 4 bits, a quarter or an eighth of their bytes.

    The folder is used like any other, on the CPU; `atma serve MODEL --weights int8` reads the floats of MODEL so
    without one. It cannot be trained as it is: training begins from the floats that its numbers stand for.

    Args:
        model: A packaged model (see `atma info`), a model folder, a run folder or a folder of adapters.
        out: The model folder to write.
        weights: int8, or int4, whose embedding and head are in int8.
    """
    from atma.checkpoint import model_files, require_replaceable
    from atma.folders import text_writer, write_folder
    from atma.loading import load
    from atma.narrow import narrow_bytes, narrow_layers, numbers_in
    from atma.talk import talk_of

    require_replaceable(out)
    loaded = load(model, weights=weights)
    talk = {name: text_writer(text) for name, text in talk_of(loaded.base).items()}
    write_folder(out, model_files(loaded.model, loaded.tokenizer, loaded.info.get("extra", {})) | talk)
    whole, layers = numbers_in(loaded.model), len(narrow_layers(loaded.model))
    print(f"narrowed: {out} ({layers} layers in {weights}, {narrow_bytes(loaded.model):,} bytes; {whole:,} parameters)")
