"""`atma import`: from a published checkpoint to a model folder."""

from pathlib import Path

PREFIX = "hf:"


def run(
    source: str,
    out: Path,
    /,
    tokenizer: Path | None = None,
    end_of_text: str | None = None,
) -> None:
    """Convert a checkpoint of transformers, or a published one of ATMA, into a model folder.

    Of transformers: Llama, Mistral, Qwen2, Qwen3, Qwen3.5, SmolLM3, OLMo 2 and 3, Gemma 3 and LFM2, of text alone. The
    model computes what it computed before, and `atma export` writes it in its own layout again.

    Args:
        source: A folder with config.json and the weights, as hf:FOLDER for one of transformers.
        out: The model folder to write.
        tokenizer: A tokenizer.json to put beside the model; the one in SOURCE by default.
        end_of_text: The token of it that ends a text, where neither it nor the files beside it say so.
    """
    folder = Path(source.removeprefix(PREFIX))
    if source.startswith(PREFIX):
        from atma.layouts import import_checkpoint

        if not folder.is_dir():
            name = source.removeprefix(PREFIX)
            raise ValueError(
                f"{source}: no folder '{name}' here; download it first: hf download {name} --local-dir DIR"
            )
        model = import_checkpoint(folder, out, tokenizer, end_of_text)
    else:
        from atma.importer import import_model

        model = import_model(folder, out, tokenizer, end_of_text)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kinds = ", ".join(dict.fromkeys(model.config.layers))
    print(f"imported: {out} ({kinds}; {model.config.depth} layers, {parameters:,} parameters)")
    if not (out / "tokenizer.json").exists():
        print(f"no tokenizer came with it: put the tokenizer.json it was trained with into {out}")
