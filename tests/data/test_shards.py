"""The shard file: its bytes, and every way it can be wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atma.data.shards import HEADER_BYTES, LONG, SHORT, layout_for, read_shard, scan, write_shard


@pytest.mark.parametrize(("layout", "first"), [(SHORT, (20240520, 1)), (LONG, (20240801, 7))], ids=["uint16", "uint32"])
def test_the_file_is_a_header_of_256_integers_and_the_tokens(tmp_path, layout, first):
    path = tmp_path / "a.bin"
    write_shard(path, layout, [np.array([5, 6]), np.array([], int), np.array([7])], 3)
    header = np.fromfile(path, "<i4", 256)
    assert header.tolist() == [*first, 3] + [0] * 253
    assert np.frombuffer(path.read_bytes()[HEADER_BYTES:], layout.dtype).tolist() == [5, 6, 7]


def test_uint16_serves_65536_ids_and_uint32_more():
    assert layout_for(2**16) is SHORT
    assert layout_for(2**16 + 1) is LONG


@given(ids=st.lists(st.integers(0, 2**16 - 1), min_size=1))
def test_what_is_written_is_read(tmp_path_factory, ids):
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    for layout in (SHORT, LONG):
        write_shard(path, layout, [np.array(ids)], len(ids))
        tokens, found = read_shard(path)
        assert found == layout
        assert tokens.tolist() == ids


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:100], "truncated: 100 bytes, and the header alone has 1,024"),
        (lambda data: data[:-1], "truncated: 1,033 bytes, but its header announces 5 tokens = 1,034"),
        (lambda data: data + b"\0", "wrong size: 1,035 bytes"),
        (lambda data: b"\0" + data[1:], "wrong magic 20240384; a token shard begins with 20240520 or 20240801"),
        (lambda data: data[:4] + b"\7" + data[5:], "wrong version 7; magic 20240520 goes with version 1"),
        (lambda data: data[:8] + b"\xff\xff\xff\xff" + data[12:], "wrong size: 1,034 bytes.* announces -1"),
        (lambda data: data[:8] + bytes(4) + data[12:1024], "wrong size: 1,024 bytes.* announces 0"),
        (lambda data: b"", "truncated: 0 bytes"),
    ],
)
def test_a_damaged_shard_is_named_with_what_is_wrong(tmp_path, damage, message):
    path = tmp_path / "a.bin"
    write_shard(path, SHORT, [np.arange(5)], 5)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"a.bin: {message}"):
        read_shard(path)


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a.bin: no such token shard"):
        read_shard(tmp_path / "a.bin")


def test_ids_that_do_not_fit_and_wrong_counts_are_not_written(tmp_path):
    for bad in (-1, 65_536):
        with pytest.raises(ValueError, match="do not fit uint16"):
            write_shard(tmp_path / "a.bin", SHORT, [np.array([bad])], 1)
    with pytest.raises(ValueError, match="1 tokens came where 2 were announced"):
        write_shard(tmp_path / "a.bin", SHORT, [np.array([1])], 2)
    with pytest.raises(ValueError, match="holds 1 to 2,147,483,647 tokens, not 0"):
        write_shard(tmp_path / "a.bin", SHORT, [], 0)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_scan_finds_documents_and_ids_outside_the_vocabulary(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("atma.data.shards.SCAN_TOKENS", chunk)
    tokens = np.array([9, 1, 2, 9, 9, 3])
    assert scan(tmp_path / "a.bin", tokens, 10, 9).tolist() == [0, 3, 4]
    with pytest.raises(ValueError, match=r"a.bin: token id 9 at 0 is outside the vocabulary of 9"):
        scan(tmp_path / "a.bin", tokens, 9, 8)
    with pytest.raises(ValueError, match="token id 12 at 5 is outside"):
        scan(tmp_path / "a.bin", np.array([9, 1, 2, 9, 9, 12]), 10, 9)
