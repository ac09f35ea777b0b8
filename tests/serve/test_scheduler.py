"""Order, fairness and the bounds of the queue, without a model."""

import pytest

from atma.serve.request import Request, RequestError
from atma.serve.scheduler import Scheduler
from atma.serve.sequence import Sequence


def _sequences(*lengths: int) -> list[Sequence]:
    return [Sequence(Request("x"), str(i), 0, [0] * length, 0) for i, length in enumerate(lengths)]


def _scheduler(max_rows: int = 4, max_waiting: int = 8, overtakes: int = 2, quantum: int = 10) -> Scheduler:
    return Scheduler(max_rows, max_waiting, overtakes, quantum)


def test_whoever_came_first_is_taken_in_first() -> None:
    scheduler, sequences = _scheduler(2), _sequences(1, 1, 1)
    scheduler.add(sequences)
    assert scheduler.take_in(lambda _: True) == sequences[:2]
    assert scheduler.waiting == sequences[2:]


def test_a_full_queue_refuses_all_choices_of_a_request() -> None:
    scheduler = _scheduler(max_waiting=3)
    scheduler.add(_sequences(1, 1))
    with pytest.raises(RequestError, match="2 more cannot wait: 2 of 3 places are taken") as caught:
        scheduler.add(_sequences(1, 1))
    assert caught.value.code == "queue_full"
    assert len(scheduler.waiting) == 2


def test_one_that_does_not_fit_is_passed_so_many_times_and_no_more() -> None:
    scheduler = _scheduler(max_rows=20, max_waiting=20, overtakes=3)
    large, *small = _sequences(100, *[1] * 6)
    scheduler.add([large, *small])
    assert scheduler.take_in(lambda s: s is not large) == small[:3]
    assert large.passed == 3
    assert scheduler.take_in(lambda s: s is not large) == []
    assert scheduler.take_in(lambda s: True) == [large, *small[3:]]


def test_the_first_to_come_reads_at_least_half_and_the_shortest_rest_comes_next() -> None:
    scheduler, (long, middle, short) = _scheduler(), _sequences(1000, 200, 30)
    scheduler.add([long, middle, short])
    scheduler.take_in(lambda _: True)
    assert dict(scheduler.reading(100)) == {long: 50, short: 30, middle: 20}
    middle.position, short.position = 200, 30
    assert dict(scheduler.reading(100)) == {long: 100}


def test_no_step_reads_more_than_its_tokens() -> None:
    scheduler, sequences = _scheduler(), _sequences(7, 300, 5, 1)
    scheduler.add(sequences)
    scheduler.take_in(lambda _: True)
    for tokens in range(0, 400, 7):
        given = dict(scheduler.reading(tokens))
        assert sum(given.values()) == min(tokens, 313)
        assert all(0 < count <= s.target for s, count in given.items())


def test_a_row_is_given_up_after_its_quantum_only_when_another_waits() -> None:
    scheduler, (first, second, third) = _scheduler(max_rows=2), _sequences(1, 1, 1)
    scheduler.add([first, second])
    scheduler.take_in(lambda _: True)
    for _ in range(10):
        first.append(0)
    assert scheduler.spent() is None
    scheduler.add([third])
    assert scheduler.spent() is first
    scheduler.requeue(first, last=True)
    assert scheduler.waiting == [third, first]
    assert scheduler.take_in(lambda _: True) == [third]
    assert scheduler.spent() is None


def test_one_that_had_to_read_again_first_writes_as_much() -> None:
    scheduler, (first, second) = _scheduler(max_rows=1, quantum=3), _sequences(1, 1)
    scheduler.add([first, second])
    scheduler.take_in(lambda _: True)
    first.reread = 5
    for _ in range(5):
        assert scheduler.spent() is None
        first.append(0)
    assert scheduler.spent() is first


def test_one_that_gave_way_keeps_its_place() -> None:
    scheduler, sequences = _scheduler(max_rows=2), _sequences(1, 1, 1)
    scheduler.add(sequences)
    scheduler.take_in(lambda _: True)
    victim = scheduler.last_to_come()
    assert victim is sequences[1]
    scheduler.requeue(victim, last=False)
    assert scheduler.waiting == sequences[1:]


def test_choices_wait_until_the_first_has_read_their_prompt() -> None:
    scheduler, (leader, follower) = _scheduler(), _sequences(3, 3)
    follower.leader = leader
    scheduler.add([leader, follower])
    assert scheduler.take_in(lambda _: True) == [leader]
    leader.position = 3
    assert scheduler.take_in(lambda _: True) == [follower]


def test_texts_that_ask_for_a_vector_leave_the_step_to_others():
    scheduler = Scheduler(4, 8, 1, 8)
    vectors = [Sequence(Request([0] * 100, max_tokens=0, embed="mean"), f"v{i}", 0, [0] * 100, 0) for i in range(2)]
    scheduler.add(vectors)
    scheduler.take_in(lambda sequence: True)
    assert sum(dict(scheduler.reading(150)).values()) == 150
    assert dict(scheduler.reading(150, beside=True)) == {vectors[0]: 48}
    chat = Sequence(Request([0] * 500), "c", 0, [0] * 500, 0)
    scheduler.add([chat])
    scheduler.take_in(lambda sequence: True)
    assert dict(scheduler.reading(150)) == {vectors[0]: 48, chat: 102}
