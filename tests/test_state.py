"""The operations on a state tree: copies share nothing, saved states come back, damage is noticed."""

import json
import random
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from atma import saved_state
from atma import state as trees
from atma.model import Model
from tests.conftest import tiny


@pytest.fixture
def advanced():
    """A model and its state after nine tokens in each of two rows."""
    model = Model(tiny(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, state = model(torch.arange(18).view(2, 9), model.init_state(2, 16))
    return model, state


def test_a_saved_state_comes_back_to_the_bit_with_its_metadata(advanced, tmp_path):
    _, state = advanced
    trees.save(state, tmp_path / "state.safetensors", {"weights": "abc"})
    loaded, metadata = trees.load(tmp_path / "state.safetensors", advanced[0].init_state(1, 1))
    assert metadata == {"weights": "abc"}
    assert type(loaded) is type(state)
    assert all(torch.equal(a, b) for a, b in zip(trees.tensors(loaded), trees.tensors(state), strict=True))
    assert [type(block) for block in loaded.blocks] == [type(block) for block in state.blocks]


@pytest.mark.parametrize("damage", ["truncate", "garbage", "missing"])
def test_a_damaged_state_file_is_one_clear_error(advanced, tmp_path, damage):
    path = tmp_path / "state.safetensors"
    trees.save(advanced[1], path)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "garbage":
        path.write_bytes(b"not a state")
    else:
        path.unlink()
    with pytest.raises(ValueError, match=r"state\.safetensors"):
        trees.load(path, advanced[0].init_state(1, 1))


def test_a_failed_save_keeps_the_old_file(advanced, tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    trees.save(advanced[1], path, {"version": "old"})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        trees.save(advanced[1], path, {"version": "new"})
    assert trees.load(path, advanced[1])[1] == {"version": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.safetensors"]


def test_rows_and_stack_are_inverse(advanced):
    _, state = advanced
    back = trees.stack([trees.rows(state, [0]), trees.rows(state, [1])])
    assert all(torch.equal(a, b) for a, b in zip(trees.tensors(back), trees.tensors(state), strict=True))


def test_stacking_different_capacities_and_shrinking_are_refused(advanced):
    _, state = advanced
    with pytest.raises(ValueError, match=r"one capacity, not \[16, 32\]"):
        trees.stack([state, trees.grow(state, 32)])
    with pytest.raises(ValueError, match="cannot shrink"):
        trees.grow(state, 8)
    with pytest.raises(ValueError, match="at least one"):
        trees.stack([])


def test_bytes_are_counted_as_the_shapes_say(advanced):
    model, state = advanced
    c = model.config
    local = 3 * 2 * (c.local_taps - 1) * c.width * 4
    keys = 2 * 2 * c.key_value_heads * 16 * c.head_width * 4
    tails = 2 * (c.canon_taps - 1) * (c.query_heads + 2 * c.key_value_heads) * c.head_width * 4
    memory = 2 * c.query_heads * c.head_width**2 * 4
    lengths = 2 * 2 * 4
    assert trees.nbytes(state) == local + keys + tails + memory + lengths
    assert trees.capacity(state) == 16


def test_an_empty_state_needs_a_row_and_room():
    with pytest.raises(ValueError, match="at least one row"):
        Model(tiny()).init_state(0, 4)


def _altered(value, chance):
    """A JSON value with one part of it lost, renamed or of another kind."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(sorted(value))
        rest = {name: part for name, part in value.items() if name != key}
        return chance.choice([rest, rest | {"x": value[key]}, value | {key: _altered(value[key], chance)}])
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], _altered(value[at], chance), *value[at + 1 :]]
    return chance.choice([None, 7, 1e300, True, "x", [], {}, [1], {"kind": "LocalState"}, {"kind": []}, [[[]]]])


def test_no_damage_of_what_a_file_says_of_its_tree_gets_further_than_one_line(advanced, tmp_path):
    path, state = tmp_path / "state.safetensors", advanced[1]
    flat = {}
    shape = saved_state._describe(state, "", flat)
    chance = random.Random(0)
    for told in [*(_altered(shape, chance) for _ in range(300)), "deep"]:
        text = "[" * 100_000 + "]" * 100_000 if told == "deep" else json.dumps(told)
        save_file({name: x.contiguous() for name, x in flat.items()}, path, {"state": text})
        try:
            loaded, _ = trees.load(path, state)
        except ValueError as error:
            assert "\n" not in str(error)
            assert str(path) in str(error)
        else:  # one tensor stands for another of its shape
            assert type(loaded) is type(state)
            assert all(isinstance(x, torch.Tensor) for x in trees.tensors(loaded))


class Named(NamedTuple):
    length: torch.Tensor
    seen: torch.Tensor

    grows = ("seen",)


def test_names_alone_of_what_grows_mean_the_last_axis_but_one(tmp_path):
    state = Named(torch.tensor([2], dtype=torch.int32), torch.ones(1, 3, 2, 5))
    assert trees.capacity(state) == 2 and [leaf.axis for leaf in trees.leaves(state)] == [None, 2]
    wider = trees.grow(state, 7)
    assert wider.seen.shape == (1, 3, 7, 5) and not wider.seen[:, :, 2:].any()
    trees.save(wider, tmp_path / "s")
    assert torch.equal(trees.load(tmp_path / "s", state)[0].seen, wider.seen)


def test_a_saved_state_comes_to_the_device_of_the_model_that_goes_on_with_it(advanced, tmp_path):
    model, state = advanced
    trees.save(state, tmp_path / "state.safetensors")
    loaded, _ = trees.load(tmp_path / "state.safetensors", model.to("meta").init_state(1, 1))
    assert {x.device.type for x in trees.tensors(loaded)} == {"meta"}
