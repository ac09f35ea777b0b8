"""BABILong as published: the forms of its files, what their paths name, and what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
from knower import Knower

from atma.eval.reasoning.published import names, read
from atma.eval.reasoning.suite import Reasoning
from atma.eval.suite import run

ENTRIES = [
    {"input": f"{who} went to the {room}. Something else. ", "question": f"Where is {who}? ", "target": room}
    for who, room in [("Mary", "kitchen"), ("John", "office"), ("Sandra", "garden")] * 3
]


def one_who_reads(text):
    who = text.rpartition("Where is ")[2].partition("?")[0]
    return text.partition(f"{who} went to the ")[2].partition(".")[0]


def written(folder, form):
    """BABILong's files as the hub has them, or as a saved data set."""
    if form == "json":
        path = folder / "data" / "qa1" / "0k.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(ENTRIES), encoding="utf-8")
        return
    if form == "jsonl":
        (folder / "qa1_0k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ENTRIES), encoding="utf-8")
        return
    if importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed: pip install 'atma-lm[parquet]'")
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.Table.from_pylist(ENTRIES)
    if form == "parquet":
        (folder / "0k").mkdir()
        pyarrow.parquet.write_table(rows, folder / "0k" / "qa1-00000-of-00001.parquet")
        return
    saved = folder / "0k" / "qa1"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text("{}", encoding="utf-8")
    path = str(saved / "data-00000-of-00001.arrow")
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, rows.schema) as stream:
        stream.write_table(rows)


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "arrow"])
def test_the_published_files_are_read(tmp_path, form):
    written(tmp_path, form)
    [ranking, generation] = run(Reasoning(("qa1",), (0,), data=tmp_path), Knower(one_who_reads))
    assert ranking["accuracy"] == generation["accuracy"] == 1 and ranking["trials"] == len(ENTRIES)
    assert ranking["answers"] == 3 and ranking["majority"] == pytest.approx(1 / 3)


def test_a_row_goes_on_over_characters_that_only_look_like_line_ends(tmp_path):
    rows = [{"input": "one\u2028two\u0085", "question": "?", "target": "three"}] * 2
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [entry.input for entry in read(path)] == ["one\u2028two\u0085"] * 2


def test_examples_before_published_rows_must_have_answers_of_their_form(tmp_path):
    written(tmp_path, "json")
    [row] = run(Reasoning(("qa1",), (0,), shots=2, scoring="ranking", data=tmp_path), Knower(one_who_reads))
    assert row["trials"] == len(ENTRIES)
    (tmp_path / "qa19_0k.json").write_text(json.dumps([ENTRIES[0] | {"target": "e,e"}]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"'north,north', and .*qa19_0k.json has answers such as 'e,e'; leave out"):
        run(Reasoning(("qa19",), (0,), shots=2, data=tmp_path), Knower(one_who_reads))


def test_paths_name_a_task_and_a_length():
    assert names(Path("data/qa10/128k.json")) == ("qa10", 128 * 1024)
    assert names(Path("1M/qa2-00000-of-00001.parquet")) == ("qa2", 1 << 20)
    assert names(Path("README.json")) is None and names(Path("qa1/qa2/0k.json")) is None


def test_missing_and_damaged_published_files_are_named(tmp_path):
    written(tmp_path, "json")
    with pytest.raises(ValueError, match=r"nothing for qa2 at 4k; it has qa1 at 0k"):
        run(Reasoning(("qa2",), (4096,), data=tmp_path), Knower(one_who_reads))
    for length, called in ((1500, "1500"), (1 << 20, "1M"), (3 << 19, "1536k")):
        with pytest.raises(ValueError, match=f"nothing for qa1 at {called}; it has qa1 at 0k"):
            run(Reasoning(("qa1",), (length,), data=tmp_path), Knower(one_who_reads))
    with pytest.raises(ValueError, match="no such folder of BABILong's files"):
        run(Reasoning(("qa1",), (0,), data=tmp_path / "no"), Knower(one_who_reads))
    for text, told in (("{", "not a file of JSON rows"), ('[{"input": "a"}]', "row 1: rows must have the texts")):
        (tmp_path / "bad.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=told):
            read(tmp_path / "bad.json")
