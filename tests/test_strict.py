"""Settings made in Python are held to their annotations as those of a file are."""

import math
from pathlib import Path

import numpy as np
import pytest

from atma.bench.plan import Plan as BenchPlan
from atma.config import DataConfig, EvaluationConfig, ModelConfig, Recipe, TrainConfig
from atma.data.prepare import Preparation
from atma.diagnose.plan import Plan as DiagnosisPlan
from atma.eval.likelihood.suite import Likelihood
from atma.eval.measured import Measured
from atma.eval.reasoning.suite import Reasoning
from atma.eval.recall.suite import Recall
from atma.eval.recall.tasks import Copying
from atma.eval.retrieval.suite import Retrieval
from atma.serve.http.options import ServerOptions
from atma.serve.settings import EngineConfig
from atma.settings import Settings
from atma.sweep.recipe import SweepConfig


@pytest.mark.parametrize(
    ("kind", "field", "value", "told"),
    [
        (ModelConfig, "core", "polarr", "no core 'polarr'; did you mean 'polar'?"),
        (ModelConfig, "memory", "no", "no memory 'no'; did you mean"),
        (ModelConfig, "memory", 1, "must be of type bool, not 1"),
        (ModelConfig, "width", 100.5, "must be of type int, not 100.5"),
        (ModelConfig, "width", True, "must be of type int, not True"),
        (ModelConfig, "width", "128", "must be of type int, not '128'"),
        (ModelConfig, "depth", None, "must be of type int, not None"),
        (
            ModelConfig,
            "pattern",
            ("local", "globl"),
            "no mixer 'globl'; did you mean 'global'?",
        ),
        (ModelConfig, "pattern", "local", "must be a list, not 'local'"),
        (ModelConfig, "window", 7.0, "must be of type int, not 7.0"),
        (ModelConfig, "norm_epsilon", "small", "must be of type float, not 'small'"),
        (ModelConfig, "canon_init", ["uniform"], r"must be one of uniform, previous, not \['uniform'\]"),
        (TrainConfig, "precision", "fp16", "must be one of auto, float32, bfloat16, not 'fp16'"),
        (TrainConfig, "precision", "bfloat", "did you mean 'bfloat16'?"),
        (TrainConfig, "seed", np.float32(1), "must be of type int"),
        (TrainConfig, "muon_rate", True, "must be of type float, not True"),
        (DataConfig, "path", Path("data"), "must be of type str"),
        (EvaluationConfig, "lengths", 256, "must be a list, not 256"),
        (EvaluationConfig, "lengths", (256, 512.5), "must be of type int, not 512.5"),
        (EvaluationConfig, "junk", "yes", "must be of type bool, not 'yes'"),
        (Recipe, "train", 3, "must be a table, not 3"),
        (Recipe, "name", 3, "must be of type str, not 3"),
        (Settings, "stop", "end", "must be a list, not 'end'"),
        (EngineConfig, "max_rows", 2.5, "must be of type int, not 2.5"),
        (ServerOptions, "dtype", "flot32", "did you mean 'float32'"),
        (Preparation, "vocab_size", "1024", "must be of type int"),
        (SweepConfig, "seeds", (0.5,), "must be of type int, not 0.5"),
        (DiagnosisPlan, "size", "quik", "did you mean 'quick'?"),
        (BenchPlan, "lengths", (1.5,), "must be of type int, not 1.5"),
        (Likelihood, "unit", "tokns", "did you mean 'tokens'?"),
        (Reasoning, "scoring", "rankin", "did you mean 'ranking'?"),
        (Recall, "task", "mqarr", "did you mean 'mqar'?"),
        (Copying, "length", "64", "must be of type int"),
        (Retrieval, "preset", "needle", "did you mean 'needles'?"),
        (Measured, "dtype", "float23", "did you mean 'float32'?"),
    ],
)
def test_what_a_setting_cannot_be_is_one_line_with_its_name(kind, field, value, told):
    with pytest.raises(ValueError, match=f"^'{field}'.*{told}") as caught:
        kind(**{field: value})
    assert "\n" not in str(caught.value)


def test_what_means_the_same_is_taken_as_the_type_that_is_asked_for():
    config = ModelConfig(pattern=["local", "global"], max_half_life=256, width=np.int64(64), norm_epsilon=np.float32(1))
    assert config.pattern == ("local", "global") and hash(config)
    assert [type(x) for x in (config.max_half_life, config.width, config.norm_epsilon)] == [float, int, float]
    assert ModelConfig(max_half_life="inf").max_half_life == math.inf
    assert EngineConfig(cache_folder="kept").cache_folder == Path("kept")
    assert Recipe(model={"width": 64}).model == ModelConfig(width=64)


def test_a_table_in_python_tells_the_whole_name():
    with pytest.raises(ValueError, match=r"'model\.core': no core 'polarr'; did you mean 'polar'?"):
        Recipe(model={"core": "polarr"})
    with pytest.raises(ValueError, match=r"unknown key 'wdith'; did you mean 'width'\?"):
        ModelConfig(wdith=3)
