"""Shards that lie elsewhere give the batches of shards that lie here, whatever the cache holds."""

import json
import shutil
import sys

import numpy as np
import pytest

import atma
from atma.config import DataConfig, TrainConfig
from atma.data import remote as elsewhere
from atma.data.batches import Batches
from atma.data.dataset import TokenSet
from atma.data.prepare import Preparation, prepare
from atma.data.remote import Remote, is_remote

fsspec = pytest.importorskip("fsspec")

TRAIN = TrainConfig(length=64, batch_tokens=512, tokens=512 * 8)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(elsewhere, "BLOCK", 1 << 10)
    monkeypatch.setattr(elsewhere, "PAUSE", 0.0)
    monkeypatch.setenv("ATMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["memory", "file"])
def name(prepared, tmp_path, request):
    """The name of a copy of the prepared set elsewhere."""
    if request.param == "file":
        shutil.copytree(prepared, tmp_path / "elsewhere")
        yield f"file://{tmp_path / 'elsewhere'}"
        return
    files = fsspec.filesystem("memory")
    for path in prepared.iterdir():
        files.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    yield "memory://bucket/set"
    files.rm("/bucket", recursive=True)


def replaced(name: str, file: str, data: bytes) -> None:
    files, root = fsspec.core.url_to_fs(name)
    files.pipe_file(f"{root}/{file}", data)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_lies_elsewhere_is_what_lies_here(prepared, name, split):
    here, there = TokenSet.open(prepared, split), TokenSet.open(name, split, verify=True)
    assert there.hash == here.hash
    assert (there.tokens, there.documents, there.eot) == (here.tokens, here.documents, here.eot)
    assert np.array_equal(there.read(0, there.tokens), here.read(0, here.tokens))
    assert np.array_equal(there.document(3), here.document(3))
    assert there.tokenizer.hash() == here.tokenizer.hash()
    assert there.read(5, 5).tolist() == []


def test_a_batch_is_a_function_of_its_step_alone(prepared, name, tmp_path):
    wanted = Batches(TokenSet.open(prepared), DataConfig(), TRAIN)
    first = Batches(TokenSet.open(name), DataConfig(), TRAIN)
    for step in range(4):
        assert all(map(np.array_equal, first.batch(step), wanted.batch(step)))
    shutil.rmtree(tmp_path / "cache")
    resumed = Batches(TokenSet.open(name), DataConfig(), TRAIN)
    for step in (7, 3, 120):
        assert all(map(np.array_equal, resumed.batch(step), wanted.batch(step)))


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_from_an_empty_cache_to_the_weights_of_a_run_here(
    name, prepared, tmp_path, monkeypatch
):
    recipe = {"name": "small", "model": {"preset": "nano-test"}, "train": {"length": 64}}
    settings = {"train.tokens": 1536, "train.batch_tokens": 256, "train.evaluate_every": 2, "train.checkpoint_every": 2}
    here = atma.train_model(recipe, tmp_path / "here", set=settings | {"data.path": str(prepared)}, threads=1)
    real, rows = TokenSet.rows, []

    def stopping(self, starts, length):
        rows.append(starts)
        if len(rows) == 6:
            raise KeyboardInterrupt
        return real(self, starts, length)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TokenSet, "rows", stopping)
        atma.train_model(recipe, tmp_path / "there", set=settings | {"data.path": name}, threads=1)
    shutil.rmtree(tmp_path / "cache")
    there = atma.train_model(recipe, tmp_path / "there", set=settings | {"data.path": name}, threads=1, resume=True)
    first, second = (run.folder / "final" / "model.safetensors" for run in (here, there))
    assert first.read_bytes() == second.read_bytes()


def test_what_was_read_once_is_not_read_again_and_a_batch_is_fetched_together(name, monkeypatch):
    asked = []
    real = Remote.ranges
    monkeypatch.setattr(Remote, "ranges", lambda self, file, spans: asked.append(len(spans)) or real(self, file, spans))
    batches = Batches(TokenSet.open(name), DataConfig(), TRAIN)
    opened, shards = len(asked), len(batches.token_set._shards)
    assert asked == [1] * shards  # their headers
    batches.batch(0)
    assert len(asked) - opened <= shards
    assert sum(asked[opened:]) > shards
    before = len(asked)
    batches.batch(0)
    Batches(TokenSet.open(name), DataConfig(), TRAIN).batch(0)
    assert len(asked) - before == shards


def test_the_cache_is_bounded_and_what_is_gone_is_fetched_again(prepared, name, monkeypatch, tmp_path):
    monkeypatch.setenv("ATMA_CACHE_GIB", str(8 * 1024 / 2**30))
    here, there = TokenSet.open(prepared), TokenSet.open(name)
    for start in (0, 20_000, 100, 28_000, 0):
        assert np.array_equal(there.read(start, start + 5000), here.read(start, start + 5000))
        assert sum(path.stat().st_size for path in (tmp_path / "cache" / "blocks").iterdir()) <= 8 * 1024
    monkeypatch.setenv("ATMA_CACHE_GIB", "much")
    with pytest.raises(ValueError, match="ATMA_CACHE_GIB=much: not a number of GiB"):
        TokenSet.open(name)


def test_a_block_that_was_cut_short_in_the_cache_is_fetched_again(prepared, name, tmp_path):
    there = TokenSet.open(name)
    there.read(0, 5000)
    for path in (tmp_path / "cache" / "blocks").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert np.array_equal(there.read(0, 5000), TokenSet.open(prepared).read(0, 5000))


@pytest.mark.parametrize("file", ["tokenizer.json", "train_000000.documents.npy"])
def test_a_small_file_that_changed_since_the_manifest_is_refused(name, prepared, file):
    replaced(name, file, (prepared / file).read_bytes() + b" ")
    with pytest.raises(ValueError, match=rf"{file}: not the SHA-256 that its manifest says: changed since"):
        TokenSet.open(name)


def test_a_shard_that_changed_since_the_manifest_is_refused(name, prepared):
    file = "train_000000.bin"
    data = bytearray((prepared / file).read_bytes())
    data[5000] ^= 1
    replaced(name, file, bytes(data))
    with pytest.raises(ValueError, match=rf"{file}: damaged: not the SHA-256"):
        TokenSet.open(name, verify=True)
    replaced(name, file, (prepared / "train_000001.bin").read_bytes())
    with pytest.raises(ValueError, match=rf"{file}: .* tokens, but its manifest says .*: changed since"):
        TokenSet.open(name)
    replaced(name, file, bytes(data[:-2]))
    with pytest.raises(ValueError, match=rf"{file}: truncated"):
        TokenSet.open(name)


def test_a_shard_that_is_cut_while_it_is_read_is_refused(name, prepared):
    there = TokenSet.open(name)
    replaced(name, "train_000000.bin", (prepared / "train_000000.bin").read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"train_000000.bin: shorter than it was: changed since its manifest"):
        there.read(0, 9000)


def test_mistakes_are_told_in_one_line(name, monkeypatch):
    with pytest.raises(ValueError, match=r"set/nothing/manifest.json: no such object; is the name right"):
        TokenSet.open("memory://bucket/set/nothing")
    with pytest.raises(ValueError, match=r"nosuch://a/b: not a place that can be read: Protocol not known"):
        TokenSet.open("nosuch://a/b")
    with pytest.raises(ValueError, match="vocab_size and eot are for shards without"):
        TokenSet.open(name, eot=3)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3://a/b: needs `pip install s3fs`"):
        TokenSet.open("s3://a/b")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"needs `pip install 'atma-lm\[remote\]'`"):
        TokenSet.open(name)


@pytest.mark.parametrize("error", [PermissionError("403"), type("NoCredentialsError", (Exception,), {})("none found")])
def test_want_of_access_is_told_and_not_tried_again(name, monkeypatch, error):
    tries = []

    def refused(*given, **more):
        tries.append(given)
        raise error

    monkeypatch.setattr(type(Remote(name)._files), "cat_file", refused)
    with pytest.raises(ValueError, match=r"manifest.json: no access to it; set the credentials"):
        TokenSet.open(name)
    assert len(tries) == 1


def test_a_failure_of_the_network_is_tried_again_a_few_times(name, prepared, monkeypatch):
    there, failures = TokenSet.open(name), [OSError("reset"), TimeoutError("slow")]
    real = type(Remote(name)._files).cat_ranges

    def shaky(self, *given, **more):
        if failures:
            raise failures.pop()
        return real(self, *given, **more)

    monkeypatch.setattr(type(Remote(name)._files), "cat_ranges", shaky)
    assert np.array_equal(there.read(0, 3000), TokenSet.open(prepared).read(0, 3000))
    failures += [OSError("reset")] * 9
    with pytest.raises(ValueError, match=r"train_000001.bin: not read in 4 tries: OSError: reset"):
        there.read(12_000, 13_000)
    assert len(failures) == 5


def test_conversations_elsewhere_keep_their_answers_and_template(tmp_path):
    rows = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(30)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(tmp_path / "chats.jsonl", tmp_path / "set", Preparation(chat_template="chatml"))
    here, there = TokenSet.open(tmp_path / "set"), TokenSet.open(f"file://{tmp_path / 'set'}", verify=True)
    assert there.template == here.template != ""
    assert all(np.array_equal(there.answers(i), here.answers(i)) for i in range(here.documents))


def test_names_of_folders_are_no_places_elsewhere(tmp_path):
    assert not is_remote(tmp_path)
    assert not is_remote("data/own")
    assert is_remote("s3://bucket/own")
