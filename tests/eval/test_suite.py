"""Running a suite: what is kept, how many trials a time allows, and the promises of the model protocol."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from atma.commands.suite import left_out, told_trials
from atma.eval import suite as suites
from atma.eval.language_model import OwnModel
from atma.eval.results import read_rows
from atma.eval.suite import Measurement, allot, duration, run, run_measurements, within
from atma.generation import Settings, generate
from atma.model import Model


@dataclass(frozen=True)
class Counting:
    """A suite of one measurement a length, whose rows tell the trials."""

    lengths: tuple[int, ...] = (8, 32)
    most: int = 100
    seed: int = 5
    name: str = "counting"

    def trials(self):
        return dict.fromkeys(self.lengths, self.most)

    def cells(self):
        return 2

    def measurements(self, model, trials):
        def make(length, count):
            def measure(advance):
                advance(count * length)
                return [{"kind": "count", "length": length, "trials": count}]

            return Measurement(f"at {length}", {"length": length, "trials": count}, count * length, measure)

        return [make(length, count) for length, count in trials.items()]


def test_rows_tell_suite_measurement_and_provenance(tiny):
    rows = run(Counting(), OwnModel(tiny))
    assert [(row["length"], row["trials"]) for row in rows] == [(8, 100), (32, 100)]
    for row in rows:
        assert row["suite"] == "counting" and row["measurement"]["length"] == row["length"]
        assert row["provenance"]["seed"] == 5 and row["truncated_tokens"] == 0


def test_a_measurement_in_the_file_is_not_made_again(tiny, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rows = run(Counting(), OwnModel(tiny), path)
    more = run(Counting(lengths=(8, 32, 64)), OwnModel(tiny), path)
    assert more[:2] == rows and len(read_rows(path)) == 3


def test_another_configuration_of_the_same_weights_is_another_measurement(tiny):
    plain = OwnModel(tiny)
    narrow = OwnModel(tiny._replace(model=Model(replace(tiny.model.config, count_limit=7))))
    narrow.loaded.model.load_state_dict(tiny.model.state_dict())
    ours, theirs = (model.provenance() for model in (plain, narrow))
    assert (
        ours["weights_sha256"] == theirs["weights_sha256"]
        and ours["model_config_sha256"] != theirs["model_config_sha256"]
    )
    assert run(Counting(), plain)[0]["key"] != run(Counting(), narrow)[0]["key"]


def test_rows_that_another_process_adds_meanwhile_stay(tiny, tmp_path):
    path, stamp = tmp_path / "rows.jsonl", OwnModel(tiny).provenance()

    def while_another_ends(advance):
        run(Counting(), OwnModel(tiny), path)
        return [{"kind": "count", "length": 7}]

    run_measurements("slow", [Measurement("slow", {"length": 7}, 1, while_another_ends)], stamp, path)
    assert sorted(row["length"] for row in read_rows(path)) == [7, 8, 32]


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tiny, tmp_path):
    (tmp_path / "file").touch()
    never = Measurement("never", {}, 1, lambda advance: pytest.fail("measured"))
    with pytest.raises(OSError, match="cannot be written"):
        run_measurements("never", [never], {}, tmp_path / "file" / "rows.jsonl")


def test_a_budget_makes_trials_fewer(tiny, monkeypatch):
    monkeypatch.setattr(suites, "seconds_per_sequence", lambda model, lengths, cells: {n: n / 8 for n in lengths})
    trials = within(Counting(), OwnModel(tiny), 8.0)
    rows = run(Counting(), OwnModel(tiny), trials=trials)
    assert [(row["length"], row["trials"]) for row in rows] == [(8, 4), (32, 1)]
    assert (
        told_trials({8: 4, 32: 4, 1024: 4}, trials) == "4 of 4 trials at 8, 1 of 4 trials at 32, 0 of 4 trials at 1,024"
    )


def test_short_lengths_leave_what_they_do_not_want_to_long_ones():
    assert allot(10.0, {1: 0.1, 2: 1.0}, {1: 10, 2: 100}) == {1: 10, 2: 9}


def test_a_length_that_does_not_fit_is_left_out_and_no_length_is_an_error():
    assert allot(2.0, {1: 0.5, 2: 9.0}, {1: 10, 2: 10}) == {1: 2}
    with pytest.raises(ValueError, match=r"too short: a trial at length 1 is 0\.5 s"):
        allot(0.1, {1: 0.5, 2: 9.0}, {1: 10, 2: 10})


def test_the_time_of_a_sequence_grows_with_its_length(tiny):
    seconds = suites.seconds_per_sequence(OwnModel(tiny), [256, 4096, 65_536], 1)
    assert 0 < seconds[256] < seconds[4096] < seconds[65_536]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("20", 20)])
def test_a_budget_is_a_time(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-3s", "ten", "0", "infh"])
def test_anything_else_is_not(text):
    with pytest.raises(ValueError, match="a budget is a time such as"):
        duration(text)


def test_a_prediction_is_a_score_with_what_was_likeliest(tiny):
    model = OwnModel(tiny)
    tokens = torch.randint(0, 256, (3, 90), generator=torch.Generator().manual_seed(1))
    found = model.predict(tokens, 20)
    np.testing.assert_allclose(found.nats, model.score(tokens, 20), atol=2e-5)
    hidden, _ = tiny.model(tokens[:, :-1])
    likeliest = tiny.model.logits(hidden).argmax(-1)[:, -20:]
    assert (found.right == (likeliest == tokens[:, -20:]).numpy()).all()


def test_the_greedy_continuation_is_that_of_generate(tiny):
    text = "def f(x):"
    prompt = [tiny.tokenizer.eot, *tiny.tokenizer.encode(text)]
    written = OwnModel(tiny).generate(prompt, 12)
    assert generate(tiny.model, tiny.tokenizer, text, Settings(12, temperature=0)) == tiny.tokenizer.decode(written)
    assert OwnModel(tiny).generate(prompt, 12, stop=[written[4]]) == written[: written.index(written[4])]


def test_a_prompt_of_one_token_is_continued(tiny):
    assert len(OwnModel(tiny).generate([65], 3)) <= 3


@pytest.mark.parametrize(("prompt", "most"), [([], 3), ([65], 0)])
def test_no_prompt_or_nothing_to_write_is_refused(tiny, prompt, most):
    with pytest.raises(ValueError, match="needs a prompt and a token to write"):
        OwnModel(tiny).generate(prompt, most)


def test_what_a_budget_had_no_room_for_is_said_in_words():
    wanted = {8: 4, 32: 4, 1024: 4, 4096: 4}
    assert left_out("1s", wanted, {8: 4, 32: 1}) == (
        "--budget 1s: not measured, for want of time: 1,024, 4,096 tokens; fewer trials: 1 of 4 at 32 tokens; "
        "give a longer one"
    )
    assert left_out("1s", wanted, wanted) == "" == left_out("1s", {}, {})
