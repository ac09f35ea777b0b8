"""`atma merge`: a model and adapters trained on it, as one model folder."""

from pathlib import Path


def run(base: str, adapters: Path, out: Path, /) -> None:
    """Add adapters to the weights of the model they were trained on.

    The result is an ordinary model folder. The adapters say by a hash which model they belong to; another is refused.

    Args:
        base: A packaged model, a model folder or a run.
        adapters: A folder of adapters: adapters/ of a run, or one of its checkpoints.
        out: The model folder to write.
    """
    from atma.checkpoint import load_info, load_model, model_files, require_replaceable
    from atma.folders import text_writer, write_folder
    from atma.loading import model_folder
    from atma.lora import adapter_record, load_adapters, merge
    from atma.talk import talk_of

    require_replaceable(out)
    folder, record = model_folder(base), adapter_record(adapters)
    model, tokenizer = load_model(folder)
    attached = load_adapters(model, adapters)
    merge(model)
    extra = {**load_info(folder).get("extra", {}), "merged": {"adapters": record["lora"], **record.get("extra", {})}}
    talk = {name: text_writer(text) for name, text in talk_of(folder).items()}
    write_folder(out, model_files(model, tokenizer, extra) | talk)
    print(
        f"merged: {out} ({len(attached.adapted)} adapted layers, {len(attached.trained)} parameters trained themselves)"
    )
