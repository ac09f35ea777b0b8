"""When a job of Ray is started again, with a Ray that is told what becomes of its processes."""

import itertools
from types import SimpleNamespace

import pytest

from atma.launching import by_ray
from atma.launching.by_ray import Asked, Job


class Lost(Exception):
    """What Ray raises for a task whose actor is gone."""


class Failed(Lost):
    """What Ray raises for a task that has raised `cause`."""

    cause = FileNotFoundError(2, "No such file or directory", "runs/own/.jobs/ray-1-0-0.log")


class Ray:
    """Places actors on machines in turn; what `statuses` has next for a start is what becomes of its processes."""

    exceptions = SimpleNamespace(RayError=Lost, RayTaskError=Failed)

    def __init__(self, machines, *statuses):
        self.machines, self.statuses, self.started, self.groups = itertools.cycle(machines), iter(statuses), [], 0
        scheduling = SimpleNamespace(PlacementGroupSchedulingStrategy=lambda group, placement_group_bundle_index: None)
        self.util = SimpleNamespace(
            placement_group=self._group, remove_placement_group=self._remove, scheduling_strategies=scheduling
        )
        self._now = []

    def _group(self, bundles, strategy):
        self.groups += 1
        self._now = list(next(self.statuses))
        self.started.append([])
        return bundles

    def _remove(self, group):
        self.groups -= 1

    def remote(self, **options):
        return lambda actor: SimpleNamespace(options=lambda **more: SimpleNamespace(remote=self._actor))

    def _actor(self):
        machine = next(self.machines)
        call = lambda function: SimpleNamespace(remote=function)  # noqa: E731
        return SimpleNamespace(
            here=call(lambda: "lost" if machine == "gone" else (machine, 20_000)),
            run=call(self._run),
            stop=call(lambda seconds: None),
        )

    def _run(self, line, where, place, log):
        self.started[-1].append(place)
        return self._now[place.rank]

    def wait(self, tasks, num_returns=1, timeout=0):
        done = [task for task in tasks if task != "runs"]
        return done, [task for task in tasks if task == "runs"]

    def get(self, task):
        if isinstance(task, list):
            return [self.get(one) for one in task]
        if task in ("lost", "failed"):
            raise {"lost": Lost, "failed": Failed}[task]
        return task

    def kill(self, actor):
        pass


def run(ray, tmp_path, max_failures=3, processes=2) -> Job:
    """A job, followed to its end."""
    job = Job(ray, Asked({"CPU": 1}, {}, processes, max_failures), ["train"], tmp_path, 0)
    for _ in range(100):
        if job.over():
            assert ray.groups == 0, "its places are given back"
            return job
    raise AssertionError("it goes on for ever")


def test_processes_of_one_machine_are_beside_each_other_and_each_knows_its_number_there(tmp_path):
    ray = Ray(["a", "b"], [0] * 4)
    assert run(ray, tmp_path, processes=4).failure is None
    assert [(place.rank, place.local_rank, place.address) for place in ray.started[0]] == [
        (0, 0, "a"),
        (1, 1, "a"),
        (2, 0, "a"),
        (3, 1, "a"),
    ]
    assert {place.world for place in ray.started[0]} == {4}


@pytest.mark.parametrize("end", ["lost", -9])
def test_a_job_that_has_lost_a_process_is_started_again_as_the_same_job(end, tmp_path):
    ray = Ray(["a"], [2, end], [0, 0])
    assert run(ray, tmp_path).failure is None
    first, second = (start[0] for start in ray.started)
    assert (first.starts, second.starts) == (0, 1) and first.job == second.job


def test_it_is_lost_for_good_when_it_was_lost_too_often(tmp_path):
    ray = Ray(["a"], [2, "lost"], [2, 2], ["lost", 2])
    assert run(ray, tmp_path, max_failures=2).failure == "process 0 was lost; max_failures=2 allows no other start"
    assert len(ray.started) == 3


def test_a_mistake_is_made_once(tmp_path):
    ray = Ray(["a"], [2, 2])
    assert run(ray, tmp_path).failure == "process 0 ended with status 2"
    assert len(ray.started) == 1


def test_the_others_of_one_that_has_failed_are_given_time_and_then_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(by_ray, "PATIENCE_SECONDS", 0.0)
    ray = Ray(["a"], ["runs", "lost"], [0, 0])
    assert run(ray, tmp_path).failure is None
    assert len(ray.started) == 2


def test_one_that_was_told_to_stop_is_not_started_again(tmp_path):
    ray = Ray(["a"], ["lost", 2], [143, 143])
    assert run(ray, tmp_path).failure == "process 0 ended with status 143"
    assert len(ray.started) == 2


def test_a_machine_that_does_not_see_the_folder_is_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"process 1 could not be started: .*No such file or directory: 'runs/own/.jobs"
    ):
        run(Ray(["a"], [0, "failed"]), tmp_path)


def test_a_machine_that_is_gone_before_the_start_is_a_loss_as_any(tmp_path):
    ray = Ray(["a", "gone", "a", "a"], [0, 0], [0, 0])
    assert run(ray, tmp_path).failure is None
    assert [len(start) for start in ray.started] == [0, 2]
    assert run(Ray(["gone"], [0, 0]), tmp_path, max_failures=0).failure.startswith("process 0 was lost")
