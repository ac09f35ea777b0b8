"""Checkpoints of transformers in and out: the same numbers, as a model of the table of mixers, and back bit for bit.

`import_checkpoint` writes a model folder that has everything ours have; config.json keeps the checkpoint's own under
"extra", by which `export_checkpoint` writes the original layout again.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atma.checkpoint import load_config, load_info, model_files, require_replaceable
from atma.config import ModelConfig
from atma.folders import Writer, json_writer, write_folder
from atma.layers import without_init
from atma.layouts.architectures import Layout, layout_of
from atma.layouts.kinds import ARCHITECTURES
from atma.layouts.reading import Checkpoint, read_checkpoint
from atma.model import Model
from atma.talk import TALK
from atma.tokenizer import Tokenizer, load_tokenizer
from atma.tokenizer_file import beginning_of
from atma.weights import INDEX, WEIGHTS, TensorWriter, load_weights

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NOTES = {"format": "pt"}
"""What transformers writes into the head of its files of tensors."""
KEY = "transformers"
"""Where config.json keeps what an export needs, within "extra"."""


def import_checkpoint(
    source: str | Path, out: str | Path, tokenizer: str | Path | None = None, end: str | None = None
) -> Model:
    """Write the model folder `out` of the transformers checkpoint in the folder `source`; returns the model.

    Weights keep their type. `tokenizer` is a tokenizer.json, by default the one in `source` if it has one; `end` names
    its end-of-text token where no file does. ValueError says what we do not have, or what does not fit.
    """
    source, out = Path(source), Path(out)
    if out.resolve() == source.resolve():
        raise ValueError(f"{out}: is the source; name a new folder")
    require_replaceable(out)
    checkpoint = read_checkpoint(source)
    try:
        layout = layout_of(checkpoint.config)
        model = model_of(layout, checkpoint.tensors)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    words = _tokenizer(source, tokenizer, end, model.config.vocab_size)
    extra = {KEY: _remembered(checkpoint)}
    own = Path(tokenizer) if tokenizer else source / "tokenizer.json"
    beside: dict[str, Writer] = {} if words is None else {"tokenizer.json": _copier(own)}
    beside |= {name: _copier(source / name) for name in TALK if words is not None and (source / name).is_file()}
    write_folder(out, model_files(model, words, extra) | beside)
    return model


def model_of(layout: Layout, tensors: Mapping[str, Tensor]) -> Model:
    """The model of a layout, with these tensors of the checkpoint as they are. ValueError: they are not its own."""
    config = ModelConfig.from_table(layout.model)
    wanted = {name for part in layout.parts for name in part.theirs}
    found = set(tensors)
    if config.tied_head and HEAD in found:
        if not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
            raise ValueError(f"'{HEAD}' is not '{EMBEDDING}', but config.json says that they are tied")
        found.discard(HEAD)
    for what, names in (("missing", wanted - found), ("unexpected", found - wanted)):
        if names:
            raise ValueError(f"tensor '{min(names)}' is {what} ({len(names)} in all): not the weights of config.json")
    with without_init():
        model = Model(config)
    own = {name: value.shape for name, value in model.state_dict().items()}
    ours: dict[str, Tensor] = {}
    for part in layout.parts:
        for name, tensor in part.taken(tensors).items():
            if tensor.shape != own[name]:
                given, asked = tuple(tensor.shape), tuple(own[name])
                raise ValueError(f"tensor '{part.theirs[0]}' makes {given} of '{name}', but config.json says {asked}")
            ours[name] = tensor
    if config.tied_head:
        ours["head.weight"] = ours["embed.weight"]
    model.load_state_dict(ours, assign=True)
    if config.tied_head:
        model.head.weight = model.embed.weight
    return model


def export_checkpoint(folder: str | Path, out: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the imported model in `folder` as the transformers checkpoint it came from, into the new folder `out`.

    Weights that were not changed are the same bits. dtype: of the weights; that of the checkpoint by default.
    ValueError: the model was not imported so, or has become another one.
    """
    folder, out = Path(folder), Path(out)
    remembered = load_info(folder).get("extra", {}).get(KEY)
    if not isinstance(remembered, dict):
        raise ValueError(f"{folder}: not imported from transformers; its own folder is what transformers loads")
    if out.exists():
        raise ValueError(f"{out}: is there already; name a new folder")
    layout = layout_of(remembered["config"])
    _check_unchanged(folder, ModelConfig.from_table(layout.model))
    ours = load_weights(folder)
    names = [name for some in remembered["files"].values() for name in some]
    types = {name: dtype or getattr(torch, remembered["dtypes"].get(name, remembered["dtype"])) for name in names}
    theirs = {name: x for part in layout.parts for name, x in part.given(ours).items()}
    if HEAD in names and HEAD not in theirs:
        theirs[HEAD] = theirs[EMBEDDING].clone()
    theirs = {name: x.to(types[name]) for name, x in theirs.items()}
    config = dict(remembered["config"])
    if dtype is not None:
        config = {name: value for name, value in config.items() if name not in ("torch_dtype", "dtype")}
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    beside = {name: _copier(folder / name) for name in (*TALK, "tokenizer.json") if (folder / name).is_file()}
    write_folder(out, {"config.json": json_writer(config), **_weights(theirs, remembered["files"]), **beside})


def _check_unchanged(folder: Path, was: ModelConfig) -> None:
    """ValueError: the model in a folder is no longer what the checkpoint's layout can hold."""
    before, now = was.to_table(), load_config(folder).to_table()
    changed = [name for name in now if now[name] != before.get(name)]
    if changed:
        raise ValueError(
            f"{folder}: '{changed[0]}' is no longer as it was imported, and the original layout cannot say what it is; "
            "load the folder itself, with atma or, once atma.integrations.transformers is imported, with transformers"
        )


def _weights(tensors: Mapping[str, Tensor], files: Mapping[str, list[str]]) -> dict[str, Writer]:
    """Writers of the files that the checkpoint had, and of their index."""
    if set(files) == {WEIGHTS}:
        return {WEIGHTS: TensorWriter(tensors, NOTES)}
    written = {file: TensorWriter({name: tensors[name] for name in names}, NOTES) for file, names in files.items()}
    total = sum(x.numel() * x.element_size() for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {n: file for file, names in files.items() for n in names}}
    return {**written, INDEX: json_writer(index)}


def _remembered(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an export needs: the configuration, the type of most tensors and of the others, and each one's file."""
    types = {name: str(x.dtype).removeprefix("torch.") for name, x in checkpoint.tensors.items()}
    usual = max(set(types.values()), key=list(types.values()).count)
    files: dict[str, list[str]] = {}
    for name, file in checkpoint.files.items():
        files.setdefault(file, []).append(name)
    others = {name: one for name, one in types.items() if one != usual}
    return {
        "config": checkpoint.config,
        "dtype": usual,
        "dtypes": others,
        "files": files,
    }


def _tokenizer(source: Path, tokenizer: str | Path | None, end: str | None, vocabulary: int) -> Tokenizer | None:
    """The tokenizer that goes with the model. ValueError: it has a token beyond the vocabulary."""
    path = Path(tokenizer) if tokenizer else source / "tokenizer.json"
    if not tokenizer and not path.exists():
        return None
    read = load_tokenizer(path, end)
    begun = beginning_of(read.backend)
    words = Tokenizer(read.backend, read.eot, begun[0] if begun else None, begun)
    if words.vocab_size > vocabulary:
        raise ValueError(
            f"{path}: token {words.vocab_size - 1} is beyond the model's vocabulary of {vocabulary}; give the "
            "tokenizer that belongs to it with --tokenizer"
        )
    return words


def _copier(path: Path) -> Writer:
    return lambda to: shutil.copyfile(path, to)


__all__ = ["ARCHITECTURES", "export_checkpoint", "import_checkpoint", "layout_of", "model_of"]
