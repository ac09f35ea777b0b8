"""`measure`: does a model hold at length? Losses and needles by length in one call, for Python and notebooks.

The measurements are those of `atma eval lengths` and `atma eval retrieval`, made by the same code.
"""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from atma.config import EvaluationConfig
from atma.eval.language_model import LanguageModel, OwnModel
from atma.eval.measured import Measured
from atma.eval.results_table import Part, Results
from atma.eval.retrieval.suite import Retrieval
from atma.strict import as_list, whole_numbers

if TYPE_CHECKING:
    from atma.data.dataset import TokenSet
    from atma.eval.held_out import Progress
    from atma.loading import Loaded
    from atma.tokenizer import Tokenizer
    from atma.train.python import TrainingRun


class _Text(NamedTuple):
    """What choosing a text asks of a model."""

    tokenizer: "Tokenizer"
    path: Path | None
    info: dict[str, Any]


def measure(
    model: "str | Path | Loaded | Measured | TrainingRun" = "nano",
    lengths: int | Sequence[int] = (256, 1024, 4096),
    *,
    documents: int = 8,
    trials: int = 8,
    depths: int | Sequence[int] = (10, 50, 90),
    tasks: str | Sequence[str] = ("niah",),
    data: str | Path | None = None,
    out: str | Path | None = None,
) -> "Results":
    """Losses and needles of a model at each of the context lengths, in tokens.

        results = measure("nano", lengths=[256, 4096])

    model: a packaged name, a model folder, a run folder, `hf:` and a folder or name of transformers, what `load` or
    `train_model` gave, or a `Measured`, which also says type, device and rotary scaling. documents: texts for the
    losses, 0 for none. trials: needles, the same at each length and depth, 0 for none. depths: percent of the text
    before a needle. tasks: as of `atma eval retrieval`; the texts around needles are its natural ones. data: a folder
    of `atma prepare` with the model's own tokenizer, as of `atma eval lengths`. out: keep the rows in this .jsonl file;
    what it holds of the same measurement is not made again.
    A bar shows the progress in a notebook or terminal. ValueError, before anything is measured, for what cannot be.
    """
    from atma.bars import bars

    losses, needles = _plans(lengths, documents, trials, depths, tasks)
    source = None if data is None else Path(data)
    with bars() as progress:
        subject = _model(model)
        rows: list[dict[str, Any]] = []
        if losses is not None:
            from atma.eval.lengths import evaluate_model

            text = text_of(subject, source, progress)
            rows += evaluate_model(subject, text, losses, progress, out)
        if needles is not None:
            from atma.eval.suite import run

            rows += run(needles, subject, out, progress)
    return Results([Part(_label(subject), rows, trained_of(subject))])


def _plans(
    lengths: int | Sequence[int],
    documents: int,
    trials: int,
    depths: int | Sequence[int],
    tasks: str | Sequence[str],
) -> tuple[EvaluationConfig | None, Retrieval | None]:
    """What is measured, checked. ValueError: nothing, or an argument out of bounds."""
    for name, count in (("documents", documents), ("trials", trials)):
        if not isinstance(count, Integral) or count < 0:
            raise ValueError(f"'{name}' must be 0 or more, not {count!r}")
    documents, trials = int(documents), int(trials)
    if documents == trials == 0:
        raise ValueError("nothing to measure: 'documents' and 'trials' are both 0; raise one of them")
    every, at, names = _numbers("lengths", lengths), _numbers("depths", depths), _names(tasks)
    losses = None
    if documents:
        targets = min(EvaluationConfig.target_tokens, *every) if every else 1
        losses = EvaluationConfig(every, documents, targets, needle_trials=0, junk=False)
    if not trials:
        return losses, None
    for name, chosen in (("lengths", every), ("depths", at), ("tasks", names)):
        if not chosen:
            raise ValueError(f"'{name}' must be one or more, not {chosen!r}")
    return losses, Retrieval(tasks=names, haystacks=("natural",), lengths=every, depths=at, per_cell=trials)


def _numbers(name: str, given: int | Sequence[int]) -> tuple[int, ...]:
    """One or several. ValueError: they are no whole numbers."""
    every = whole_numbers([given] if isinstance(given, Integral) else given)
    if every is None:
        raise ValueError(f"'{name}' must be a whole number or a list of them, not {given!r}")
    return tuple(every)


def _names(tasks: str | Sequence[str]) -> tuple[str, ...]:
    """One or several. ValueError: they are no texts."""
    every = [tasks] if isinstance(tasks, str) else as_list(tasks)
    if every is None or not all(isinstance(one, str) for one in every):
        raise ValueError(f"'tasks' must be a task's name or a list of them, not {tasks!r}")
    return tuple(every)


def _model(model: "str | Path | Loaded | Measured | TrainingRun") -> LanguageModel:
    if isinstance(model, Measured):
        return model.load()
    if isinstance(model, str | Path):
        return Measured(str(model)).load()
    loaded = getattr(model, "loaded", model)
    if not hasattr(loaded, "tokenizer") or not hasattr(loaded, "model"):
        kinds = "a name or folder, what atma.load or atma.train_model gave, or a Measured"
        raise ValueError(f"'model' must be {kinds}, not a {type(model).__name__}")
    return OwnModel(cast("Loaded", loaded))


def text_of(model: LanguageModel, data: Path | None, progress: "Progress | None" = None) -> "TokenSet":
    """What losses are measured on: as `open_text`, for any language model."""
    from atma.eval.held_out import open_text

    loaded = getattr(model, "loaded", None)
    return open_text(_Text(model.tokenizer, getattr(loaded, "path", None), getattr(loaded, "info", {})), data, progress)


def _label(model: LanguageModel) -> str:
    """Its folder's name; of a run that of the run."""
    path = getattr(getattr(model, "loaded", None), "path", None)
    return path.parent.name if path is not None and path.name == "final" and path.parent.name else model.name


def trained_of(model: LanguageModel) -> int | None:
    """The training length of one of ours, in tokens; None where nobody says it."""
    from atma.eval.rope import trained_length

    loaded = getattr(model, "loaded", None)
    return None if not hasattr(loaded, "info") else trained_length(loaded)
