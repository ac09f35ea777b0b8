"""The file of result rows: where it is written, and that several may add to it."""

import errno
import fcntl

from atma.eval.results import add_rows, read_rows


def test_rows_go_where_a_link_points(tmp_path):
    (tmp_path / "disk").mkdir()
    link, place = tmp_path / "rows.jsonl", tmp_path / "disk" / "rows.jsonl"
    link.symlink_to(place)
    for row in ({"a": 1}, {"a": 2}):
        add_rows(link, [row])
        assert link.is_symlink() and not place.is_symlink()
    assert read_rows(place) == read_rows(link) == [{"a": 1}, {"a": 2}]


def test_rows_are_written_where_a_disk_has_no_locks(tmp_path, monkeypatch):
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    add_rows(tmp_path / "rows.jsonl", [{"a": 1}])
    assert read_rows(tmp_path / "rows.jsonl") == [{"a": 1}]
