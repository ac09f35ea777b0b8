"""One lesson: its loss is the model's own, its answers the likeliest tokens; it learns, stops and repeats itself."""

import dataclasses

import numpy as np
import pytest
import torch

from atma.config import ModelConfig, TrainConfig
from atma.eval.recall.mixers import base, mixer, reach
from atma.eval.recall.tasks import TEST, AssociativeRecall, Capacity, Copying, SelectiveCopying, examples
from atma.eval.recall.training import PATIENCE, Learner, Practice, correct, token_cost
from atma.mixers.gated_conv import GatedConv
from atma.model import Model
from atma.ops.loss import NOT_SCORED
from atma.train.step import Outcome

TASK = AssociativeRecall(8, 1, 16)
SMALL = {"width": 32, "head_width": 16, "mlp_multiple": 2}
CPU = torch.device("cpu")


def config(words="polar+memory", task=TASK, **settings):
    return mixer(words, base(task, "", tuple(f"{name}={value}" for name, value in (SMALL | settings).items())))


def practice(steps, **changes):
    rates = dict.fromkeys(("muon_rate", "embedding_rate", "head_rate", "vector_rate"), 0.03)
    train = TrainConfig(
        length=8, batch_tokens=256, tokens=256 * steps, constant_share=1.0, precision="float32", **rates
    )
    return Practice(train, 10, 32, 2.0, 5)._replace(**changes)


def woken(config):
    """A model whose every weight matters."""
    generator = torch.Generator().manual_seed(2)
    model = Model(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("length", [40, 1100], ids=["at once", "through the state"])
def test_an_answer_is_right_where_the_likeliest_token_is_the_target(length):
    task = SelectiveCopying(length, 16, 3)
    model = woken(config("polar+memory", task, width=16, head_width=8))
    batch = examples(task, 1, TEST, 0, 3)
    with torch.inference_mode():
        likeliest = model.logits(model(batch.tokens)[0]).argmax(-1)
    found, wanted = correct(model, batch), (likeliest == batch.targets).numpy()
    assert found.dtype == bool and (~found.mask == (batch.targets != NOT_SCORED).numpy()).all()
    assert (found == wanted).all() and found.count() == 3 * 16
    assert 0 < found.sum() < found.count()


def test_a_model_learns_the_task():
    learner = Learner(config(), practice(1), CPU)
    points = list(learner.learn(TASK, practice(150, stop_at=0.97), lambda _: None))
    assert points[-1]["accuracy"] >= 0.97 and points[0]["accuracy"] < 0.6
    fresh = correct(learner.model, examples(TASK, 99, TEST, 0, 64))
    assert fresh.mean() > 0.85  # of 64 examples: four standard errors below 0.97


def test_a_run_repeats_itself_and_another_seed_does_not():
    def losses(seed):
        wanted = practice(4, every=1)
        wanted = wanted._replace(train=dataclasses.replace(wanted.train, seed=seed))
        return [point["loss"] for point in Learner(config(), wanted, CPU).learn(TASK, wanted, lambda _: None)]

    assert losses(0) == losses(0)
    assert losses(0)[-1] != losses(1)[-1]


def test_the_curve_counts_steps_and_tokens_and_the_advance_sums_to_the_cost():
    told, wanted = [], practice(25)
    points = list(Learner(config(), wanted, CPU).learn(TASK, wanted, told.append))
    assert [(point["step"], point["tokens"]) for point in points] == [(10, 2560), (20, 5120), (25, 6400)]
    assert sum(told) == token_cost(wanted, TASK)


def test_a_run_that_is_not_finite_ends_and_says_so(monkeypatch):
    learner = Learner(config(), practice(1), CPU)
    monkeypatch.setattr(learner, "stepper", lambda *_: Outcome(float("nan"), float("nan"), {}, False))
    points = list(learner.learn(TASK, practice(100), lambda _: None))
    assert learner.diverged and [(point["step"], point["loss"]) for point in points] == [(PATIENCE, None)]


@pytest.mark.parametrize("words", ["polar", "nope", "rope", "rope+canon"])
def test_behind_the_gap_nothing_but_a_memory_tells_of_the_pairs(words):
    words, _, canon = words.partition("+")
    settings = f"rope_canon={'true' if canon else 'false'}"

    def read(mixer_words):
        probe = Capacity(3, 0, 32)
        chosen = config(f"{mixer_words},window=4,{settings}", probe, depth=4, pattern='["local", "global"]')
        gap = reach(chosen)
        assert gap
        batch = examples(dataclasses.replace(probe, gap=gap), 0, TEST, 0, 1).tokens
        other = batch.clone()
        other[:, :6] = (other[:, :6] + 1) % 32
        model = woken(chosen).double()
        with torch.inference_mode():
            return [model(tokens)[0][:, -3:] for tokens in (batch, other)]

    without, with_memory = read(words), read(f"{words}+memory")
    assert torch.equal(*without)
    assert not torch.allclose(*with_memory)


def test_the_gap_is_no_longer_than_it_must_be():
    chosen = config("polar,window=4", Capacity(3, 0, 32))
    gap = reach(chosen)
    assert gap == 2 + 3 + 3  # of the local taps, the window and the Canon taps
    tokens = torch.ones(1, gap + 1, dtype=torch.int64)
    other = tokens.clone()
    other[0, 0] = 2
    model = woken(chosen).double()
    with torch.inference_mode():
        assert not torch.equal(model(tokens)[0][:, -1], model(other)[0][:, -1])


def test_a_mixer_in_words_is_a_model():
    start = base(Copying(64), "", ("width=96",))
    assert start.vocab_size == 65 and start.max_half_life == 64 and start.count_limit == 64
    made = mixer("nope+memory,window=16,max_half_life=inf", start)
    assert (made.core, made.memory, made.window, made.width) == ("nope", True, 16, 96)
    assert np.isinf(made.max_half_life) and reach(start) is None
    preset = base(AssociativeRecall(64, 4, 512), "nano")
    assert (preset.width, preset.depth, preset.vocab_size, preset.count_limit) == (128, 8, 512, 256)
    assert isinstance(preset, ModelConfig)


def test_the_name_of_any_mixer_takes_the_place_of_the_global_layers():
    made = mixer("atma,window=16", base(Copying(64), "nano"))
    assert made.layers == ("local", "local", "atma", "local") * 2
    assert made.named()["atma"].options["window"] == 16 and made.head_width == 64 and made.max_half_life == 256
    convolutions = mixer("gated_conv,local_taps=5", base(Copying(64)))
    assert convolutions.layers == ("local", "gated_conv") and reach(convolutions) == 4 + 4
    with pytest.raises(
        ValueError, match="'atma' takes the place of layers 'global', and there is none in pattern local"
    ):
        mixer("atma", base(Copying(64), "", ('pattern=["local"]',)))


def test_an_option_that_is_a_mixers_alone_goes_to_its_own_table(monkeypatch):
    fields = GatedConv.takes({})
    own = {**fields, "local_taps": dataclasses.field(default=3, metadata={"own": True})}
    monkeypatch.setattr(GatedConv, "takes", classmethod(lambda cls, options: own))
    made = mixer("gated_conv,local_taps=5,width=96", base(Copying(64)))
    monkeypatch.undo()
    assert made.width == 96 and made.mixers["gated_conv"]["local_taps"] == 5
    assert reach(made) == 2 + 4


def test_selective_copying_has_two_layers_that_look_far():
    for words, far in (("rope", "global"), ("gated_conv", "gated_conv")):
        assert mixer(words, base(SelectiveCopying())).layers == ("local", far) * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "spiral",
            "polar, nope, rope, rotary, persistent, .* with \\+memory or without, or gated_conv, .*, not 'spiral'",
        ),
        ("polar+deltas", "'memory': no memory 'deltas'; did you mean 'delta'"),
        ("gated_conv+memory", "with \\+memory or without, or gated_conv, .*, not 'gated_conv\\+memory'"),
        ("gated_conv,window=3", "unknown key .window.; there are depth"),
        ("polar,windw=3", "did you mean 'window'"),
        ("polar,window", "KEY=VALUE, such as window=16"),
        ("polar,memory=true", "where its name says \\+memory"),
        ("polar,vocab_size=9", "set --vocabulary"),
        ("polar,window=wide", "'window' must be of type int, not 'wide'"),
    ],
)
def test_what_is_no_mixer_is_refused(words, said):
    with pytest.raises(ValueError, match=said):
        mixer(words, base(TASK))
