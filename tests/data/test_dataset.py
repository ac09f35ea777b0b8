"""A token set opens, reads and checks prepared folders and shards as others publish them."""

import contextlib
import hashlib
import json
import re
import shutil

import numpy as np
import pytest

from atma.data.dataset import TokenSet
from atma.tokenizer import byte_tokenizer
from tests.data.conftest import text_of


def test_documents_of_both_splits_are_the_corpus(prepared):
    found = []
    for split in ("train", "validation"):
        tokens = TokenSet.open(prepared, split, verify=True)
        for i in range(tokens.documents):
            document = tokens.document(i)
            assert document[0] == tokens.eot
            assert len(document) == tokens.lengths[i]
            found.append(tokens.tokenizer.decode(document[1:]))
    assert sorted(found) == sorted(text_of(number) for number in range(60))


def test_the_stream_is_its_documents_one_after_another_across_shards(prepared):
    tokens = TokenSet.open(prepared)
    assert len(tokens.manifest["splits"]["train"]["shards"]) > 2
    joined = np.concatenate([tokens.document(i) for i in range(tokens.documents)])
    assert np.array_equal(tokens.read(0, tokens.tokens), joined)
    starts = np.array([0, 9_990, tokens.tokens - 300])
    assert np.array_equal(tokens.rows(starts, 300), np.stack([joined[s : s + 300] for s in starts]))


def test_the_hash_names_the_data(prepared, corpus, tmp_path):
    from atma.data.prepare import Preparation, prepare

    prepare(corpus, tmp_path / "again", Preparation(shard_tokens=10_000))
    prepare(corpus, tmp_path / "other", Preparation(shard_tokens=10_000, seed=1))
    assert TokenSet.open(tmp_path / "again").hash == TokenSet.open(prepared).hash
    assert TokenSet.open(tmp_path / "other").hash != TokenSet.open(prepared).hash


def test_positions_and_documents_that_do_not_exist_are_refused(prepared):
    tokens = TokenSet.open(prepared)
    for start, stop in ((-1, 3), (0, tokens.tokens + 1), (5, 4)):
        with pytest.raises(ValueError, match="are not within"):
            tokens.read(start, stop)
    for i in (-1, tokens.documents):
        with pytest.raises(ValueError, match=f"document {i} does not exist"):
            tokens.document(i)


def test_published_shards_are_read_as_they_are(shard, tmp_path):
    shard("fineweb_train_000002.bin", [8, 50_256, 9])
    shard("fineweb_train_000001.bin", [50_256, 1, 2, 50_256, 3])
    shard("fineweb_val_000000.bin", [4, 5, 50_256, 6])
    train, validation = TokenSet.open(tmp_path), TokenSet.open(tmp_path, "validation")
    assert (train.vocab_size, train.eot, train.tokens) == (50_257, 50_256, 8)
    assert [train.document(i).tolist() for i in range(train.documents)] == [[50_256, 1, 2], [50_256, 3, 8], [50_256, 9]]
    assert [validation.document(i).tolist() for i in range(validation.documents)] == [[4, 5], [50_256, 6]]
    assert train.tokenizer is None
    assert TokenSet.open(tmp_path / "fineweb_val_000000.bin").tokens == 4


def test_the_long_layout_brings_its_own_vocabulary(shard, tmp_path):
    shard("train.bin", [128_000, 100_000, 128_000, 5], 128_256)
    tokens = TokenSet.open(tmp_path)
    assert (tokens.vocab_size, tokens.documents) == (128_256, 2)
    assert tokens.document(0).tolist() == [128_000, 100_000]


def test_a_vocabulary_given_or_beside_published_shards_is_taken(shard, tmp_path):
    shard("train.bin", [7, 1, 7, 2])
    assert TokenSet.open(tmp_path, vocab_size=8, eot=7).documents == 2
    byte_tokenizer().save(tmp_path / "tokenizer.json")
    tokens = TokenSet.open(tmp_path)
    assert (tokens.vocab_size, tokens.eot) == (257, 256)
    assert tokens.tokenizer.name == "bytes"


def test_published_shards_that_do_not_fit_are_refused(shard, tmp_path):
    path = shard("train_0.bin", [1, 2, 60_000])
    with pytest.raises(ValueError, match=r"train_0.bin: token id 60000 at 2 is outside the vocabulary of 50,257"):
        TokenSet.open(tmp_path)
    with pytest.raises(ValueError, match=r"no validation shard; none of its 1 .bin files has 'validation' or 'valid'"):
        TokenSet.open(tmp_path, "validation")
    with pytest.raises(ValueError, match="nothing to verify against"):
        TokenSet.open(tmp_path, verify=True)
    path.unlink()
    shard("train_0.bin", [1])
    shard("train_1.bin", [1], 100_000)
    with pytest.raises(ValueError, match=r"train_1.bin: magic 20240801, but train_0.bin has 20240520"):
        TokenSet.open(tmp_path)


def test_a_place_without_data_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="absent: no such data; make it with `atma prepare`"):
        TokenSet.open(tmp_path / "absent")
    with pytest.raises(ValueError, match="make them with `atma prepare`"):
        TokenSet.open(tmp_path)
    with pytest.raises(ValueError, match="split must be train or validation, not 'test'"):
        TokenSet.open(tmp_path, "test")


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "copy")


def flip(path, position=-1):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train_000001.bin", "train_000001.documents.npy"])
def test_a_flipped_bit_is_found_by_verification(copy, name):
    flip(copy / name)
    with pytest.raises(ValueError, match=rf"{name}: damaged"):
        TokenSet.open(copy, verify=True)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train_000000.bin", lambda path: path.unlink(), "train_000000.bin: no such token shard"),
        ("train_000000.bin", lambda path: path.write_bytes(path.read_bytes()[:-8]), "train_000000.bin: truncated"),
        ("train_000000.documents.npy", lambda path: path.unlink(), "documents.npy: no such document index"),
        ("train_000000.documents.npy", lambda path: path.write_bytes(b"no"), "documents.npy: not a document index"),
        ("train_000000.documents.npy", lambda path: path.write_bytes(b""), "documents.npy: not a document index"),
        ("train_000000.documents.npy", lambda path: np.save(path, np.array([0, 5, 5])), "documents.npy: damaged"),
        ("train_000000.documents.npy", lambda path: np.save(path, np.array([0, 5])), "2 documents, but manifest.json"),
        ("tokenizer.json", lambda path: path.unlink(), "tokenizer.json: no such tokenizer file"),
        (
            "tokenizer.json",
            lambda path: byte_tokenizer().backend.save(str(path)),
            "not the tokenizer that manifest.json",
        ),
        ("manifest.json", lambda path: path.write_text("{}"), "manifest.json: not a manifest of token shards"),
        ("manifest.json", lambda path: path.write_text("[1]"), "manifest.json: not a manifest of token shards"),
        ("manifest.json", lambda path: path.write_bytes(b"\xff"), "manifest.json: not a manifest of token shards"),
    ],
)
def test_a_damaged_folder_is_named_with_what_is_wrong(copy, name, damage, message):
    damage(copy / name)
    with pytest.raises(ValueError, match=message):
        TokenSet.open(copy)


@pytest.mark.parametrize("key", ["file", "tokens", "sha256", "index"])
def test_a_manifest_without_a_field_or_with_a_path_is_refused(copy, key):
    manifest = json.loads((copy / "manifest.json").read_text())
    for value in (None, "../elsewhere"):
        manifest["splits"]["train"]["shards"][0][key] = value
        (copy / "manifest.json").write_text(json.dumps(manifest))
        if key != "sha256" or value is None:
            with pytest.raises(ValueError, match=r"manifest.json: not a manifest of token shards, or damaged"):
                TokenSet.open(copy)


def test_an_id_outside_the_vocabulary_is_found_when_it_is_read(copy):
    path = copy / "train_000000.bin"
    data = bytearray(path.read_bytes())
    data[-2:] = (300).to_bytes(2, "little")
    path.write_bytes(data)
    tokens = TokenSet.open(copy)
    with pytest.raises(
        ValueError, match=r"token id 300 between 0 and .* is outside the vocabulary of 257: damaged data"
    ):
        tokens.read(0, tokens.tokens)


def test_a_prepared_folder_brings_its_own_vocabulary(copy):
    with pytest.raises(ValueError, match=r"vocab_size and eot are for shards without a manifest.json"):
        TokenSet.open(copy, vocab_size=300)


def test_a_set_lost_between_two_renames_is_put_back(copy):
    copy.rename(copy.parent / ".copy.old")
    assert TokenSet.open(copy).documents > 0


@pytest.mark.parametrize("at", ["version", "brace", "dtype", "shape", "more", "less", "zip", "nothing"])
def test_any_damage_of_a_document_index_is_one_line(prepared, tmp_path, at):
    folder = shutil.copytree(prepared, tmp_path / "set")
    path = next(folder.glob("train*.npy"))
    data = path.read_bytes()
    damaged = {
        "version": data.replace(b"\x01\0", b"\x09\0", 1),
        "brace": data.replace(b"}", b" ", 1),
        "dtype": data.replace(b"<i8", b"O8)", 1),
        "shape": re.sub(rb"\((\d+),\)", rb"(9\1,)", data, count=1),
        "more": data + b"\0" * 8,
        "less": data[:-3],
        "zip": b"PK\x03\x04" + data[4:],
        "nothing": b"",
    }
    path.write_bytes(damaged[at])
    with pytest.raises(ValueError, match=r"documents.npy: not a document index, or a damaged one"):
        TokenSet.open(folder)


def test_a_byte_changed_anywhere_in_a_document_index_is_never_another_error(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "set")
    path = next(folder.glob("train*.npy"))
    data = path.read_bytes()
    for place in range(min(len(data), 200)):
        for value in (0, 32, 39, 255):
            path.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            with contextlib.suppress(ValueError):
                TokenSet.open(folder)


def test_a_shard_that_the_manifest_does_not_list_is_not_vouched_for(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "set")
    shutil.copy(next(folder.glob("train*.bin")), folder / "train_000099.bin")
    TokenSet.open(folder)
    with pytest.raises(ValueError, match=r"train_000099.bin: manifest.json does not list it"):
        TokenSet.open(folder, verify=True)


def test_a_manifest_nested_without_end_is_one_line(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "set")
    (folder / "manifest.json").write_text('{"splits": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"manifest.json: not a manifest of token shards"):
        TokenSet.open(folder)


def test_what_a_manifest_only_tells_is_no_part_of_the_hash(prepared, tmp_path):
    """Data prepared before these were told has the hash that models and runs trained on it remember."""
    prepared = shutil.copytree(prepared, tmp_path / "set")
    before = TokenSet.open(prepared).hash
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    told = {key: manifest.pop(key) for key in ("passed_over", "lost_characters")}
    told |= {name: split.pop("long_documents") for name, split in manifest["splits"].items()}
    assert all(value is not None for value in told.values())
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert TokenSet.open(prepared).hash == before == hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["seed"] += 1
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert TokenSet.open(prepared).hash != before
