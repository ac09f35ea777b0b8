"""Threads: chosen by measuring where nobody said how many, told in a line, and kept by a run that goes on."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from atma import threads


@pytest.fixture
def nothing_said(monkeypatch) -> Iterator[None]:
    """Neither a user nor the environment has named a number; the process has its own again afterwards."""
    before = torch.get_num_threads()
    monkeypatch.delenv(threads.NUMBER, raising=False)
    yield
    torch.set_num_threads(before)


def taking(seconds: dict[int, float]) -> tuple[Callable[[int], float], Callable[[], float]]:
    """A sample and a clock that goes on by what samples take."""
    gone = [0.0]

    def sample(count: int) -> float:
        gone[0] += seconds[count]
        return seconds[count]

    return sample, lambda: gone[0]


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 0.010, 2: 0.006}, 2),
        ({1: 0.010, 2: 0.040}, 1),
        ({1: 0.010, 2: 0.0095}, 1),
        ({1: 0.010, 2: 0.006, 4: 0.004}, 4),
        ({1: 0.010, 2: 0.006, 4: 0.0058}, 2),
        ({1: 0.010, 2: 0.011, 4: 0.004}, 4),
    ],
)
def test_more_threads_are_chosen_only_where_they_are_clearly_faster(seconds, best):
    choice = threads.choose(taking(seconds)[0], list(seconds), taking(seconds)[1])
    assert choice.count == best


@pytest.fixture(autouse=True)
def _no_waiting_for_a_clock_that_stands(monkeypatch):
    monkeypatch.setattr(threads, "SECONDS", 0.0)


def test_measuring_ends_when_its_seconds_are_gone(monkeypatch):
    monkeypatch.setattr(threads, "SECONDS", 0.4)
    sample, now = taking({1: 0.010, 2: 0.010})
    threads.choose(sample, [1, 2], now)
    assert 0.4 <= now() < 0.45


def test_one_slow_moment_does_not_decide():
    turns = iter([0.010, 0.006, 0.010, 9.0, 0.010, 0.006, 0.010, 0.006, 0.010, 0.006])
    assert threads.choose(lambda _: next(turns), [1, 2], lambda: 0.0).count == 2


@pytest.mark.parametrize(
    ("most", "counts"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_the_numbers_compared_double_up_to_the_cores(most, counts):
    assert threads.candidates(most) == counts


def test_a_number_that_was_asked_for_is_taken(nothing_said, monkeypatch):
    monkeypatch.setenv(threads.NUMBER, "1")
    assert threads.settle(3, kept=2).count == 3
    assert torch.get_num_threads() == 3


def test_the_environment_s_number_stands(nothing_said, monkeypatch):
    monkeypatch.setenv(threads.NUMBER, "2")
    torch.set_num_threads(2)
    assert threads.settle(kept=5) == threads.Choice(2, threads.NUMBER)


def test_a_run_keeps_what_it_began_with_unless_a_number_is_asked_for(nothing_said):
    assert threads.settle(kept=2).count == torch.get_num_threads() == 2


def test_without_a_word_it_is_measured_and_told_in_one_line(nothing_said, monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 2)
    choice = threads.settle()
    assert choice.count == torch.get_num_threads()
    assert "--threads or OMP_NUM_THREADS decides otherwise" in str(choice)
    assert "\n" not in str(choice)


def test_a_number_below_nought_is_refused():
    with pytest.raises(ValueError, match="--threads -1: at least 1"):
        threads.settle(-1)


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "3000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_the_command_waits_briefly_unless_told_how_to_wait(given: dict[str, str], spins: str | None):
    code = "import os; from atma.cli import main; main(['--version']); print(os.environ.get('GOMP_SPINCOUNT'))"
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(spins)


def test_a_process_that_has_pytorch_already_keeps_its_environment():
    environment: dict[str, str] = {}
    assert not threads.wait_briefly(environment)
    assert environment == {}
