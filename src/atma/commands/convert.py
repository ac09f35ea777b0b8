"""`atma import`: from a published checkpoint to a model folder."""

from pathlib import Path


def run(
    source: Path,
    out: Path,
    /,
    tokenizer: Path | None = None,
    end_of_text: str | None = None,
) -> None:
    """Convert a published ATMA checkpoint into a model folder.

    Args:
        source: A folder with config.json and weights.pt (or model.safetensors) as published.
        out: The model folder to write.
        tokenizer: A tokenizer.json to put beside the model; the one in SOURCE by default.
        end_of_text: The token of it that ends a text, where neither it nor the files beside it say so.
    """
    from atma.importer import import_model

    model = import_model(source, out, tokenizer, end_of_text)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"imported: {out} ({model.config.core}, {model.config.depth} layers, {parameters:,} parameters)")
    if not (out / "tokenizer.json").exists():
        print(f"no tokenizer came with it: put the tokenizer.json it was trained with into {out}")
