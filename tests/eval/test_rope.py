"""Stretched rotary positions against their formulas, and models that are evaluated with them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from atma.cli import main
from atma.config import ModelConfig, identity
from atma.eval import Documents, OwnModel, Stretch, Stretched, length_curve, needle
from atma.eval.rope import stretch_of
from atma.loading import Loaded, load
from atma.mixers.rope import RopeConfig, frequencies, logit_scale
from atma.model import Model
from atma.tokenizer import byte_tokenizer
from tests.laws.conftest import randomise


def rope(**changes) -> ModelConfig:
    return ModelConfig(257, 32, 4, query_heads=2, key_value_heads=1, head_width=16, core="rope", **changes)


def loaded(seed: int = 0) -> Loaded:
    model = randomise(Model(dataclasses.replace(rope(), memory=False)), seed)
    return Loaded(model.eval(), byte_tokenizer(), "here", {"extra": {"recipe": {"train": {"length": 64}}}})


def test_interpolation_turns_every_pair_as_many_times_more_slowly():
    linear = RopeConfig(rope_scaling="linear", rope_factor=8.0)
    torch.testing.assert_close(frequencies(linear, 16) * 8, frequencies(RopeConfig(), 16), rtol=1e-15, atol=0)
    assert logit_scale(linear) == logit_scale(RopeConfig()) == 0.12


@pytest.mark.parametrize(("trained", "factor"), [(256, 4.0), (2048, 16.0), (64, 256.0)])
def test_yarn_is_its_formula_pair_by_pair(trained, factor):
    config = RopeConfig(rope_scaling="yarn", rope_factor=factor, rope_trained=trained)
    for own, found in zip(frequencies(RopeConfig(), 16).tolist(), frequencies(config, 16).tolist(), strict=True):
        turns = trained / (2 * math.pi / own)
        share = 0 if turns < 1 else 1 if turns > 32 else (turns - 1) / 31
        assert found == pytest.approx((1 - share) * own / factor + share * own, rel=1e-12)
    assert math.sqrt(logit_scale(config) / 0.12) == pytest.approx(0.1 * math.log(factor) + 1)


def test_a_pair_that_turns_often_is_left_alone_and_one_that_turns_less_than_once_is_slowed():
    config = RopeConfig(rope_scaling="yarn", rope_factor=4.0, rope_trained=256)
    ratio = frequencies(config, 16) / frequencies(RopeConfig(), 16)
    assert ratio[0] == 1 and ratio[-1] == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "yarn", "rope_factor": 2.0}, "'rope_trained' must be the trained length in tokens, not None"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "'rope_factor' must be a finite number of at least 1"),
        ({"rope_scaling": "linear", "rope_factor": math.inf}, "'rope_factor' must be a finite number"),
        ({"rope_factor": 2.0}, "'rope_factor' must be left out without rope_scaling"),
        ({"core": "nope", "rope_scaling": "linear"}, "'rope_scaling' must be none where no layer is rope"),
    ],
)
def test_what_cannot_be_stretched_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(rope(), **changes)


def test_configurations_without_stretching_keep_their_identity():
    assert identity(ModelConfig()) == "d762ab01f90be095"


def test_each_length_is_read_by_a_model_of_that_stretch_and_within_the_trained_length_by_the_model_itself():
    one = loaded()
    text = torch.randint(0, 256, (2, 257), generator=torch.Generator().manual_seed(0))
    model = Stretched(one, Stretch("yarn", 64))
    for length in (32, 64, 256):
        config = dataclasses.replace(one.model.config, rope_scaling="yarn", rope_trained=64)
        fixed = Model(dataclasses.replace(config, rope_factor=max(1.0, length / 64))).double()
        fixed.load_state_dict(one.model.state_dict())
        expected = OwnModel(one._replace(model=fixed.eval())).score(text[:, : length + 1])
        np.testing.assert_allclose(model.score(text[:, : length + 1]), expected, rtol=1e-6)
        same = np.allclose(OwnModel(one).score(text[:, : length + 1]), expected, rtol=1e-6)
        assert same == (length <= 64)


def test_curves_read_every_length_with_its_own_stretch():
    model = Stretched(loaded(), Stretch("linear", 64))
    documents = Documents(np.random.default_rng(0).integers(0, 256, (2, 256)), 256)
    read = []
    rows = length_curve(model, documents, [64, 128, 256], "nested", read.append)
    for row in (row for row in rows if row["kind"] == "nested"):
        alone = model.score(torch.from_numpy(documents.windows(row["length"])))
        np.testing.assert_allclose(row["document_losses"], alone.mean(1), rtol=1e-6)
    assert sum(read) == 2 * (64 + 128 + 256)


def test_needles_and_generation_go_by_their_own_length():
    one = loaded()
    model, plain = Stretched(one, Stretch("yarn", 64)), OwnModel(one)
    text = np.random.default_rng(0).integers(0, 256, 4000)
    near, far = ([needle(m, text, [length], 2)[0]["cross_entropy"] for m in (model, plain)] for length in (200, 400))
    assert near[0] != near[1] and far[0] != far[1]
    prompt = text[:150].tolist()
    fixed = Stretched(one, Stretch("yarn", 64, 170 / 64))
    assert model.generate(prompt, 20) == fixed.generate(prompt, 20)
    assert model.provenance()["rope_factor"] == "length" and fixed.provenance()["rope_factor"] == 170 / 64
    assert "rope_scaling" not in plain.provenance()


@pytest.mark.parametrize(
    ("kind", "trained", "factor", "message"),
    [
        ("none", 64, None, "--rope-trained 64: stretches nothing"),
        ("none", None, 2.0, "--rope-factor 2.0: stretches nothing"),
    ],
)
def test_options_that_stretch_nothing_are_told(kind, trained, factor, message):
    with pytest.raises(ValueError, match=message):
        stretch_of(loaded(), kind, trained, factor)


def test_the_trained_length_is_what_the_folder_says_and_other_cores_are_refused():
    assert stretch_of(load("nano-rope"), "yarn", None, None) == Stretch("yarn", 256)
    with pytest.raises(ValueError, match="nano has no rope layer, whose positions could be stretched"):
        stretch_of(load("nano"), "yarn", None, None)
    with pytest.raises(ValueError, match="give --rope-trained"):
        stretch_of(loaded()._replace(info={}), "yarn", None, None)


def test_the_command_refuses_it_for_models_of_transformers(capsys):
    assert main(["eval", "retrieval", "--model", "hf:gpt2", "--rope-scaling", "yarn"]) == 2
    assert "--rope-scaling is for models of ours" in capsys.readouterr().err
