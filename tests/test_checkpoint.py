import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atma.checkpoint import load_info, load_model, save_model
from atma.config import ModelConfig
from atma.folders import json_writer, write_folder
from atma.model import Model
from atma.tokenizer import byte_tokenizer, train_bpe

FILES = ["config.json", "manifest.json", "model.safetensors", "modeling_atma.py"]
SIZES = {"width": 16, "depth": 3, "query_heads": 2, "key_value_heads": 1, "head_width": 8, "mlp_multiple": 2}


def small(**changes) -> Model:
    return Model(ModelConfig(**({"vocab_size": 257} | SIZES | changes)), torch.Generator().manual_seed(0))


def random_head(model: Model) -> Model:
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", random_head(small()), byte_tokenizer(), {"tokens": 12})
    return tmp_path / "model"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def unlisted(folder: Path) -> Path:
    """The same folder without hashes, as one made by hand."""
    (folder / "manifest.json").unlink()
    return folder


def edit(folder: Path, change) -> Path:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))
    return unlisted(folder)


LEARNED = {"max_half_life": 9, "learned_half_life": True}


@pytest.mark.parametrize(
    "changes", [{}, {"tied_head": True}, {"core": "rope", "memory": False}, {"max_half_life": 9}, LEARNED]
)
def test_a_model_comes_back_bit_for_bit(tmp_path, changes):
    model = random_head(small(**changes))
    save_model(tmp_path / "model", model, byte_tokenizer())
    again, tokenizer = load_model(tmp_path / "model")
    assert again.config == model.config and tokenizer is not None and tokenizer.hash() == byte_tokenizer().hash()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert (again.head.weight is again.embed.weight) == model.config.tied_head


def test_a_folder_holds_three_files_and_their_hashes_and_nothing_is_left_beside_it(folder):
    assert names(folder) == [*FILES, "tokenizer.json", "tokenizer_config.json"]
    assert names(folder.parent) == ["model"]
    assert load_info(folder)["extra"] == {"tokens": 12}


def test_a_tied_head_is_stored_once(tmp_path):
    save_model(tmp_path / "model", small(tied_head=True), None)
    assert "head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    assert load_model(tmp_path / "model")[1] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_widened(folder, dtype):
    path = unlisted(folder) / "model.safetensors"
    narrow = {name: value.to(dtype) for name, value in load_file(path).items()}
    save_file(narrow, path)
    model, _ = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.embed.weight, narrow["embed.weight"].float())


def test_saving_again_replaces_the_older_model(folder):
    save_model(folder, small(width=24), None)
    assert load_model(folder)[0].config.width == 24
    assert names(folder) == FILES and names(folder.parent) == ["model"]


def test_what_ends_a_turn_stays_with_the_same_tokenizer_only(folder):
    told = {
        "generation_config.json": '{"eos_token_id": [256, 10]}',
        "special_tokens_map.json": "{}",
        "tokenizer_config.json": '{"eos_token": "<|endoftext|>", "chat_template": "{{ messages }}", "mine": 1}',
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in told.items():
        (folder / name).write_text(text)
    save_model(folder, small(), byte_tokenizer())
    assert {name: (folder / name).read_text() for name in told} == told
    save_model(folder, small(vocab_size=258), train_bpe(["abab"], 258))
    assert not (folder / "generation_config.json").exists() and not (folder / "special_tokens_map.json").exists()
    kept = json.loads((folder / "tokenizer_config.json").read_text())
    assert kept["chat_template"] == "{{ messages }}" and "mine" not in kept
    assert (folder / "chat_template.jinja").is_file()


def test_a_crash_between_the_two_renames_loses_nothing(folder):
    folder.rename(folder.parent / ".model.old")
    (folder.parent / ".model.staging").mkdir()
    assert load_model(folder)[0].config.width == 16
    save_model(folder, small(), None)
    assert names(folder.parent) == ["model"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such model folder"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("at", [0, 100, -1])
def test_one_flipped_bit_is_found(folder, name, at):
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}: contents differ from the SHA-256 in manifest.json: damaged"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_truncated_file_is_named_with_both_sizes(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-9])
    with pytest.raises(ValueError, match=rf"{name}: {len(data) - 9} bytes, manifest.json says {len(data)}: truncated"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_the_manifest_lists_must_be_there(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}: missing, though manifest.json lists it"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_the_manifest_leaves_out_is_not_vouched_for(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"{name}: manifest.json does not list it"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": [1]}', '{"files": {"config.json": 3}}'])
def test_a_damaged_manifest_is_named(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json: "):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights_are_found_without_a_manifest_too(folder, kept):
    path = unlisted(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable safetensors file, truncated or damaged"):
        load_model(folder)


def test_missing_weights_are_named_without_a_manifest_too(folder):
    (unlisted(folder) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: missing"):
        load_model(folder)


def change_weights(folder: Path, change) -> Path:
    path = unlisted(folder) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def test_a_missing_tensor_is_named(folder):
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'norm.weight' is missing \(1 in all\)"):
        load_model(change_weights(folder, lambda tensors: tensors.pop("norm.weight")))


def test_an_unexpected_tensor_is_named(folder):
    with pytest.raises(ValueError, match=r"model.safetensors: unexpected tensor 'extra' \(1 in all\)"):
        load_model(change_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(1))))


def test_a_tensor_of_another_shape_is_named_with_both(folder):
    with pytest.raises(ValueError, match=r"tensor 'norm.weight' is \(3,\), the config says \(16,\)"):
        load_model(change_weights(folder, lambda tensors: tensors.update({"norm.weight": torch.zeros(3)})))


def test_weights_that_are_not_numbers_with_a_fraction_are_refused(folder):
    with pytest.raises(ValueError, match=r"tensor 'norm.weight' is torch.int64, not a floating type"):
        load_model(change_weights(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(16).long()})))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("wdith", 16, r"config.json: unknown key 'wdith'; did you mean 'width'\?"),
        ("width", "wide", r"config.json: 'width' must be of type int, not 'wide'"),
        ("width", 0, r"config.json: 'width' must be at least 1, not 0"),
        ("width", 24, r"model.safetensors: tensor '.*' is .*, the config says .*: weights of another config"),
        ("depth", 2, r"model.safetensors: unexpected tensor 'blocks.2"),
        ("depth", 4, r"model.safetensors: tensor 'blocks.3.* is missing"),
        ("core", "nope", r"model.safetensors: unexpected tensor"),
        ("vocab_size", 100, r"the config says|the tokenizer of another model"),
    ],
)
def test_a_config_that_is_wrong_or_of_another_model_is_refused(folder, key, value, message):
    with pytest.raises(ValueError, match=message):
        load_model(edit(folder, lambda values: values["model"].update({key: value})))


def test_a_config_of_another_program_is_refused(folder):
    with pytest.raises(ValueError, match=r"config.json: format None, not 'atma-1'"):
        load_model(edit(folder, lambda values: values.pop("format")))
    (folder / "config.json").write_text('{"format": "atma-1"}')
    with pytest.raises(ValueError, match=r"config.json: no table 'model'"):
        load_model(folder)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"3"])
def test_a_config_that_is_not_json_is_refused(folder, data):
    (unlisted(folder) / "config.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"config.json: not "):
        load_model(folder)


def test_a_larger_tokenizer_than_the_model_is_refused(tmp_path):
    save_model(tmp_path / "model", small(vocab_size=100), byte_tokenizer())
    with pytest.raises(ValueError, match=r"tokenizer.json: 257 tokens, but config.json has vocab_size 100"):
        load_model(tmp_path / "model")


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(folder):
    before = (folder / "model.safetensors").read_bytes()

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space left on device"):
        write_folder(folder, {"config.json": json_writer({}), "model.safetensors": full})
    assert (folder / "model.safetensors").read_bytes() == before and names(folder.parent) == ["model"]
    assert load_model(folder)[0].config.width == 16


def test_a_disk_that_fails_to_sync_leaves_the_old_folder(folder, monkeypatch):
    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        save_model(folder, small(width=24), None)
    monkeypatch.undo()
    assert load_model(folder)[0].config.width == 16 and names(folder.parent) == ["model"]


LIMITED = """
import resource, sys
import torch
from test_checkpoint import small
from atma.checkpoint import save_model
model = small(width=64)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_model(sys.argv[1], model, None)
except OSError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system limits no file sizes")
def test_weights_that_really_cannot_be_written_leave_the_old_model(folder):
    command = [sys.executable, "-c", LIMITED, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=600)
    assert ended.returncode == 2, ended.stderr
    assert f"{folder}: cannot be written, what was there stays as it was: " in ended.stdout
    assert load_model(folder)[0].config.width == 16 and names(folder.parent) == ["model"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for where in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match=r"something other than a model|is a file"):
            save_model(where, small(), None)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
