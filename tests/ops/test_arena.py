"""Results of recorded computations: later ones take the places of those that are gone, and replays are as before."""

import pytest
import torch

from atma.ops import native
from atma.ops.native.arena import Arena, ArenaFull, Places
from atma.ops.native.recorder import Recorder, TooLarge

needs_kernels = pytest.mark.skipif(native.status().library is None, reason="no compiled kernels here")


def test_a_place_is_free_again_when_its_tensor_and_every_view_of_it_are_gone() -> None:
    places = Places(Arena(1 << 20))
    first, second = (places.like(torch.empty(100)) for _ in range(2))
    start, view = first.data_ptr(), first.view(10, 10)[3:].t()
    del first
    assert places.like(torch.empty(100)).data_ptr() != start
    del view
    assert places.like(torch.empty(50, 2)).data_ptr() == start
    assert second.data_ptr() == start + 448


def test_tensors_that_live_together_share_no_byte() -> None:
    places, held = Places(Arena(1 << 20)), {}
    chance = torch.Generator().manual_seed(0)
    for i in range(400):
        size = int(torch.randint(1, 3000, (), generator=chance))
        held[i] = places.like(torch.empty(size, dtype=torch.uint8)).fill_(i % 256)
        held.pop(int(torch.randint(0, i + 1, (), generator=chance)), None)
    assert len(held) > 20
    assert all((x == i % 256).all() for i, x in held.items())


def test_an_arena_keeps_shapes_strides_and_its_bound() -> None:
    arena = Arena(4096)
    x = Places(arena).like(torch.empty(3, 5, dtype=torch.float64).t())
    assert (x.shape, x.stride(), x.dtype) == ((5, 3), (1, 5), torch.float64)
    assert arena.bytes == 128
    with pytest.raises(ArenaFull, match="do not fit in 4,096"):
        Places(arena).like(torch.empty(1025))


@needs_kernels
def test_two_recordings_in_one_arena_replay_in_turn() -> None:
    x, arena = torch.zeros(1000), Arena(1 << 16)

    def chain(start: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            start = (start * 2 + 1) / 2
        return start

    with torch.no_grad(), Recorder([x], arena) as one:
        first = chain(x)
    with torch.no_grad(), Recorder([x], arena) as other:
        second = chain(x.sigmoid())
    programs = one.program(), other.program()
    assert arena.bytes <= 4 * 4032
    for value in (3.0, -1.0):
        x.fill_(value)
        programs[0].replay()
        assert torch.equal(first, chain(x))
        programs[1].replay()
        torch.testing.assert_close(second, chain(x.sigmoid()))


@needs_kernels
def test_what_does_not_fit_in_the_arena_is_refused() -> None:
    x = torch.zeros(1000)
    with torch.no_grad(), pytest.raises(TooLarge, match="do not fit"), Recorder([x], Arena(1000)):
        x + 1
