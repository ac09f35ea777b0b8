"""`atma prepare`: from text to token shards."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from atma.bars import bars
from atma.data.prepare import Preparation, prepare
from atma.data.summary import lines
from atma.loading import packaged


def run(
    source: str,
    /,
    out: Path | None = None,
    preparation: Annotated[Preparation, tyro.conf.OmitArgPrefixes] = Preparation(),  # noqa: B008
    workers: int = 0,
    restart: bool = False,
) -> None:
    """Turn text into token shards for training and evaluation.

    "stdlib" is the standard library of the Python that runs this. hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT is a
    data set of the Hugging Face hub.

    Args:
        source: A file of text, JSON lines, JSON, CSV or parquet, compressed or not, a folder of these, or stdlib, or
            hf:NAME. docs/data.md tells more.
        out: The folder to write; data/ and the source's name by default.
        preparation: How to prepare it. The tokenizer may also be a packaged model's name, for data to evaluate it on.
        workers: Processes that tokenise, which changes no byte: 0 for one a core, 1 for no more than this.
        restart: Begin anew, whatever an interrupted preparation of this folder left.
    """
    folder = out or Path("data") / (Path(source).name.split(":")[-1].split(".")[0] or "text")
    known = packaged()
    if preparation.tokenizer in known:
        preparation = dataclasses.replace(preparation, tokenizer=str(known[preparation.tokenizer]))
    elif preparation.tokenizer != "bpe" and preparation.vocab_size != Preparation.vocab_size:
        raise ValueError(f"--vocab-size {preparation.vocab_size} is for --tokenizer bpe, not {preparation.tokenizer}")
    with bars() as progress:
        manifest = prepare(source, folder, preparation, progress, workers=workers, restart=restart, say=print)
    print(f"prepared: {folder} from {manifest['source']}, {manifest['tokenizer']['name']} tokenizer")
    for line in lines(manifest):
        print(f"  {line}")
