"""Preparing gives a whole, reproducible folder or leaves everything as it was."""

import dataclasses
import errno
import gzip
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from atma.checkpoint import load_model, save_model
from atma.cli import main
from atma.config import preset as model_preset
from atma.data import corpus as corpus_module
from atma.data.dataset import TokenSet
from atma.data.prepare import Preparation, prepare
from atma.data.sample import sample_texts
from atma.data.summary import lines, long_documents
from atma.model import Model
from atma.tokenizer import load_tokenizer, train_bpe
from tests.data.conftest import text_of


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts(folder: Path) -> list[str]:
    found = []
    for split in json.loads((folder / "manifest.json").read_text())["splits"]:
        tokens = TokenSet.open(folder, split, verify=True)
        found += [tokens.tokenizer.decode(tokens.document(i)[1:]) for i in range(tokens.documents)]
    return sorted(found)


def test_the_same_source_and_options_give_the_same_bytes(corpus, tmp_path):
    for tokenizer in ("bytes", "bpe"):
        options = Preparation(tokenizer=tokenizer, vocab_size=265)
        for name in ("a", "b"):
            prepare(corpus, tmp_path / name, options)
        assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_folder_holds_what_its_manifest_says_and_nothing_else(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    entries = [entry for split in manifest["splits"].values() for entry in split["shards"]]
    names = {entry[key] for entry in entries for key in ("file", "index")}
    assert names | {"manifest.json", "tokenizer.json"} == {path.name for path in prepared.iterdir()}
    assert sum(split["documents"] for split in manifest["splits"].values()) == 60
    assert sum(split["bytes"] for split in manifest["splits"].values()) == sum(len(text_of(i)) for i in range(60))
    for split in manifest["splits"].values():
        assert split["tokens"] == split["bytes"] + split["documents"]
        assert split["tokens"] == sum(entry["tokens"] for entry in split["shards"])
    assert max(entry["tokens"] for entry in entries) <= 10_000
    assert "strata" in manifest["validation_rule"]


def test_no_document_is_in_both_splits_and_long_ones_are_in_both(prepared):
    train, validation = TokenSet.open(prepared), TokenSet.open(prepared, "validation")
    first = {train.document(i).tobytes() for i in range(train.documents)}
    assert not first & {validation.document(i).tobytes() for i in range(validation.documents)}
    longest = sorted([*train.lengths, *validation.lengths])[-5:]
    assert sum(length in longest for length in validation.lengths) == 1
    assert validation.documents == 8 + 1


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_kind_of_file_prepares_to_its_texts(tmp_path, kind):
    originals = [text_of(number) for number in range(30)]
    path = tmp_path / f"a.{kind}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in originals).encode()
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": originals}), path)
    elif kind == "jsonl.zst":
        path.write_bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(lines))
    else:
        path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines)
    prepare(path, tmp_path / "out")
    assert texts(tmp_path / "out") == sorted(originals)


def test_one_text_file_gives_its_end_to_validation(tmp_path):
    (tmp_path / "book.txt").write_text(text_of(500))
    prepare(tmp_path / "book.txt", tmp_path / "out")
    train, validation = TokenSet.open(tmp_path / "out"), TokenSet.open(tmp_path / "out", "validation")
    parts = [tokens.tokenizer.decode(tokens.document(0)[1:]) for tokens in (train, validation)]
    assert "".join(parts) == text_of(500)
    assert len(parts[1]) / len(text_of(500)) == pytest.approx(0.05, abs=0.005)


def test_without_a_validation_share_all_is_training(corpus, tmp_path):
    prepare(corpus, tmp_path / "out", Preparation(validation_share=0))
    assert TokenSet.open(tmp_path / "out").documents == 60
    with pytest.raises(ValueError, match="no validation split; it has train"):
        TokenSet.open(tmp_path / "out", "validation")


def test_a_sample_of_the_standard_library_prepares(monkeypatch, tmp_path):
    root = tmp_path / "library"
    root.mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:25]:
        (root / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    manifest = prepare("stdlib", tmp_path / "out", Preparation(tokenizer="bpe", vocab_size=300))
    assert manifest["source"].startswith("standard library of")
    assert manifest["vocab_size"] == 300
    expected = {path.read_text(encoding="utf-8") for path in root.iterdir()} - {""}
    assert texts(tmp_path / "out") == sorted(expected)


def test_a_tokenizer_from_a_file_is_used_as_it_is(corpus, tmp_path):
    tokenizer = train_bpe([text_of(9)], 265)
    tokenizer.save(tmp_path / "mine.json")
    manifest = prepare(corpus, tmp_path / "out", Preparation(tokenizer=str(tmp_path / "mine.json")))
    assert manifest["tokenizer"] == {"name": "bpe-265", "sha256": tokenizer.hash()}
    assert TokenSet.open(tmp_path / "out").tokenizer.hash() == tokenizer.hash()


def test_progress_counts_to_the_whole(corpus, tmp_path):
    calls = []
    manifest = prepare(corpus, tmp_path / "o", Preparation("bpe", 265), lambda *call: calls.append(call))
    size = sum(split["bytes"] for split in manifest["splits"].values())
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["sample", "tokenise", "write train", "write validation"]
    assert ("sample", size, None) in calls
    assert ("tokenise", size, size) in calls
    assert calls[-1] == ("write validation", *[manifest["splits"]["validation"]["tokens"]] * 2)


@pytest.mark.parametrize("victim", ["write_shard", "np.save"])
def test_a_full_disk_leaves_the_old_set_and_nothing_half_made(corpus, tmp_path, monkeypatch, victim):
    out = tmp_path / "set"
    prepare(corpus, out)
    before = contents(out)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((np, "save") if victim == "np.save" else (corpus_module, "write_shard")), full)
    for place in (out, tmp_path / "new"):
        with pytest.raises(OSError, match=rf"{place.name}: not made, and nothing changed: .*No space left on device"):
            prepare(corpus, place, Preparation(seed=1))
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_device_that_is_really_full_is_reported(corpus, tmp_path, monkeypatch):
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda p, *a, **k: real(Path("/dev/full") if p.name == "spool" else p, *a, **k))
    with pytest.raises(OSError, match=r"out: not made, and nothing changed: .*No space left"):
        prepare(corpus, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_halfway_leaves_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(i)}) + "\n" for i in range(30)) + "{broken\n")
    with pytest.raises(ValueError, match=r"a.jsonl, line 31: not JSON"):
        prepare(path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_a_killed_process_left_is_removed_by_the_next(corpus, tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = tmp_path / f".out.staging-{gone.stdout.strip()}"
    alive = tmp_path / f".out.staging-{os.getppid()}"
    left.mkdir()
    alive.mkdir()
    prepare(corpus, tmp_path / "out")
    assert not left.exists()
    assert alive.exists()


def test_preparing_again_replaces_the_old_set(corpus, tmp_path):
    out = tmp_path / "out"
    prepare(corpus, out, Preparation(shard_tokens=5000))
    prepare(corpus, out)
    assert len([path for path in out.iterdir() if path.name.startswith("train")]) == 2
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_of_something_else_is_not_replaced(corpus, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than prepared data; name a new folder"):
        prepare(corpus, tmp_path)
    with pytest.raises(ValueError, match=r"notes.txt: is a file; name a folder"):
        prepare(corpus, tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="lies inside the source"):
        prepare(tmp_path, tmp_path / "inside" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_share": 0.6}, "'validation_share' must be between 0 and 0.5, not 0.6"),
        ({"shard_tokens": 0}, "'shard_tokens' must be between 1 and 2147483647, not 0"),
        ({"seed": -1}, "'seed' must be 0 or more, not -1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Preparation(**options)


def test_an_unknown_tokenizer_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="words: no such tokenizer file"):
        prepare(corpus, tmp_path / "out", Preparation(tokenizer="words"))


def test_the_tokenizer_sample_is_bounded_spread_and_repeatable():
    stream = [text_of(i) for i in range(200)]
    texts, size = sample_texts(stream, 0, lambda done: None, budget=20_000)
    assert size == sum(map(len, stream))
    assert 10_000 < sum(map(len, texts)) <= 20_000
    assert texts == sample_texts(stream, 0, lambda done: None, budget=20_000)[0]
    assert texts != sample_texts(stream, 1, lambda done: None, budget=20_000)[0]
    assert sample_texts(stream, 0, lambda done: None)[0] == stream


@pytest.mark.parametrize("refused", [1, 2])
def test_a_rename_that_fails_leaves_the_old_set(corpus, tmp_path, monkeypatch, refused):
    out = tmp_path / "out"
    prepare(corpus, out)
    before, calls, real = contents(out), [], Path.rename

    def rename(path, target):
        calls.append(path)
        if len(calls) == refused:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="not made, and nothing changed"):
        prepare(corpus, out, Preparation(seed=1))
    assert contents(out) == before
    assert list(tmp_path.iterdir()) == [out]


def odd_tokenizer(path, end="<|bos|>"):
    """A byte-level tokenizer whose end of text has a name that nobody knows."""
    backend = Backend.from_str(train_bpe([text_of(9)], 265).backend.to_str())
    settings = json.loads(backend.to_str())
    settings["added_tokens"][0]["content"] = end
    path.write_text(json.dumps(settings))
    return path


def test_an_end_of_text_that_only_the_user_knows_is_kept_with_data_and_model(corpus, tmp_path):
    path = odd_tokenizer(tmp_path / "theirs.json")
    with pytest.raises(ValueError, match="name it with --end-of-text"):
        prepare(corpus, tmp_path / "out", Preparation(tokenizer=str(path)))
    prepare(corpus, tmp_path / "out", Preparation(tokenizer=str(path), end_of_text="<|bos|>"))
    tokens = TokenSet.open(tmp_path / "out", verify=True)
    assert tokens.tokenizer.backend.id_to_token(tokens.eot) == "<|bos|>"
    assert load_tokenizer(tmp_path / "out").eot == tokens.eot
    config = dataclasses.replace(model_preset("nano-test"), vocab_size=tokens.vocab_size)
    save_model(tmp_path / "model", Model(config, torch.Generator().manual_seed(0)), tokens.tokenizer)
    assert load_model(tmp_path / "model")[1].eot == tokens.eot
    assert load_tokenizer(tmp_path / "model").eot == tokens.eot


def test_an_end_of_text_is_not_chosen_for_our_own_tokenizers():
    with pytest.raises(ValueError, match=r"'end_of_text' is for a tokenizer\.json; 'bpe' has its own"):
        Preparation("bpe", end_of_text="</s>")


def unigram(path, unk):
    pieces = [("<unk>", 0.0), *((c, -2.0) for c in "lineofdocumt0123456789\n\u2581")]
    backend = Backend(models.Unigram(pieces, 0 if unk else None))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    backend.save(str(path))


@pytest.mark.parametrize("unk", [True, False])
def test_characters_that_a_tokenizer_lacks_are_counted_and_told(tmp_path, unk):
    (tmp_path / "in").mkdir()
    for i in range(30):
        (tmp_path / "in" / f"{i}.txt").write_text(text_of(i) + "Zé" * 3 + "Z")
    unigram(tmp_path / "t.json", unk)
    manifest = prepare(tmp_path / "in", tmp_path / "out", Preparation(tokenizer=str(tmp_path / "t.json")))
    assert manifest["lost_characters"] == {"Z": 120, "\u00e9": 90}
    assert "lost        210 characters that the tokenizer has no token for: 'Z' 120, '\u00e9' 90" in lines(manifest)
    assert "\u00e9" not in texts(tmp_path / "out")[0]


def test_a_document_that_spells_the_end_of_text_is_left_out_and_counted(tmp_path):
    for i in range(30):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.txt").write_text(text_of(i) + ("</s>" if i == 3 else ""))
    backend = Backend(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], 0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.save(str(tmp_path / "t.json"))
    manifest = prepare(tmp_path / "in", tmp_path / "out", Preparation(tokenizer=str(tmp_path / "t.json")))
    assert manifest["skipped"] == {"spelling the end-of-text token": 1}
    assert sum(split["documents"] for split in manifest["splits"].values()) == 29


def test_the_manifest_names_every_file_that_was_passed_over(tmp_path):
    (tmp_path / "in").mkdir()
    for name, data in {"a.txt": b"words and more", "b.bin": b"\0\1", ".git": b"x", "c.json": b'{"n": 1}'}.items():
        (tmp_path / "in" / name).write_bytes(data)
    os.symlink("nowhere", os.fsencode(tmp_path / "in") + b"/bad-\xff")
    manifest = prepare(tmp_path / "in", tmp_path / "out", Preparation(validation_share=0))
    assert manifest["passed_over"] == [
        {"file": ".git", "reason": "hidden"},
        {"file": "b.bin", "reason": "binary"},
        {"file": "bad-\ufffd", "reason": "a link to nothing"},
        {"file": "c.json", "reason": "no field 'text'; it has n; name the one to read with --field"},
    ]
    assert "files       .git, b.bin, bad-\ufffd, c.json passed over; manifest.json says why" in lines(manifest)
    assert "evaluation  no validation split to evaluate on" in lines(manifest)


def test_what_was_made_is_told_with_how_many_documents_reach_which_length(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    lengths = TokenSet.open(prepared, "validation").lengths
    counts = manifest["splits"]["validation"]["long_documents"]
    assert counts["1024"] == (lengths >= 1024).sum() > 0
    told = "\n".join(lines(manifest))
    assert f"{counts['1024']} of 1,024" in told
    assert "1.00 bytes a token" in told
    assert long_documents(np.array([1023])) == {}
    assert long_documents(np.array([1024, 4096])) == {"1024": 2, "2048": 1, "4096": 1}


@pytest.mark.parametrize("share", [0.3, 0.35, 0.4, 0.12, 0.03, 0.25, 0.5])
def test_no_document_is_dropped_whatever_the_share(corpus, tmp_path, share):
    prepare(corpus, tmp_path / "out", Preparation(validation_share=share))
    train, validation = TokenSet.open(tmp_path / "out"), TokenSet.open(tmp_path / "out", "validation")
    assert train.documents + validation.documents == 60
    assert 1 <= validation.documents <= 60 * share + 8  # one of each stratum of lengths at least


def test_a_vocabulary_is_for_a_tokenizer_that_is_trained(corpus, tmp_path, capsys):
    assert main(["prepare", str(corpus), "--out", str(tmp_path / "out"), "--vocab-size", "4096"]) == 2
    assert "--vocab-size 4096 is for --tokenizer bpe, not bytes" in capsys.readouterr().err
