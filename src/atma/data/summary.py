"""What `atma prepare` made, in a few lines: documents, tokens, lengths, and what is not in it."""

from typing import Any

import numpy as np

LENGTHS = tuple(2**power for power in range(10, 25))
SHOWN = 5


def long_documents(lengths: np.ndarray) -> dict[str, int]:
    """How many of the documents, given their tokens (n,), reach each power of two from 1,024 on, while any does."""
    counts = {str(length): int((lengths >= length).sum()) for length in LENGTHS}
    return {length: count for length, count in counts.items() if count}


def lines(manifest: dict[str, Any]) -> list[str]:
    """The lines that tell what a manifest describes."""
    told = []
    for name, split in manifest["splits"].items():
        if "answers" in split:
            kind, longest = "conversations", f"longest {split['longest_document']:,}"
            share = f"{split['answers']:,} ({100 * split['answers'] / split['tokens']:.0f}%) of answers"
            told.append(f"{name:10}  {split['tokens']:,} tokens of {split['documents']:,} {kind}; {share}; {longest}")
            continue
        texts = split["tokens"] - split["documents"]
        each = f"{split['bytes'] / texts:.2f} bytes a token" if texts else "no text"
        longest = f"longest {split['longest_document']:,}"
        told.append(f"{name:10}  {split['tokens']:,} tokens of {split['documents']:,} documents; {each}; {longest}")
    told += [] if "conversations" in manifest else [_long(manifest["splits"].get("validation"))]
    if manifest["skipped"]:
        told.append("left out    " + ", ".join(f"{count:,} {why}" for why, count in manifest["skipped"].items()))
    if manifest["passed_over"]:
        names = [entry["file"] for entry in manifest["passed_over"]]
        more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
        told.append(f"files       {', '.join(names[:SHOWN])}{more} passed over; manifest.json says why")
    if lost := manifest["lost_characters"]:
        some = ", ".join(f"{character!r} {count:,}" for character, count in list(lost.items())[:SHOWN])
        told.append(f"lost        {sum(lost.values()):,} characters that the tokenizer has no token for: {some}")
    return told


def _long(validation: dict[str, Any] | None) -> str:
    if validation is None:
        return "evaluation  no validation split to evaluate on"
    if not validation["long_documents"]:
        return "evaluation  no validation document reaches 1,024 tokens"
    counts = ", ".join(f"{count:,} of {int(length):,}" for length, count in validation["long_documents"].items())
    return f"evaluation  validation documents of at least so many tokens: {counts}"
