"""Files of saved texts that somebody has made or altered, their digests right."""

import json

import pytest

from atma import state as states
from atma.generation import Generation, Settings, _digest
from tests.test_generate import WORDS, fresh_model


@pytest.fixture(scope="module")
def model():
    return fresh_model()


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": "x"},
        {"tokens": [1, -5]},
        {"tokens": None},
        {"random": 5},
        {"random": "??"},
        {"text": {}},
        {"text": 1},
    ],
)
def test_a_saved_text_whose_parts_do_not_fit_is_one_clear_error(model, tmp_path, change):
    """Even where its digest is right, as in a file that somebody made."""
    path = tmp_path / "s"
    generation = Generation(model, WORDS, Settings(max_tokens=3))
    generation.feed("ab")
    list(generation.write())
    generation.save(path)
    state, metadata = states.load(path, model.init_state(1, 1))
    about = {name: part for name, part in json.loads(metadata["generation"]).items() if name != "sha256"} | change
    about["sha256"] = _digest(states.tensors(state), about)
    states.save(state, path, {"generation": json.dumps(about)})
    with pytest.raises(ValueError, match="damaged") as refused:
        Generation.resume(path, model, WORDS)
    assert "\n" not in str(refused.value)


def test_a_saved_text_with_tensors_of_another_model_is_one_clear_error(model, tmp_path):
    path, other = tmp_path / "s", fresh_model(depth=2 * model.config.depth)
    generation = Generation(model, WORDS)
    generation.feed("ab")
    generation._state = other.init_state(1, 8)
    generation.save(path)
    with pytest.raises(ValueError, match="not a saved state of this model"):
        Generation.resume(path, model, WORDS)


def test_a_saved_text_goes_where_a_link_points(model, tmp_path):
    (tmp_path / "disk").mkdir()
    link, place = tmp_path / "text", tmp_path / "disk" / "text"
    link.symlink_to(place)
    generation = Generation(model, WORDS)
    generation.feed("ab")
    for _ in ("not there yet", "replaced"):
        generation.save(link)
        assert link.is_symlink() and not place.is_symlink()
    Generation.resume(place, model, WORDS)
