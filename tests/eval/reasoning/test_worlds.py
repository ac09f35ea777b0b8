"""The twenty worlds: an independent reader agrees, from all facts and from the supporting ones alone."""

import hashlib
import json
import subprocess
import sys
from collections import Counter

import pytest
from story_reader import Reader

from atma.eval.reasoning.tasks import TASKS, chosen
from atma.eval.reasoning.worlds import draw, split_of

MANY = 150
SUPPORTED_BY = {1: 1, 2: 2, 3: 3, 4: 1, 5: 1, 6: 1, 9: 1, 10: 1, 11: 2, 12: 1, 13: 2, 14: 2, 15: 2, 16: 3, 17: 2, 19: 2}
everywhere = pytest.mark.parametrize("name", TASKS)


@pytest.fixture(scope="module")
def samples():
    """Drawn once for all tests: a function of the task's name."""
    drawn = {}

    def of(name):
        if name not in drawn:
            drawn[name] = [draw(TASKS[name], 7, index) for index in range(MANY)]
        return drawn[name]

    return of


def test_there_are_the_twenty_tasks_in_order():
    assert list(TASKS) == [f"qa{number}" for number in range(1, 21)]


@everywhere
def test_a_reader_of_the_sentences_finds_the_same_answer(samples, name):
    for sample in samples(name):
        assert Reader(sample.facts).answer(sample.question) == sample.answer, sample


@everywhere
def test_the_supporting_facts_alone_give_the_answer(samples, name):
    for sample in samples(name):
        assert list(sample.support) == sorted(set(sample.support)) and sample.support
        told = [sample.facts[index] for index in sample.support]
        assert Reader(told).answer(sample.question) == sample.answer, sample


@pytest.mark.parametrize("number", SUPPORTED_BY)
def test_a_question_needs_as_many_facts_as_its_task_says(samples, number):
    assert {len(sample.support) for sample in samples(f"qa{number}")} == {SUPPORTED_BY[number]}


def test_a_size_needs_a_chain_and_a_reason_a_feeling(samples):
    assert min(len(sample.support) for sample in samples("qa18")) == 2
    assert {len(sample.support) for sample in samples("qa20")} == {1, 2}


@everywhere
def test_answers_are_even(samples, name):
    """Every answer within four standard deviations of its even share."""
    counts = Counter(sample.answer for sample in samples(name))
    share = 1 / len(TASKS[name].answers)
    spread = (MANY * share * (1 - share)) ** 0.5
    assert set(counts) <= set(TASKS[name].answers)
    for answer in TASKS[name].answers:
        assert abs(counts[answer] - MANY * share) < 4 * spread, answer


@everywhere
def test_stories_differ_and_none_is_of_both_splits(samples, name):
    test, train = samples(name), [draw(TASKS[name], 7, index, "train") for index in range(40)]
    assert {split_of(one.facts) for one in test} == {"test"} and {split_of(one.facts) for one in train} == {"train"}
    assert len({(sample.facts, sample.question) for sample in test}) > MANY / 2


@pytest.mark.parametrize("name", ["qa4", "qa17"])
def test_no_facts_of_a_test_are_told_in_training_whatever_is_asked_about_them(samples, name):
    """Of the tasks with the fewest stories."""
    trained = {draw(TASKS[name], 7, index, "train").facts for index in range(2000)}
    assert not trained & {sample.facts for sample in samples(name)}


def test_a_trial_is_the_same_in_every_process():
    code = (
        "import json; from atma.eval.reasoning.tasks import TASKS; from atma.eval.reasoning.worlds import draw; "
        "print(json.dumps([draw(task, 3, i) for task in TASKS.values() for i in (0, 9)]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = json.dumps([draw(task, 3, i) for task in TASKS.values() for i in (0, 9)]) + "\n"
    assert hashlib.sha256(found.encode()).digest() == hashlib.sha256(here.encode()).digest()


def test_unknown_and_repeated_tasks_are_refused():
    with pytest.raises(ValueError, match="no reasoning task 'qa21'; known: qa1"):
        chosen(("qa1", "qa21"))
    for names in ((), ("qa1", "qa1")):
        with pytest.raises(ValueError, match="must be distinct, and at least one"):
            chosen(names)
