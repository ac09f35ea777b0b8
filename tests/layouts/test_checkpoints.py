"""Checkpoints of transformers compute with us what they compute there, whole, in pieces and token by token."""

import json

import pytest
import torch
from safetensors.torch import load_file

from atma.layouts import export_checkpoint, import_checkpoint
from tests.layouts.checkpoints import FORMS, checkpoint
from tests.layouts.in_double import doubled

TOKENS = torch.randint(3, 99, (2, 40), generator=torch.Generator().manual_seed(1))


def read(model, tokens, cuts) -> torch.Tensor:
    """Logits (B, T, V) of tokens read in pieces of these sizes; one piece without a state where there is one alone."""
    if len(cuts) == 1:
        return model.logits(model(tokens)[0])
    state, found = model.init_state(*tokens.shape), []
    for piece in tokens.split(cuts, 1):
        hidden, state = model(piece, state)
        found.append(model.logits(hidden))
    return torch.cat(found, 1)


@pytest.mark.parametrize("cuts", [[40], [13, 26, 1], [1] * 40], ids=["whole", "chunks", "steps"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, form, cuts):
    theirs = checkpoint(tmp_path / "theirs", form)
    ours = import_checkpoint(tmp_path / "theirs", tmp_path / "ours").eval()
    wanted = theirs(TOKENS).logits
    assert (read(ours, TOKENS, cuts) - wanted).abs().max() <= 1e-4
    exact = doubled(theirs, TOKENS)
    assert (read(ours.double(), TOKENS, cuts) - exact).abs().max() <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["10GB", "40kB"])
@pytest.mark.parametrize("form", ["llama", "llama, tied", "lfm2", "qwen3.5"])
def test_what_comes_back_is_the_same_bits_in_the_same_files(tmp_path, form, shard, dtype):
    checkpoint(tmp_path / "theirs", form, dtype, shard)
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    names = {path.name for path in (tmp_path / "theirs").glob("*.safetensors*")}
    assert names == {path.name for path in (tmp_path / "back").glob("*.safetensors*")}
    for name in sorted(names):
        if name.endswith(".json"):
            first, second = (json.loads((tmp_path / at / name).read_text())["weight_map"] for at in ("theirs", "back"))
            assert first == second
        else:
            first, second = (load_file(tmp_path / at / name) for at in ("theirs", "back"))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[one], second[one]) and first[one].dtype == second[one].dtype for one in first)
            assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    assert json.loads((tmp_path / "theirs/config.json").read_text()) == json.loads(
        (tmp_path / "back/config.json").read_text()
    )
