"""A run records the threads that its bits depend on."""

from collections.abc import Iterator

import pytest
import torch
from tiny_run import tiny_recipe, tiny_source

from atma.train import read_record
from atma.train.loop import Stopped, fit
from atma.train.resume import recorded_threads


@pytest.fixture(autouse=True)
def _own_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_checkpoint_tells_its_threads_and_going_on_with_others_is_recorded(tmp_path):
    torch.set_num_threads(2)
    recipe, source = tiny_recipe(), tiny_source()
    with pytest.raises(Stopped):
        fit(recipe, tmp_path / "run", source, stop=lambda: True)
    assert recorded_threads(tmp_path / "run") == 2
    torch.set_num_threads(1)
    fit(recipe, tmp_path / "run", source, resume=True)
    events = [row["event"] for row in read_record(tmp_path / "run") if row["kind"] == "event"]
    assert any("made with 2 threads, goes on with 1" in event for event in events)
    assert recorded_threads(tmp_path / "run") == 1


def test_a_folder_without_checkpoints_tells_no_threads(tmp_path):
    assert recorded_threads(tmp_path) == 0
