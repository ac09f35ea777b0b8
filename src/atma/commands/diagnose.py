"""`atma diagnose`: why a model fails at length, in plain words, with the measurements behind them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from atma.bars import bars
from atma.commands.machine import Machine
from atma.commands.suite import check_page, command_line, print_table
from atma.diagnose.plan import Plan

if TYPE_CHECKING:
    from atma.data.prepare import Progress
    from atma.eval.likelihood.prefixes import Documents
    from atma.loading import Loaded

Row = dict[str, Any]


def run(
    model: str = "nano",
    /,
    data: Path | None = None,
    text: Path | None = None,
    plan: Annotated[Plan, tyro.conf.OmitArgPrefixes] = Plan(),  # noqa: B008
    page: Path = Path("runs/diagnose.html"),
    out: Path | None = None,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = Machine(),  # noqa: B008
) -> None:
    """Find out why a model fails at length, or that it does not.

    Reads documents with the model as it is, looking at every channel, layer and head; then with parts taken away, with
    memory heads capped, and with disturbed blocks. Nothing of the model is changed for good. Prints what is found, and
    writes a page with the pictures.

    Args:
        model: A packaged model (see `atma info`), a model folder or a run folder; hf: and a folder or a name for a
            model of transformers, of which --sinks alone can be told.
        data: A folder made by `atma prepare` with the model's own tokenizer; its validation split is read. Default: the
            data that the model was trained on if they are here, else the held-out files of the standard library.
        text: A plain text file to read in place of the data, cut into documents of the longest length.
        plan: What to measure.
        page: The HTML page to write.
        out: Keep the rows in this .jsonl file; what it already holds of the same measurement is not run again.
        dtype: Precision of the weights.
        machine: Where to compute.
    """
    from atma.diagnose.diagnosis import diagnose
    from atma.diagnose.page import page as write
    from atma.diagnose.page import sentences
    from atma.eval.results import read_rows, write_rows

    check_page(page)
    if model.startswith("hf:"):
        _theirs(model[3:], (data, text), plan, (page, out), dtype, machine)
        return
    loaded = _loaded(model, dtype, machine, plan.select)
    with bars() as progress:
        documents = _documents(loaded, data, text, plan, progress)
        found = diagnose(loaded, documents, plan, out, progress)
    for number, sentence in enumerate(sentences(found.rows, found.findings), 1):
        print(f"{number}. {sentence}")
    _tables(found.rows)
    _more_tables(found.rows)
    if out is not None:
        told = [one.row() for one in found.findings]
        derived = [row for row in found.rows if row["kind"] == "effect"]
        write_rows(out, [row for row in read_rows(out) if "key" in row] + derived + told)
        print(f"rows: {out}")
    print(f"page: {write(page, loaded.name, found.rows, found.findings, command_line())}")


def _loaded(model: str, dtype: str, machine: Machine, select: str | None) -> "Loaded":
    import torch

    from atma.loading import load

    machine.take()
    loaded = load(model, select=select)
    loaded.model.to(machine.of(loaded.model), getattr(torch, dtype))
    return loaded


def _theirs(
    name: str,
    texts: tuple[Path | None, Path | None],
    plan: Plan,
    written: tuple[Path, Path | None],
    dtype: str,
    machine: Machine,
) -> None:
    """What there is to tell of a model of transformers."""
    import torch

    from atma.diagnose.page import page as write
    from atma.diagnose.page import sentences
    from atma.diagnose.theirs import Theirs, diagnose_theirs
    from atma.eval import hugging_face

    if not plan.sinks:
        raise ValueError(f"hf:{name}: of a model of transformers secondary sinks alone can be told; add --sinks")
    asked = {"interpolate": plan.interpolate, "choose-heads": plan.choose_heads, "scale": plan.scale}
    asked["select"] = plan.select is not None
    asked["paths"] = plan.paths != "none"
    for option, given in asked.items():
        if given:
            raise ValueError(f"hf:{name}: --{option} is for models of this library; leave it out")
    model = hugging_face.load(name, getattr(torch, dtype), str(machine.take()))
    with bars() as progress:
        documents = _documents(Theirs(Path(name), model.tokenizer, {}), *texts, plan, progress)
        rows = diagnose_theirs(model, documents, plan, written[1], progress)
    for number, sentence in enumerate(sentences(rows, []), 1):
        print(f"{number}. {sentence}")
    _more_tables(rows)
    if written[1] is not None:
        print(f"rows: {written[1]}")
    print(f"page: {write(written[0], model.name, rows, [], command_line())}")


def _documents(loaded: Any, data: Path | None, text: Path | None, plan: Plan, progress: "Progress") -> "Documents":
    from atma.diagnose.texts import documents_of_text
    from atma.eval.held_out import open_text
    from atma.eval.likelihood.prefixes import choose_documents
    from atma.eval.loaded import tokenizer_of

    tokenizer, extent = tokenizer_of(loaded), plan.extent
    if text is not None:
        try:
            words = text.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{text}: not UTF-8 text; name a plain text file") from None
        return documents_of_text(tokenizer, words, extent.lengths[-1], extent.documents)
    token_set = open_text(loaded, data, progress)
    return choose_documents(token_set, tokenizer.eot, extent.lengths[-1], extent.documents, plan.seed, joined=True)


def _tables(rows: list[Row]) -> None:
    lengths = sorted({row["length"] for row in rows if row["kind"] == "loss"})
    heads = [f"{length:,}" for length in lengths]
    caption = "in brackets the share of record digits told, its 95% interval, and of how many"
    print_table("Loss, nats a token", ["", *heads], _losses(rows, lengths), caption)
    effects = {(row["change"], row["length"]): row for row in rows if row["kind"] == "effect"}
    cells = [
        [name, *(_effect(effects[name, n]) for n in lengths)] for name in dict.fromkeys(name for name, _ in effects)
    ]
    if cells:
        caption = "nats with the change less nats without; intervals are 95% for all changes together"
        print_table("What each change does to the loss", ["", *heads], cells, caption)
    held = [row for row in rows if row["kind"] == "retention"]
    if held:
        head = ["head", "zero input", "1%", "10%", "50%", "90%", "99%"]
        print_table("Half-lives of the memory's heads, tokens", head, [_half_lives(row) for row in held])
    channels = [row for row in rows if row["kind"] == "channel" and row["length"] in (lengths[0], lengths[-1])]
    names = {"n_eff": "n_eff", "null_mass": "null", "first_mass": "first", "sink_mass": "sink", "copy_score": "copy"}
    names |= {"magnitude": "μ", "memory_norm": "‖M‖", "surprise": "surprise", "write_strength": "write"}
    names |= {"weight_drift": "drift"}
    names = {key: told for key, told in names.items() if any(key in row for row in channels)}
    cells = [
        [f"{r['layer']}.{r['head']} at {r['length']:,}", *(_figure(r.get(key)) for key in names)] for r in channels
    ]
    if cells:
        print_table("What each head does", ["head", *names.values()], cells)


def _more_tables(rows: list[Row]) -> None:
    """Of the heads that were chosen, and of secondary sinks."""
    chosen = [row for row in rows if row["kind"] == "choice" and row["step"]]
    if chosen:
        cells = [[row["head"], f"{row['loss']:.3f}", f"{row['change']:+.3f}", _others(row)] for row in chosen]
        caption = "each with those before it; the last column is of the documents that did not choose"
        print_table("Heads chosen, loss in nats a token", ["head", "loss", "change", "others"], cells, caption)
    levels = [row for row in rows if row["kind"] == "sink level"]
    if levels:
        cells = [[str(row[key]) for key in LEVEL] for row in levels[:MOST_LEVELS]]
        caption = "tokens whose state lies within 0.9 in cosine of the first token's; the commonest levels"
        print_table("Sinks like the first token", [key.replace("_", " ") for key in LEVEL], cells, caption)


LEVEL = ("first_layer", "lifetime", "count", "texts", "called")
MOST_LEVELS = 12


def _others(row: Row) -> str:
    if row["rest_change"] is None:
        return "–"
    span = "" if row["rest_low"] is None else f" [{row['rest_low']:+.3f}, {row['rest_high']:+.3f}]"
    return f"{row['rest_change']:+.3f}{span}"


def _losses(rows: list[Row], lengths: list[int]) -> list[list[str]]:
    found = {(row["kind"], row["change"], row["length"]): row for row in rows if row["kind"] in ("loss", "recall")}
    return [
        [change, *(f"{found['loss', change, n]['loss']:.3f} ({_share(found['recall', change, n])})" for n in lengths)]
        for change in dict.fromkeys(change for _, change, _ in found)
    ]


def _share(row: Row) -> str:
    from atma.eval.retrieval.needles import VALUE_TOKENS
    from atma.statistics import share_text

    return share_text(row, "token_accuracy", "token_", row["trials"] * VALUE_TOKENS)


def _effect(row: Row) -> str:
    if row["loss_low"] is None:
        return f"{row['loss']:+.3f}"
    return f"{row['loss']:+.3f} [{row['loss_low']:+.3f}, {row['loss_high']:+.3f}]"


def _half_lives(row: Row) -> list[str]:
    keys = ("half_life", "half_life_p01", "half_life_p10", "half_life_p50", "half_life_p90", "half_life_p99")
    return [f"{row['layer']}.{row['head']}", *("endless" if row[key] is None else f"{row[key]:,.4g}" for key in keys)]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
