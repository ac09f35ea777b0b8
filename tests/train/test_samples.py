"""Texts that a model writes while it trains: they are kept and shown, and change nothing."""

import dataclasses

import pytest
import torch
from test_loop import same, weights
from tiny_run import rows, tiny_model, tiny_recipe, tiny_source

from atma.model import Model
from atma.tokenizer import byte_tokenizer
from atma.train.loop import Stopped, fit
from atma.train.progress import Lines
from atma.train.samples import NAME, Sample, cut_samples, keep, read_samples, written

PROMPTS = ("def", "", "\u6f22")


def source(make=rows):
    """The tiny batches, with a tokenizer beside them."""
    return dataclasses.replace(tiny_source(make), tokenizer=byte_tokenizer())


def recipe(**changes):
    return tiny_recipe(tiny_model(vocab_size=257), **({"sample_every": 3, "sample_tokens": 5} | changes))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sampled"
    fit(recipe(sample_prompts=PROMPTS), out, source())
    return out


def test_samples_change_not_one_bit_of_the_weights(sampled, tmp_path):
    plain = fit(recipe(sample_every=0), tmp_path / "plain", source())
    assert same(weights(sampled / "final"), weights(plain))
    assert not (tmp_path / "plain" / NAME).exists()


def test_samples_draw_nothing_from_the_global_generator_and_leave_the_mode():
    model = Model(recipe().model)
    before = torch.get_rng_state()
    texts = list(written(model.train(), byte_tokenizer(), recipe(sample_prompts=PROMPTS).train, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert texts == list(written(model.eval(), byte_tokenizer(), recipe(sample_prompts=PROMPTS).train, 3))
    assert not model.training


def test_a_text_of_every_prompt_is_kept_at_every_step_that_is_due(sampled):
    found = read_samples(sampled)
    assert [(one.step, one.prompt) for one in found] == [(step, p) for step in (3, 6, 9, 12) for p in PROMPTS]
    assert any(one.text for one in found)


def test_a_run_that_goes_on_has_the_same_samples(sampled, tmp_path):
    out, steps = tmp_path / "run", []

    def stop():
        steps.append(1)
        return len(steps) >= 8

    with pytest.raises(Stopped):
        fit(recipe(sample_prompts=PROMPTS), out, source(), stop=stop)
    with open(out / NAME, "ab") as file:
        file.write(b'{"step": 11, "prompt": "x", "text": "later"}\n{"step": 12, "pro')
    fit(recipe(sample_prompts=PROMPTS), out, source(), resume=True)
    assert read_samples(out) == read_samples(sampled)
    assert same(weights(out / "final"), weights(sampled / "final"))


def test_when_samples_are_written_may_change_where_a_run_goes_on(tmp_path):
    fit(recipe(sample_every=0, tokens=8 * 64), tmp_path / "run", source())
    fit(recipe(tokens=12 * 64), tmp_path / "run", source(), resume=True)
    assert [one.step for one in read_samples(tmp_path / "run")] == [9, 12]


def test_data_without_a_tokenizer_are_told_before_the_run_begins(tmp_path):
    with pytest.raises(ValueError, match=r"'train.sample_every' must be 0 here: .* has no tokenizer.json"):
        fit(recipe(), tmp_path / "run", dataclasses.replace(tiny_source(), vocab_size=257))
    assert not (tmp_path / "run").exists()


def test_a_sample_is_shown_in_lines_and_a_terminal_obeys_nothing_of_it(capsys):
    shown = Lines()
    shown.start("tiny", 12, 0)
    shown.show(Sample(3, "a", "b\x1b[31m\nc\td").row())
    assert capsys.readouterr().out.endswith("tiny: step 3: a sample:\n    a⟩b\ufffd[31m\n    c d\n")


def test_samples_are_cut_to_a_step(tmp_path):
    keep(tmp_path, [Sample(3, "a", "b"), Sample(6, "a", "c")])
    cut_samples(tmp_path, 5)
    assert read_samples(tmp_path) == [Sample(3, "a", "b")]
    cut_samples(tmp_path / "nowhere", 5)
