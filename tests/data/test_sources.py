"""Every kind of source gives its documents in a fixed order, or one clear line."""

import bz2
import gzip
import json
import lzma
import os
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from atma.data.sources import Document, LeftOut, describe, documents

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
    left_out = LeftOut()
    assert list(documents(tmp_path, left_out=left_out)) == [Document("a.md", "words"), Document("b/1.py", "x = 1\n")]
    assert left_out.counts == {"binary": 2, "duplicate": 1, "empty": 1, "hidden": 1}
    files = {"nul.txt": "binary", "image.png": "binary", "empty.txt": "empty", ".hidden": "hidden"}
    assert left_out.files == files


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
    held_out = datasets.Dataset.from_dict({"text": ["held out"]})
    datasets.DatasetDict({"train": table, "test": held_out}).save_to_disk(str(tmp_path / "two"))
    datasets.DatasetDict({"test": held_out}).save_to_disk(str(tmp_path / "three"))
    assert texts(tmp_path / "one") == DISTINCT
    left_out = LeftOut()
    assert texts(tmp_path / "two", left_out=left_out) == DISTINCT
    assert left_out.files == {"two:test": "the split 'test'"}
    assert texts(tmp_path / "two", split="test") == ["held out"]
    for source, split in ((tmp_path / "three", None), (tmp_path / "two", "dev")):
        with pytest.raises(ValueError, match=r"no split '(train|dev)'; it has .*name one with --split"):
            texts(source, split=split)
    with pytest.raises(ValueError, match="has no splits"):
        texts(tmp_path / "one", split="test")
    (tmp_path / "above").mkdir()
    (tmp_path / "two").rename(tmp_path / "above" / "two")
    assert texts(tmp_path / "above") == DISTINCT
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="one: not a data set that can be read"):
        texts(tmp_path / "one")


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
    left_out = LeftOut()
    assert [d.name for d in documents("stdlib", left_out=left_out)] == ["json/__init__.py", "os.py", "test/test_os.py"]
    assert left_out.files == {"old.py": "binary"}


def test_the_running_standard_library_is_found():
    first = next(documents("stdlib"))
    assert (Path(sysconfig.get_path("stdlib")) / first.name).read_text(encoding="utf-8") == first.text
    assert describe("stdlib").startswith("standard library of ")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b" \n", r"a.txt: no text in it \(left out: 1 empty\)"),
        ("a.txt", b"\xff\xfea", "a.txt: not a text file"),
        ("a.txt", b"a\0b", "a.txt: not a text file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "a.jsonl, line 1: no field 'text'; it has body"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: no field 'text'; it is a list"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: 'text' must be text, not int"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, after line 0: not UTF-8"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: not a whole gzip file"),
        ("a.jsonl.gz", EMPTY_GZIP[:10] + b"\xff" * 40, "a.jsonl.gz: not a whole gzip file"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: 'text' holds half a character"),
        ("a.jsonl.gz", LINES_GZIP[:-9], "a.jsonl.gz: not a whole gzip file"),
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


@pytest.mark.parametrize("kind", ["", ".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "csv", "tsv", "txt"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_kind_is_read_by_its_name_whatever_it_is_compressed_with_and_marked_by(tmp_path, kind, ending, encoding):
    if kind == ".zst":
        pytest.importorskip("zstandard")
    by = "\t" if ending == "tsv" else ","
    content = {
        "csv": f"n{by}text\n" + "".join(f'1{by}"{text}"\n' for text in TEXTS),
        "tsv": f"n{by}text\n" + "".join(f'1{by}"{text}"\n' for text in TEXTS),
        "txt": "zwei — drei",
    }.get(ending, LINES)
    path = tmp_path / f"a.{ending}{kind}"
    path.write_bytes(compressed(content.encode(encoding), kind))
    assert texts(path) == (["zwei — drei"] if ending == "txt" else DISTINCT)
    assert texts(tmp_path) == texts(path)


def compressed(data, kind):
    if kind == ".zst":
        import zstandard

        return zstandard.ZstdCompressor().compress(data)
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[kind](data)


@pytest.mark.parametrize("kind", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt"])
def test_a_cut_or_foreign_compressed_file_is_one_line(tmp_path, kind, ending):
    if kind == ".zst":
        pytest.importorskip("zstandard")
    path = tmp_path / f"a.{ending}{kind}"
    for data in (compressed(LINES.encode() * 50, kind)[:-9], b"plain text, not compressed at all", b"\x1f\x8b\x08"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"a.{ending}{kind}: not a (whole )?(gzip|xz|bzip2|zstd) file"):
            texts(path)


def test_joined_files_may_each_bring_a_byte_order_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n' + b"\xef\xbb\xbf" + b'{"text": "b"}\n')
    assert texts(tmp_path / "a.jsonl") == ["a", "b"]


def test_a_zstd_file_with_a_long_window_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(writer.compress(LINES.encode()) + writer.flush())
    assert texts(tmp_path / "a.jsonl.zst") == DISTINCT


@pytest.mark.parametrize(
    ("data", "field", "found"),
    [
        (["a", "b"], "text", ["a", "b"]),
        ([{"text": "a"}, {"text": None}, {"text": "b"}, {"other": 1}], "text", ["a", "b"]),
        ({"text": "a"}, "text", ["a"]),
        ({"data": [{"text": "a"}, {"text": "b"}]}, "data.text", ["a", "b"]),
        ([{"meta": {"text": "a"}}, {"meta": None}, {"meta": {"text": "b"}}], "meta.text", ["a", "b"]),
        ([{"a.b": {"c": "a"}}], "a.b.c", ["a"]),
        ([{"a.b": "a", "a": {"b": "other"}}], "a.b", ["a"]),
        ([{"text": ["one", "two"]}], "text", ["one\ntwo"]),
    ],
    ids=str,
)
def test_json_gives_records_texts_and_fields_within_fields(tmp_path, data, field, found):
    (tmp_path / "a.json").write_text(json.dumps(data, indent=1))
    assert texts(tmp_path / "a.json", field=field) == found
    rows = data if isinstance(data, list) else [data]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts(tmp_path / "a.jsonl", field=field) == found


def test_parquet_gives_fields_within_fields_and_counts_nulls(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "a"}, None, {"text": None}, {"text": "b"}]
    parquet.write_table(pyarrow.table({"n": [1] * 4, "meta": rows}), tmp_path / "a.parquet")
    left_out = LeftOut()
    assert texts(tmp_path / "a.parquet", field="meta.text", left_out=left_out) == ["a", "b"]
    assert left_out.counts == {"null": 2}


def test_null_and_missing_fields_are_left_out_and_counted(tmp_path):
    rows = [{"text": "a"}, {"text": None}, {}, {"text": "b"}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    left_out = LeftOut()
    assert texts(tmp_path / "a.jsonl", left_out=left_out) == ["a", "b"]
    assert left_out.counts == {"null": 2, "without the field": 1}
    (tmp_path / "b.jsonl").write_text('{"text": null}\n')
    with pytest.raises(ValueError, match=r"no text in it \(left out: 1 null\)"):
        texts(tmp_path / "b.jsonl")


def test_a_chat_is_one_text_with_a_line_for_each_turn(tmp_path):
    turns = [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"), ("assistant", None)]
    ours = [{"role": role, "content": content} for role, content in turns]
    theirs = [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": c} for r, c in turns]
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Look"}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in (ours, theirs, parts)))
    dialogue = "System: Be kind.\nUser: Hello\nAssistant: Hi"
    assert texts(tmp_path / "a.jsonl", field="messages") == [dialogue, "User: Look"]
    with pytest.raises(ValueError, match="no field 'text'; it has messages; read its chats with --field messages"):
        texts(tmp_path / "a.jsonl")


def test_a_chat_is_written_as_the_server_shows_it_to_a_model(tmp_path):
    jinja2 = pytest.importorskip("jinja2")
    from importlib.resources import files

    template = files("atma.chat").joinpath("plain.jinja").read_text(encoding="utf-8")
    messages = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", " b"), ("tool", "c"))]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    assert texts(tmp_path / "a.jsonl", field="messages") == [jinja2.Template(template).render(messages=messages)]


@pytest.mark.parametrize("by", [",", ";", "\t", "|"])
def test_a_table_is_split_where_its_first_line_has_the_column(tmp_path, by):
    (tmp_path / "a.csv").write_text(f'id{by}text\n1{by}"a ""b""{by}\nc"\n2{by}d\n3{by}\n')
    assert texts(tmp_path / "a.csv") == [f'a "b"{by}\nc', "d"]


def test_linked_folders_are_read_once_and_never_in_circles(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / "here", elsewhere / "deep"):
        folder.mkdir(parents=True)
    (corpus / "here" / "1.txt").write_text("one")
    (elsewhere / "deep" / "2.txt").write_text("two")
    for name, target in {
        "a-loop": ".",
        "here/up": "..",
        "a-copy": "here",
        "linked": "../elsewhere",
        "linked-too": "../elsewhere/deep",
        "above": "..",
        "gone": "../nowhere",
    }.items():
        (corpus / name).symlink_to(target)
    (elsewhere / "back").symlink_to("../corpus")
    left_out = LeftOut()
    found = list(documents(corpus, left_out=left_out))
    assert found == [Document("here/1.txt", "one"), Document("linked/deep/2.txt", "two")]
    assert left_out.files == {
        "a-loop": "a link to a folder that it lies in",
        "here/up": "a link to a folder that it lies in",
        "above": "a link to a folder that it lies in",
        "linked/back": "a link to a folder that it lies in",
        "a-copy": "a link to a folder that is read",
        "linked-too": "a link to a folder that is read",
        "gone": "a link to nothing",
    }


def test_files_named_by_splits_are_not_mixed(tmp_path):
    for name in ("train-00000.jsonl", "validation-00000.jsonl", "test-00000.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "test_notes.txt").write_text("about")
    left_out = LeftOut()
    assert texts(tmp_path, left_out=left_out) == ["about", "train-00000.jsonl"]
    assert left_out.counts == {"of another split": 2}
    assert texts(tmp_path, split="test") == ["test-00000.jsonl", "about"]
    with pytest.raises(ValueError, match=r"no files of a split 'other'; splits by the names of files: test, train"):
        texts(tmp_path, split="other")


def test_in_a_folder_files_of_another_kind_are_passed_over_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n")
    (tmp_path / "all.tar.gz").write_bytes(gzip.compress(b"x"))
    os.mkfifo(tmp_path / "pipe")
    left_out = LeftOut()
    assert texts(tmp_path, left_out=left_out) == DISTINCT
    assert left_out.files == {
        "package.json": "no field 'text'; it has name; name the one to read with --field",
        "numbers.csv": "no column 'text'; it has a, b",
        "all.tar.gz": "an archive, which is not unpacked",
        "pipe": "no regular file",
    }
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no text in it \(left out: .*\); no column 'text'; it has a, b"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ' + "[" * 100_000, "a.jsonl, line 2: .*nested without end"),
        ("a.json", "[" * 100_000 + "]" * 100_000, "a.json: .*nested without end"),
        ("a.json", '[{"text": "a"},\n{"text": }]', "a.json, line 2: not JSON"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", "a.jsonl, line 1: not JSON"),
        ("a.csv", 'text,b\n"never closed,1\n', "a.csv, after row 0: not a table of text: unexpected end of data"),
        ("a.csv", "text,b\nx,1,2\n", "a.csv, row 1: 3 cells where the columns are 2"),
        ("a.csv", "", "a.csv: no column 'text'"),
        ("a.json", "", "a.json: not JSON"),
        ("a.json", "[]", "a.json: no text in it"),
        ("a.json", '{"text": [{"n": 1}]}', "a list of records without 'role'"),
        ("a.json", '{"text": [{"role": "user", "content": 3}]}', "content of a message must be text, not int"),
        ("a.zip", "PK", "a.zip: an archive; unpack it"),
    ],
    ids=range(12),
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_text(data)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jl", "a.ldjson", "a.jsonl.1", "a.txt", "records", "a.jsonl.gzip"])
def test_json_lines_are_known_by_their_lines_where_their_name_does_not_tell(tmp_path, name):
    lines = b'{"text": "one"}\n\n{"text": "two"}\n'
    (tmp_path / name).write_bytes(gzip.compress(lines, mtime=0) if name.endswith("gzip") else lines)
    assert texts(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize("lines", ['{"text": "one"}\n', '{"a": 1}\nand so on\n', "{}, {}\n{}\n", "[1]\n[2]\n"])
def test_a_text_that_only_begins_like_json_is_a_text(tmp_path, lines):
    (tmp_path / "a.txt").write_text(lines)
    assert texts(tmp_path / "a.txt") == [lines]


def test_nulls_within_a_list_of_texts_or_messages_are_nothing(tmp_path):
    chat = [{"role": None, "from": "human", "value": "Hi"}, None, {"role": "assistant", "content": [{"text": None}]}]
    rows = [{"text": ["a", None, "b"]}, {"text": chat}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts(tmp_path / "a.jsonl") == ["a\nb", "User: Hi\nAssistant:"]
