"""`atma prepare`: from text to token shards."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from atma.commands.bars import bars
from atma.data.prepare import Preparation, prepare
from atma.loading import packaged


def run(
    source: str,
    /,
    out: Path | None = None,
    preparation: Annotated[Preparation, tyro.conf.OmitArgPrefixes] = Preparation(),  # noqa: B008
) -> None:
    """Turn text into token shards for training and evaluation.

    "stdlib" is the standard library of the Python that runs this. hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT is a
    data set of the Hugging Face hub.

    Args:
        source: A text, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file or a folder of these, or stdlib, or hf:NAME.
        out: The folder to write; data/ and the source's name by default.
        preparation: How to prepare it. The tokenizer may also be a packaged model's name, for data to evaluate it on.
    """
    folder = out or Path("data") / (Path(source).name.split(":")[-1].split(".")[0] or "text")
    known = packaged()
    if preparation.tokenizer in known:
        preparation = dataclasses.replace(preparation, tokenizer=str(known[preparation.tokenizer]))
    with bars() as progress:
        manifest = prepare(source, folder, preparation, progress)
    print(f"prepared: {folder} from {manifest['source']}, {manifest['tokenizer']['name']} tokenizer")
    for name, split in manifest["splits"].items():
        print(f"  {name:10}  {split['tokens']:,} tokens of {split['documents']:,} documents")
    if manifest["skipped"]:
        print("  left out    " + ", ".join(f"{count:,} {reason}" for reason, count in manifest["skipped"].items()))
