"""The six tasks of MAD: every answer follows from what is shown, or from the facts; training is asked as MAD asks."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from atma.config import ModelConfig
from atma.eval.recall.adamw import AdamW, cosine, train_config
from atma.eval.recall.compression import AutoEncoder, positions
from atma.eval.recall.mad import (
    MAD,
    Compression,
    FuzzyRecall,
    InContextRecall,
    MadCopying,
    Memorisation,
    NoisyRecall,
)
from atma.eval.recall.suite import Recall, recall
from atma.eval.recall.tasks import TASKS, TEST, TRAIN, VALIDATION, examples
from atma.eval.recall.training import batches, correct
from atma.model import Model
from atma.ops.loss import NOT_SCORED

TASK_NAMES = [kind.name for kind in MAD]
RECALLS = [InContextRecall(32), NoisyRecall(64), FuzzyRecall(96)]
recalls = pytest.mark.parametrize("task", RECALLS, ids=lambda task: task.name)


def drawn(task, count=50, stream=TEST):
    batch = examples(task, 3, stream, 0, count)
    return list(zip(batch.tokens.numpy(), batch.targets.numpy(), strict=True))


@pytest.mark.parametrize("kind", MAD, ids=TASK_NAMES)
def test_every_published_size_can_be_drawn_and_is_called_what_it_was_asked_as(kind):
    for size in Recall(task=kind.name, sizes=("all",)).tasks():
        batch = examples(size, 0, VALIDATION, 0, 2)
        assert batch.tokens.shape == batch.targets.shape == (2, size.length)
        assert batch.tokens.min() >= 0 and batch.tokens.max() < size.vocabulary == size.ids
        assert (batch.targets != NOT_SCORED).any(1).all()
    sizes = [task.size for task in Recall(task=kind.name, sizes=("all",)).tasks()]
    assert sizes == [*kind.sizes, *kind.harder]


@pytest.mark.parametrize("task", [InContextRecall(32), NoisyRecall(64, noise=40)], ids=lambda task: task.name)
def test_recall_is_asked_at_every_key_that_came_before_and_nowhere_else(task):
    content = task.vocabulary - (16 if isinstance(task, NoisyRecall) else 0)
    for tokens, targets in drawn(task):
        told = {}
        for at in range(0, task.length, 2):
            key, value = tokens[at : at + 2].tolist()
            assert targets[at + 1] == NOT_SCORED
            if key >= content:
                assert value >= content and targets[at] == NOT_SCORED
                continue
            assert key < content // 2 <= value < content
            assert targets[at] == told.get(key, NOT_SCORED)
            assert told.setdefault(key, value) == value
        assert targets[-2] != NOT_SCORED


def test_so_many_percent_of_the_pairs_are_noise():
    noisy = np.stack([tokens[:-2:2] >= 16 for tokens, _ in drawn(NoisyRecall(128, 32, 40), 400)])
    pairs = noisy.size - len(noisy)  # in each example one pair is never noise, besides the last
    assert abs(noisy.sum() / pairs - 0.4) < 4 * math.sqrt(0.4 * 0.6 / pairs)


def test_fuzzy_recall_asks_for_the_values_of_keys_of_three_ids_that_came_before():
    task, asked = FuzzyRecall(96), 0
    for tokens, targets in drawn(task):
        shown = np.append(tokens, targets[-1])  # the last token is only ever asked for
        shown, want = shown[shown != 15], np.append(NOT_SCORED, targets)[-(shown != 15).sum() :]
        at, told = 0, {}
        while at < len(shown):
            key = tuple(shown[at : at + 3])
            assert len(set(key)) == 3 and max(key) < 7 and (want[at : at + 3] == NOT_SCORED).all()
            at += 3
            size = next((i for i, one in enumerate(shown[at:]) if one < 7), len(shown) - at)
            value = tuple(shown[at : at + size])
            assert 1 <= len(set(value)) == size <= 3 and told.setdefault(key, value) == value
            known = tuple(want[at : at + size])
            again = known == value
            assert again or known == (NOT_SCORED,) * size
            asked, at = asked + again, at + size
        assert again  # the last pair is always asked for
    assert asked > 50


@recalls
def test_in_training_recall_is_asked_for_every_next_token(task):
    for tokens, targets in drawn(task, stream=TRAIN):
        assert (targets[:-1] == tokens[1:]).all()


def test_keys_of_training_have_one_to_three_ids_where_those_of_a_test_have_three():
    def sizes(stream):
        runs = set()
        for tokens, _ in drawn(FuzzyRecall(96), stream=stream):
            starts = np.flatnonzero(np.diff(np.r_[0, (tokens < 7).astype(int), 0]))
            runs |= set((starts[1::2] - starts[::2])[:-1].tolist())
        return runs

    assert sizes(TRAIN) == {1, 2, 3} and sizes(TEST) == {3}


def test_copying_asks_at_the_blanks_behind_the_sign_for_the_symbols_in_their_order():
    task = MadCopying(64, 16, 8)
    for tokens, targets in drawn(task):
        content, behind = tokens[:55], tokens[56:]
        assert tokens[55] == 15 and (behind == 14).all() and (targets[:56] == NOT_SCORED).all()
        assert content[-1] != 14 and content[content != 14].tolist() == targets[56:].tolist()


def test_memorisation_asks_for_facts_that_no_example_and_no_seed_changes():
    task = Memorisation()
    value_of = task.facts()
    assert len(value_of) == len(set(value_of.tolist())) == 127 and set(value_of.tolist()) <= set(range(127, 255))
    for stream in (TRAIN, TEST):
        for tokens, targets in drawn(task, 10, stream):
            assert (tokens[1::2] == 255).all() and (targets[::2] == NOT_SCORED).all()
            assert (targets[1::2] == value_of[tokens[::2]]).all()


def test_compression_asks_for_everything_that_was_read():
    for tokens, targets in drawn(Compression()):
        assert (tokens == targets).all() and tokens[-1] == 15 and tokens[:-1].max() < 15


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: InContextRecall(31), "an even length of 2 or more, not 31"),
        (lambda: InContextRecall(128, 3), "a vocabulary of 4 or more, not 3"),
        (lambda: NoisyRecall(128, 18), "a vocabulary of 20 or more, and 0 to 99 percent of noise, not 18 and 20"),
        (lambda: NoisyRecall(128, 32, 100), "not 32 and 100"),
        (lambda: FuzzyRecall(128, 6), "a vocabulary of 7 or more and a length of 12 or more, not 6 and 128"),
        (lambda: MadCopying(32, 16, 16), "more than twice as many and one, not 16 symbols and length 32"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def small(task, words="width=16"):
    return Recall(model=(words, "head_width=8", "mlp_multiple=1"), mixers=("nope",))._model(task, "nope")


def test_what_an_auto_encoder_decodes_comes_from_its_last_token_alone():
    task = Compression(8)
    generator = torch.Generator().manual_seed(1)
    model = AutoEncoder(small(task), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    tokens = examples(task, 0, TEST, 0, 2).tokens
    hidden, state = model(tokens)
    encoding = Model.forward(model, tokens)[0][:, -1]
    assert state is None and hidden.shape == (2, 8, 16)
    for t, place in enumerate(positions(8, hidden)):
        torch.testing.assert_close(hidden[:, t], model.decoder(encoding + place))
    with pytest.raises(ValueError, match="give it no state"):
        model(tokens, model.init_state(2, 8))


def test_positions_are_sines_and_cosines_from_one_radian_a_token_to_a_ten_thousandth():
    found = positions(3, torch.zeros(1, 8, dtype=torch.float64))
    angles = 2 * np.array([1, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3), 1e-4])
    np.testing.assert_allclose(found[2], [*np.sin(angles), *np.cos(angles)], rtol=1e-5)


def test_long_examples_of_compression_are_read_at_once():
    task = Compression(1100)
    model = AutoEncoder(small(task), torch.Generator().manual_seed(1))
    assert correct(model, examples(task, 0, TEST, 0, 2)).count() == 2200


def test_of_a_set_every_example_comes_once_before_any_comes_again():
    task, order = InContextRecall(8), []
    whole = examples(task, 5, TRAIN, 0, 6).tokens
    made = batches(task, 5, 4, 6)
    for _ in range(6):
        batch = next(made)
        order += [int((whole == row).all(1).nonzero()[0]) for row in batch.tokens]
    times = [order[at : at + 6] for at in range(0, 24, 6)]
    assert all(sorted(one) == list(range(6)) for one in times) and len({tuple(one) for one in times}) > 1
    fresh = batches(task, 5, 4, 0)
    assert torch.equal(torch.cat([next(fresh).tokens, next(fresh).tokens]), examples(task, 5, TRAIN, 0, 8).tokens)


def test_the_protocol_of_mad_decays_matrices_and_lets_rates_fall_by_a_cosine():
    train = train_config(32, 10 * 128 * 32, 0, 2.0, 0.5)
    assert (train.steps, train.batch_tokens, train.vector_rate, train.clip) == (10, 4096, 1e-3, math.inf)
    assert [cosine(step, train) for step in (0, 5, 10)] == pytest.approx([1.0, (1 + 1e-3) / 2, 1e-3])
    model = Model(small(Compression(8)), torch.Generator().manual_seed(1))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    AdamW(model, train).step(0.5)
    for name, value in model.named_parameters():
        kept = 1 - 0.5 * 1e-3 * 0.5 if value.ndim > 1 else 1.0
        torch.testing.assert_close(value.detach(), before[name] * kept)


TINY = Recall(
    task="mad-memory",
    sizes=("8,16",),
    mixers=("nope",),
    model=("width=16", "head_width=8", "mlp_multiple=1"),
    protocol="mad",
    rates=(1.0, 2.0),
    weight_decays=(0.0, 0.1),
    examples=128,
    epochs=2,
    held_out=8,
    trials=16,
    factors=(1,),
)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_every_task_is_learned_from_and_tested(name):
    kind = TASKS[name]
    size = kind.sizes[0].split(",")
    short = ",".join(["32", *size[1:2], *(["4"] if name == "mad-copy" else size[2:])])
    rows = recall(dataclasses.replace(TINY, task=name, sizes=(short,), rates=(1.0,), weight_decays=(0.0,)))
    run = rows[-1]
    assert run["trained_tokens"] == 2 * 128 * 32 and run["size"] == short and run["decay"] == 0.0
    assert run["model"]["pattern"] == ["global", "global"] and run["train"]["clip"] == "inf"
    decoder = 2 * (16 * 16 + 16) + 3 * 16 if name == "mad-compression" else 0
    plain = Model(ModelConfig.from_table(run["model"]))
    assert run["parameters"] == sum(p.numel() for p in plain.parameters()) + decoder


def test_a_grid_of_rates_and_decays_is_told_apart_and_its_best_marked():
    from atma.eval.recall.summary import groups, table

    rows = recall(TINY)
    found = groups(rows)
    assert [(group.rate, group.decay) for group in found] == [(1.0, 0.0), (1.0, 0.1), (2.0, 0.0), (2.0, 0.1)]
    assert sum(group.best for group in found) == 1
    assert [line[0].rstrip(" *") for line in table(rows).rows][1] == "8,16 nope × 1, decay 0.1"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protocol": "atma"}, "'weight_decays' must be 0 or more, and are chosen for --protocol mad alone"),
        ({"examples": 0}, "epochs are of a set of examples, not 0 and 2"),
        ({"sizes": ("8",)}, "a size of mad-memory is LENGTH,VOCABULARY, such as 32,256, not '8'"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(TINY, **changes).lessons()


def test_a_budget_does_not_shorten_epochs():
    with pytest.raises(ValueError, match="leave --epochs out"):
        TINY.within(1.0)
