"""The trackers themselves, each a few lines over its own package, which is imported when a run is to be followed.

Where each writes is decided by its own environment variables; the project is called `atma` unless they say otherwise.
"""

import html
import importlib.util
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

from atma.train.trackers import Start, Tracker

PROJECT = "atma"
MOST_TEXT = 6000
"""Characters of a setting that MLflow keeps."""


def open_tensorboard(start: Start) -> tuple[Tracker, str]:
    """Event files in tensorboard/ of the run folder: `tensorboard --logdir runs` shows all runs."""
    _require("tensorboard")
    return TensorBoard(start), "tensorboard"


def open_wandb(start: Start) -> tuple[Tracker, str]:
    """Weights & Biases; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE are its own."""
    _require("wandb")
    called = start.known or uuid.uuid4().hex[:12]
    return WeightsAndBiases(start, called), called


def open_mlflow(start: Start) -> tuple[Tracker, str]:
    """MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are its own."""
    _require("mlflow")
    tracker = MLflow(start)
    return tracker, tracker.called


def open_trackio(start: Start) -> tuple[Tracker, str]:
    """trackio; TRACKIO_PROJECT names its project, TRACKIO_SPACE_ID is its own."""
    _require("trackio")
    return Trackio(start), start.known or start.name


class TensorBoard:
    """Live scalars, the settings as hyperparameters, and texts."""

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        again = start.done + 1 if start.known else None
        self._writer = SummaryWriter(str(start.folder / "tensorboard"), purge_step=again, flush_secs=10)
        for summary in hparams(start.settings, {"validation/loss": 0.0}):
            self._writer._get_file_writer().add_summary(summary)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_text(name, indented, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Scalars over a step of our own, so that a run that goes on may tell a step again."""

    def __init__(self, start: Start, called: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        online = os.environ.get("WANDB_MODE", "online") in ("online", "shared")
        if online and not wandb.api.api_key:
            raise ValueError("not logged in: `wandb login`, or WANDB_MODE=offline")
        settings = wandb.Settings(console="off", silent=True, init_timeout=60)
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._html = wandb.Html
        self._run: Any = wandb.init(
            project=project,
            id=called,
            name=start.name,
            dir=str(start.folder),
            config=dict(start.settings),
            resume="allow",
            reinit="create_new",
            allow_val_change=True,
            settings=settings,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: self._html(f"<pre>{html.escape(text)}</pre>"), "step": step})

    def flush(self) -> None:
        """It sends by itself."""

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of an experiment, by its client, which is bound to no thread."""

    def __init__(self, start: Start) -> None:
        from mlflow.entities import Metric, Param, RunStatus  # pyright: ignore[reportMissingImports]
        from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

        if "MLFLOW_TRACKING_URI" not in os.environ and importlib.util.find_spec("sqlalchemy") is None:
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # its database needs a package that mlflow-skinny leaves out
            self._client = MlflowClient("file:mlruns")
        else:
            self._client = MlflowClient()
        self._metric, self._status = Metric, RunStatus
        self.called = start.known or self._begin(start)
        self._client.update_run(self.called, status="RUNNING")
        if start.known is None:
            params = [Param(key, str(value)[:MOST_TEXT]) for key, value in start.settings.items()]
            for first in range(0, len(params), 100):
                self._client.log_batch(self.called, params=params[first : first + 100])

    def _begin(self, start: Start) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        return self._client.create_run(experiment, run_name=start.name).info.run_id

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self.called, metrics=metrics)

    def text(self, name: str, text: str, step: int) -> None:
        plain = "".join(one if one.isalnum() else "-" for one in name.partition("/")[2])[:40]
        self._client.log_text(self.called, text, f"samples/{step:08d}-{plain}.txt")

    def flush(self) -> None:
        """It sends at once."""

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.called, "FINISHED" if finished else "KILLED")


class Trackio:
    """Scalars and texts of a run of a project."""

    def __init__(self, start: Start) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=start.known or start.name,
            config=dict(start.settings),
            resume="never" if start.known is None else "allow",
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: text}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self, finished: bool) -> None:
        self._run.finish()


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"not installed (pip install 'atma-lm[{package}]')")
