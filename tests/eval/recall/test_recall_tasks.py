"""The tasks: every answer can be looked up, nothing else is asked, and no example of one stream is of another."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from atma.eval.recall.tasks import (
    BLANK,
    TEST,
    TRAIN,
    VALIDATION,
    AssociativeRecall,
    Capacity,
    Copying,
    SelectiveCopying,
    examples,
)
from atma.eval.suite import sha256
from atma.ops.loss import NOT_SCORED

EVERY = [
    AssociativeRecall(64, 4),
    AssociativeRecall(64, 16, 128, filler="random"),
    Copying(32),
    SelectiveCopying(40, 8),
    Capacity(16, 5, 256),
]
named = pytest.mark.parametrize("task", EVERY, ids=lambda task: f"{task.name} {task.size}")


def drawn(task, count=20, seed=3, stream=TRAIN):
    batch = examples(task, seed, stream, 0, count)
    return batch.tokens.numpy(), batch.targets.numpy()


@named
def test_examples_have_the_length_and_the_ids_of_their_task(task):
    tokens, targets = drawn(task)
    assert tokens.shape == targets.shape == (20, task.length)
    assert tokens.min() >= 0 and tokens.max() < task.ids
    assert targets[targets != NOT_SCORED].max() < task.ids


@named
def test_every_row_is_asked_equally_often(task):
    _, targets = drawn(task)
    assert len(set((targets != NOT_SCORED).sum(1))) == 1


@pytest.mark.parametrize("task", [AssociativeRecall(64, 16, 128, filler="random"), AssociativeRecall(256, 16)])
def test_associative_recall_asks_every_key_once_for_the_value_it_was_told_with(task):
    for tokens, targets in zip(*drawn(task), strict=True):
        told = 2 * task.pairs
        value_of = dict(zip(tokens[0:told:2].tolist(), tokens[1:told:2].tolist(), strict=True))
        assert len(value_of) == len(set(value_of.values())) == task.pairs
        at = np.flatnonzero(targets != NOT_SCORED)
        assert at.min() >= told and not (at % 2).any()
        assert sorted(tokens[at].tolist()) == sorted(value_of)
        assert [value_of[key] for key in tokens[at].tolist()] == targets[at].tolist()
        others = np.delete(tokens, [*range(told), *at])
        assert not set(others.tolist()) & set(value_of)
        assert (set(others.tolist()) == {BLANK}) == (task.filler == "blank")


def test_keys_are_asked_at_distances_that_follow_the_power_law():
    task = AssociativeRecall(18, 1, power=0.01)
    _, targets = drawn(task, 4000)
    slots = (np.flatnonzero((targets != NOT_SCORED).ravel()) % task.length - 2) // 2
    chances = np.arange(1, 9) ** -0.99
    chances /= chances.sum()
    found = np.bincount(slots, minlength=8) / 4000
    assert (np.abs(found - chances) < 5 * np.sqrt(chances * (1 - chances) / 4000)).all()


def test_copying_asks_for_the_first_half_one_token_ahead():
    tokens, targets = drawn(Copying(32))
    assert (tokens[:, ::16] == BLANK).all() and (tokens[:, 1:16] != BLANK).all()
    assert (targets[:, :16] == NOT_SCORED).all() and (targets[:, -1] == NOT_SCORED).all()
    assert (targets[:, 16:31] == tokens[:, 1:16]).all()
    assert (tokens[:, 17:] == targets[:, 16:31]).all()


def test_selective_copying_asks_at_markers_for_the_symbols_in_their_order():
    task = SelectiveCopying(40, 8)
    for tokens, targets in zip(*drawn(task), strict=True):
        context, marked = tokens[:32], tokens[32:]
        assert (marked == task.vocabulary + 1).all()
        assert context[context != BLANK].tolist() == targets[32:].tolist()
        assert (targets[:32] == NOT_SCORED).all()


def test_the_capacity_probe_asks_every_key_behind_the_gap():
    for tokens, targets in zip(*drawn(Capacity(16, 5, 64)), strict=True):
        value_of = dict(zip(tokens[0:32:2].tolist(), tokens[1:32:2].tolist(), strict=True))
        assert (tokens[32:37] == BLANK).all() and (targets[:37] == NOT_SCORED).all()
        assert [value_of[key] for key in tokens[37:].tolist()] == targets[37:].tolist()
        assert tokens[37:].tolist() != tokens[0:32:2].tolist()


@named
def test_a_stretched_task_asks_as_much_or_in_proportion(task):
    longer = task.stretched(4)
    grows = task.name in ("copy", "capacity")
    asked, before = ((drawn(one)[1] != NOT_SCORED).sum() for one in (longer, task))
    extra = 20 * 3 if task.name == "copy" else 0  # separators that a longer row does without
    assert longer.length > task.length and asked == before * (4 if grows else 1) + extra


@named
def test_an_example_is_the_same_whatever_is_drawn_beside_it(task):
    whole, alone = examples(task, 3, TEST, 0, 6), examples(task, 3, TEST, 4, 1)
    assert torch.equal(whole.tokens[4:5], alone.tokens) and torch.equal(whole.targets[4:5], alone.targets)


def test_another_process_draws_the_same_bytes():
    code = (
        "from atma.eval.recall.tasks import *; from atma.eval.suite import sha256\n"
        "print(*[sha256(examples(t, 3, TEST, 0, 4).tokens.numpy()) for t in "
        "(AssociativeRecall(64, 4), Copying(32), SelectiveCopying(40, 8), Capacity(16, 5, 64))])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    apart = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    tasks = (AssociativeRecall(64, 4), Copying(32), SelectiveCopying(40, 8), Capacity(16, 5, 64))
    here = [sha256(examples(task, 3, TEST, 0, 4).tokens.numpy()) for task in tasks]
    assert apart.stdout.split() == here and len(set(here)) == 4


def test_no_two_streams_seeds_or_examples_share_a_generator():
    places = [[seed, stream, i] for seed in (0, 1, 2, 2**32 - 1) for stream in range(3) for i in range(50)]
    states = {tuple(np.random.SeedSequence(place).generate_state(4, np.uint64)) for place in places}
    assert len(states) == len(places)


@named
def test_no_test_example_is_ever_trained_on(task):
    taught = {row.tobytes() for row in drawn(task, 300)[0]}
    for stream in (VALIDATION, TEST):
        assert not taught & {row.tobytes() for row in drawn(task, 300, stream=stream)[0]}
    assert taught & {row.tobytes() for row in drawn(task, 10)[0]}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AssociativeRecall(63, 4), "an even length"),
        (lambda: AssociativeRecall(64, 17), "not length 64 and 17 pairs"),
        (lambda: AssociativeRecall(64, 16, 32), "vocabulary of 32 has too few keys for 16 pairs; make it 34"),
        (lambda: Copying(5), "an even length of 4 or more"),
        (lambda: SelectiveCopying(20, 11), "not length 20 and 11 symbols"),
        (lambda: Capacity(0), "a pair or more"),
        (lambda: Capacity(600, 0, 1024), "make it 1202"),
        (lambda: examples(Copying(4), 2**32, TRAIN, 0, 1), "below 2\\^32, not 4294967296"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
