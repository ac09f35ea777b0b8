import dataclasses
import math

import pytest
import torch
from tiny_run import VOCABULARY, Rows, rows, tiny_model, tiny_recipe, tiny_source

from atma.checkpoint import load_info, load_model
from atma.config import Recipe, load_recipe
from atma.model import Model
from atma.train.loop import fit, train
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks
from atma.train.progress import Lines, Silent, clock
from atma.train.record import read_record
from atma.train.step import Stepper, generator


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def losses(run, kind="train"):
    return [row["loss"] for row in read_record(run) if row["kind"] == kind]


def weights(final) -> dict[str, torch.Tensor]:
    return load_model(final)[0].state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_a_run_learns_and_leaves_a_model_a_record_and_its_recipe(run):
    recipe = tiny_recipe(tokens=60 * 64, muon_rate=0.02, embedding_rate=0.02, head_rate=0.02, vector_rate=0.02)
    final = fit(recipe, run, tiny_source())
    assert final == run / "final" and load_recipe(run / "recipe.toml") == recipe
    # Counting is deterministic: nothing learned costs log 32 nats.
    assert losses(run)[0] == pytest.approx(math.log(32), abs=0.1) and losses(run)[-1] < 1.0
    assert losses(run, "validation")[-1] < 1.0
    assert load_info(final)["extra"]["tokens"] == 60 * 64


def test_the_record_has_a_row_a_step_and_validation_on_time_and_at_the_end(run):
    fit(tiny_recipe(tokens=8 * 64), run, tiny_source())
    rows = read_record(run)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 9))
    assert [row["step"] for row in rows if row["kind"] == "validation"] == [3, 6, 8]
    assert rows[0].keys() == {
        "kind", "step", "tokens", "loss", "rate", "grad_norm", "tokens_per_second", "skipped"
    }  # fmt: skip


def test_only_the_newest_checkpoints_are_kept_and_each_is_a_model_folder(run):
    fit(tiny_recipe(tokens=10 * 64, checkpoint_every=2), run, tiny_source())
    kept = sorted((run / "checkpoints").iterdir())
    assert [folder.name for folder in kept] == ["step-00000008", "step-00000010"]
    assert same(weights(kept[-1]), weights(run / "final"))


def test_accumulation_changes_neither_loss_nor_gradient(run):
    def gradients(parts: int) -> tuple[float, list[torch.Tensor]]:
        train = tiny_recipe(accumulation=parts).train
        model = Model(tiny_model(), generator(1)).double()
        torch.nn.init.normal_(model.head.weight, generator=generator(5))
        stepper = Stepper(model, Optimisers(model, train), train, torch.float32, Ranks())
        sums = stepper.passes(0, rows(0))
        return sums["loss"].item(), [parameter.grad.clone() for parameter in model.parameters()]

    (whole, all_at_once), (apart, in_four) = gradients(1), gradients(4)
    assert apart == pytest.approx(whole, rel=1e-13)
    for a, b in zip(all_at_once, in_four, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_after_two_steps_every_parameter_has_had_a_gradient():
    train = tiny_recipe().train
    model = Model(tiny_model(), generator(1))
    stepper = Stepper(model, Optimisers(model, train), train, torch.float32, Ranks())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(3):
        stepper(step, rows(step), 1.0)
    decayed = 3 * train.muon_rate * train.weight_decay
    still = [name for name, p in model.named_parameters() if (p - before[name]).norm() <= 2 * decayed * p.norm()]
    assert still == []


@pytest.mark.parametrize("name", ["weak", "strong", "discrete", "zipfian"])
def test_a_regulariser_is_trained_and_recorded(run, name):
    fit(tiny_recipe(tokens=2 * 64, regulariser=name, accumulation=2), run, tiny_source())
    assert all(row["regulariser"] > 0 for row in read_record(run) if row["kind"] == "train")


@pytest.mark.parametrize("core", ["polar", "nope", "rope"])
def test_the_distractor_term_is_trained_and_recorded(run, core):
    fit(tiny_recipe(tiny_model(core=core), tokens=2 * 64, distractor_weight=0.01), run, tiny_source())
    assert all(row["distractor"] > 0 for row in read_record(run) if row["kind"] == "train")


def test_bfloat16_computes_but_keeps_float32_weights(run):
    recipe = tiny_recipe(tokens=2 * 64, precision="bfloat16")
    final = fit(recipe, run, tiny_source())
    assert {value.dtype for value in weights(final).values()} == {torch.float32}
    assert losses(run)[0] == pytest.approx(math.log(32), abs=0.1)


def test_the_global_generator_has_no_part_in_a_run(tmp_path):
    recipe = tiny_recipe(tokens=4 * 64, regulariser="weak", distractor_weight=0.01)
    finals = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        finals.append(weights(fit(recipe, tmp_path / str(seed), tiny_source())))
    assert same(*finals)


@pytest.fixture
def nan_at(monkeypatch):
    """Make the loss NaN on the training batches of the given steps."""

    def arrange(steps: set[int]):
        plain = Model.loss
        now = {"step": -1}

        def make(step: int) -> Rows:
            now["step"] = step
            return rows(step)

        def loss(self, hidden, targets):
            nats = plain(self, hidden, targets)
            return nats * math.nan if torch.is_grad_enabled() and now["step"] in steps else nats

        monkeypatch.setattr(Model, "loss", loss)
        return tiny_source(make)

    return arrange


def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(run, nan_at):
    fit(tiny_recipe(tokens=6 * 64), run, nan_at({1, 2, 4}))
    rows = [row for row in read_record(run) if row["kind"] == "train"]
    assert [row["skipped"] for row in rows] == [0, 1, 2, 2, 3, 3]
    assert [row["loss"] is None for row in rows] == [False, True, True, False, True, False]
    assert all(value.isfinite().all() for value in weights(run / "final").values())


def test_three_in_a_row_end_the_run_and_keep_the_last_checkpoint(run, nan_at):
    with pytest.raises(ValueError, match=r"step 7: 3 steps in a row were not finite; not finite are gradients: embed"):
        fit(tiny_recipe(tokens=9 * 64), run, nan_at({4, 5, 6, 7}))
    assert read_record(run)[-1]["kind"] == "event"
    assert all(value.isfinite().all() for value in weights(run / "checkpoints" / "step-00000004").values())
    assert not (run / "final").exists()


def test_the_message_names_parameters_and_activations(run, monkeypatch):
    plain = Model.init_weights

    def broken(self, given=None):
        plain(self, given)
        with torch.no_grad():
            self.blocks[1].mlp.in_proj.bias[3] = math.inf

    monkeypatch.setattr(Model, "init_weights", broken)
    named = r"not finite are parameters: blocks.1.mlp.in_proj.bias; gradients: .*; activations: blocks.1.mlp.in_proj, "
    with pytest.raises(ValueError, match=named):
        fit(tiny_recipe(), run, tiny_source())


def test_the_message_names_the_layer_head_and_token_where_a_memory_diverges(run, monkeypatch):
    plain = Model.init_weights

    def broken(self, given=None):
        plain(self, given)
        with torch.no_grad():
            self.blocks[1].mixer.memory.memory.initial_1[1] = 1e25

    monkeypatch.setattr(Model, "init_weights", broken)
    named = r"activations: blocks.1.mixer.memory.memory \(row 0, head 1, token \d+\), "
    model = tiny_model(pattern=("local", "global"), memory="titans", memory_chunk=4, depth=2)
    with pytest.raises(ValueError, match=named):
        fit(tiny_recipe(model), run, tiny_source())


def test_a_folder_that_holds_a_run_is_not_written_over(run):
    fit(tiny_recipe(tokens=64), run, tiny_source())
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"run: holds a run already; resume it \(--resume\) or choose another folder"):
        fit(tiny_recipe(tokens=64), run, tiny_source())
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_folder_of_other_things_is_not_written_into(run):
    run.mkdir()
    (run / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"run: not empty and not a run; choose another folder"):
        fit(tiny_recipe(), run, tiny_source())


def test_data_with_more_tokens_than_the_model_is_refused(run):
    source = dataclasses.replace(tiny_source(), vocab_size=33)
    with pytest.raises(ValueError, match=r"33 ids, 'model.vocab_size' is 32: set model.vocab_size=33"):
        fit(tiny_recipe(), run, source)
    assert not run.exists() and VOCABULARY < 33


def test_a_batch_that_the_processes_cannot_share_is_refused(run):
    with pytest.raises(ValueError, match=r"multiple of length × accumulation × processes = 192, not 64"):
        fit(tiny_recipe(accumulation=4), run, tiny_source(), ranks=Ranks(0, 3))


def test_plain_lines_tell_step_loss_speed_and_time_left(run, capsys):
    fit(tiny_recipe(tokens=3 * 64), run, tiny_source(), progress=Lines(seconds=0))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny: 3 steps to go"
    assert lines[1].startswith("tiny: step 1/3 loss 3.") and lines[1].endswith(" left") and "tokens/s" in lines[1]
    assert lines[-1].startswith("tiny: step 3/3 validation loss 3.")


def test_progress_is_ended_when_a_run_breaks(run):
    class Watch(Silent):
        ended = False

        def stop(self) -> None:
            self.ended = True

    def broken(step: int) -> Rows:
        raise OSError("the disk is gone")

    watch = Watch()
    with pytest.raises(OSError, match="the disk is gone"):
        fit(tiny_recipe(), run, tiny_source(broken), progress=watch)
    assert watch.ended


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_time_left_reads_like_a_clock(seconds, text):
    assert clock(seconds) == text


def test_an_unknown_device_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"'device'.*'foo'"):
        train(Recipe(), tmp_path / "run", device="foo")
    assert not (tmp_path / "run").exists()
