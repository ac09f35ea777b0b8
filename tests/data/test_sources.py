"""Every kind of source gives its documents in a fixed order, or one clear line."""

import gzip
import json
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from atma.data.sources import Document, describe, documents

TEXTS = ["one\n", "zwei — drei\n", "one\n", "  \n", "four"]
DISTINCT = ["one\n", "zwei — drei\n", "four"]
LINES = "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS)
EMPTY_GZIP, LINES_GZIP = gzip.compress(b"", mtime=0), gzip.compress(LINES.encode(), mtime=0)


def texts(source, **options):
    return [document.text for document in documents(source, **options)]


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfonce upon\r\n")
    assert list(documents(path)) == [Document("book.txt", "once upon\r\n")]


def test_a_folder_gives_its_text_files_in_order_and_counts_what_it_leaves_out(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name, data in {
        "b/1.py": b"x = 1\n",
        "a.md": b"words",
        "b/copy.txt": b"words",
        "empty.txt": b"",
        "nul.txt": b"a\0b",
        "image.png": b"\x89PNG\xff",
        ".hidden/secret": b"hidden",
    }.items():
        (tmp_path / name).write_bytes(data)
    skipped = Counter()
    assert list(documents(tmp_path, skipped=skipped)) == [Document("a.md", "words"), Document("b/1.py", "x = 1\n")]
    assert skipped == {"binary": 2, "duplicate": 1, "empty": 1}


def test_json_lines_plain_gzip_and_zstd_give_the_same_documents(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.ZstdCompressor().compress(part.encode()) for part in LINES.splitlines(keepends=True)]
    files = {"a.jsonl": LINES.encode(), "a.jsonl.gz": gzip.compress(LINES.encode()), "a.jsonl.zst": b"".join(frames)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        found = list(documents(tmp_path / name))
        assert [document.text for document in found] == DISTINCT
        assert [document.name for document in found] == [f"{name}:{line}" for line in (1, 2, 5)]


def test_parquet_gives_its_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": TEXTS, "n": [1] * 5}), tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path / "a.parquet", field="body") == DISTINCT
    assert texts(tmp_path, field="body") == DISTINCT
    with pytest.raises(ValueError, match=r"a.parquet: no column 'text'; it has body, n"):
        texts(tmp_path / "a.parquet")


def test_a_saved_hugging_face_dataset_gives_its_rows(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra [hf] is not installed")
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "two"))
    assert texts(tmp_path / "one") == DISTINCT
    assert texts(tmp_path / "two") == DISTINCT


def test_a_hugging_face_dataset_asks_for_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_info.json").write_text("{}")
    for source in ("hf:somebody/something", tmp_path):
        with pytest.raises(ValueError, match=r"needs `pip install 'atma-lm\[hf\]'`"):
            texts(source)


@pytest.mark.parametrize("source", ["hf:", "hf:a:b:c:d"])
def test_a_malformed_dataset_name_is_refused(source):
    with pytest.raises(ValueError, match="write hf:NAME"):
        texts(source)


def test_the_standard_library_is_python_source_in_order(monkeypatch, tmp_path):
    for name in ("os.py", "json/__init__.py", "test/test_os.py", "site-packages/torch.py", "lib.so", "old.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(f"# {name}\n".encode())
    (tmp_path / "old.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    skipped = Counter()
    assert [d.name for d in documents("stdlib", skipped=skipped)] == ["json/__init__.py", "os.py", "test/test_os.py"]
    assert skipped == {"binary": 1}


def test_the_running_standard_library_is_found():
    first = next(documents("stdlib"))
    assert (Path(sysconfig.get_path("stdlib")) / first.name).read_text(encoding="utf-8") == first.text
    assert describe("stdlib").startswith("standard library of ")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b" \n", r"a.txt: no text in it \(left out: 1 empty\)"),
        ("a.txt", b"\xff\xfe", "a.txt: not a text file"),
        ("a.txt", b"a\0b", "a.txt: not a text file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "a.jsonl, line 1: no field 'text'; it has body"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: no field 'text'; it is a list"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: 'text' must be text, not int"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, after line 0: not UTF-8"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz, after line 0: not a whole gzip file"),
        ("a.jsonl.gz", EMPTY_GZIP[:10] + b"\xff" * 40, "a.jsonl.gz, after line 0: not a whole gzip file"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: 'text' holds half a character"),
        ("a.jsonl.gz", LINES_GZIP[:-9], r"a.jsonl.gz, after line \d: not a whole gzip file"),
        ("a.jsonl.zst", b"plain text", "a.jsonl.zst: not a zstd file"),
        ("a.parquet", b"plain text", "a.parquet: not a parquet file"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, name, data, message):
    if name.endswith((".zst", ".parquet")):
        pytest.importorskip({"a.jsonl.zst": "zstandard", "a.parquet": "pyarrow"}[name])
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name)


def test_a_cut_zstd_file_is_refused(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(LINES.encode())[:-5])
    with pytest.raises(ValueError, match=r"a.jsonl.zst: not a whole zstd file"):
        texts(path)


def test_missing_and_empty_places_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        texts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no text in it"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:some/set", ("some/set", None, "train")),
        ("hf:some/set:test", ("some/set", None, "test")),
        ("hf:some/set:small:test", ("some/set", "small", "test")),
    ],
)
def test_a_dataset_of_the_hub_is_streamed_by_name_configuration_and_split(monkeypatch, source, asked):
    def load_dataset(name, config, *, split, streaming):
        assert streaming
        assert (name, config, split) == asked
        return iter([{"text": text} for text in TEXTS])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts(source) == DISTINCT
