"""Preparing in several processes and going on after a kill give the bytes of one undisturbed process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from atma.cli import main
from atma.data import prepare as preparing
from atma.data import spool as spooling
from atma.data.prepare import Preparation, prepare
from atma.data.worker import Workers
from tests.data.conftest import text_of

KILLED = """
import os, signal, sys
from atma.data import prepare, spool
source, out, tokenizer, workers, batches = sys.argv[1:]
prepare.BATCH_CHARACTERS, spool.COMMIT_SECONDS = 3000, 0.0
seen = []
def progress(stage, done, total):
    seen.append(stage)
    if seen.count("tokenise") >= int(batches):
        os.kill(os.getpid(), signal.SIGKILL)
options = prepare.Preparation(tokenizer, 265 if tokenizer == "bpe" else 1024)
prepare.prepare(source, out, options, progress, workers=int(workers))
"""
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(preparing, "BATCH_CHARACTERS", 3000)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(source: Path, out: Path, tokenizer: str = "bpe", workers: int = 1, batches: int = 8) -> None:
    """A preparation that ends by SIGKILL once so many batches are done."""
    arguments = [str(source), str(out), tokenizer, str(workers), str(batches)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=300)
    assert done.returncode == -signal.SIGKILL


def stopped(source: Path, out: Path, options: Preparation | None = None) -> None:
    """A preparation of bytes that ends by Ctrl-C in its middle."""

    def interrupted(stage, done, total):
        if stage == "tokenise" and done > 20_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, out, options, interrupted, workers=1)


def test_the_number_of_processes_changes_no_byte(corpus, tmp_path):
    for workers in (1, 2, 3):
        prepare(corpus, tmp_path / str(workers), Preparation("bpe", 265), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_processes_are_begun_for_sources_that_are_worth_it(corpus, tmp_path, monkeypatch):
    begun = []
    real = Workers._begin
    monkeypatch.setattr(Workers, "_begin", lambda self: begun.append(self) or real(self))
    monkeypatch.setattr(preparing, "BATCH_CHARACTERS", 1 << 21)
    prepare(corpus, tmp_path / "out", workers=2)
    assert begun == []
    monkeypatch.setattr(preparing, "BATCH_CHARACTERS", 3000)
    prepare(corpus, tmp_path / "out", workers=2)
    assert len(begun) == 2


def test_what_a_process_leaves_out_is_counted_in_the_order_of_the_source(tmp_path):
    from tests.data.test_prepare import odd_tokenizer

    texts = [text_of(number) + ("<|bos|>" if number % 7 == 0 else "") for number in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = Preparation(str(odd_tokenizer(tmp_path / "t.json")), end_of_text="<|bos|>")
    one = prepare(tmp_path / "a.jsonl", tmp_path / "1", options, workers=1)
    assert prepare(tmp_path / "a.jsonl", tmp_path / "2", options, workers=2) == one
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_an_error_in_a_process_is_told_as_one_here_and_leaves_nothing(tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text("{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}" + PLAIN)
    rows = [[("user", "bad" if i == 50 else f"say {i}"), ("assistant", text_of(i))] for i in range(60)]
    told = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"a.jsonl:51: the chat template does not render it: .*--skip-bad"):
            prepare(tmp_path / "a.jsonl", tmp_path / "out", Preparation(chat_template=str(template)), workers=workers)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "strict.jinja"]
    skipping = Preparation(chat_template=str(template), skip_bad=True)
    for workers in (1, 2):
        prepare(tmp_path / "a.jsonl", tmp_path / str(workers), skipping, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_process_that_dies_ends_the_preparation_with_what_to_try(corpus, tmp_path, monkeypatch):
    real = Workers._begin

    def dying(self):
        process = real(self)
        process.kill()
        return process

    monkeypatch.setattr(Workers, "_begin", dying)
    with pytest.raises(ValueError, match=r"a process that tokenises ended \(-9\).*fewer with --workers"):
        prepare(corpus, tmp_path / "out", workers=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_killed_preparation_goes_on_to_the_same_bytes_and_says_so(corpus, tmp_path, monkeypatch, tokenizer):
    options = Preparation(tokenizer, 265 if tokenizer == "bpe" else 1024)
    killed(corpus, tmp_path / "out", tokenizer)
    assert {path.name for path in tmp_path.iterdir()} >= {".out.unfinished"}
    encoded, said = [], []
    real = preparing.encode_batch
    monkeypatch.setattr(preparing, "encode_batch", lambda *given: encoded.append(given) or real(*given))
    prepare(corpus, tmp_path / "whole", options, workers=1)
    whole = len(encoded)
    prepare(corpus, tmp_path / "out", options, say=said.append, workers=1)
    assert len(encoded) - whole == whole - 8
    assert len(said) == 1 and "going on with an unfinished preparation" in said[0]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again_it_ends_with_the_same_bytes(corpus, tmp_path, workers):
    prepare(corpus, tmp_path / "whole", Preparation("bpe", 265))
    for batches in (2, 5, 9, 11):
        killed(corpus, tmp_path / "out", "bpe", workers, batches)
    prepare(corpus, tmp_path / "out", Preparation("bpe", 265), workers=workers)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def damaged_tail(folder: Path) -> None:
    with (folder / "spool").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff\xff\xff")


def torn_line(folder: Path) -> None:
    os.truncate(folder / "journal", (folder / "journal").stat().st_size - 5)


def shorter(folder: Path) -> None:
    os.truncate(folder / "records", (folder / "records").stat().st_size - 30)


def no_head(folder: Path) -> None:
    os.truncate(folder / "journal", 4)


@pytest.mark.parametrize("damage", [damaged_tail, torn_line, shorter, no_head])
def test_what_a_spool_no_longer_holds_is_tokenised_again(corpus, prepared, tmp_path, damage):
    options = Preparation(shard_tokens=10_000)
    stopped(corpus, tmp_path / "out", options)
    damage(tmp_path / ".out.unfinished")
    said = []
    prepare(corpus, tmp_path / "out", options, workers=1, say=said.append)
    assert contents(tmp_path / "out") == contents(prepared)
    assert len(said) == (damage != no_head)


@pytest.mark.parametrize("place", [5, 59, None])
def test_a_source_that_changed_meanwhile_is_read_as_it_is_now(tmp_path, place):
    source = tmp_path / "source"
    source.mkdir()
    for number in range(60):
        (source / f"{number:02}.txt").write_text(text_of(number))
    stopped(source, tmp_path / "out")
    if place is None:
        for number in range(3, 60):
            (source / f"{number:02}.txt").unlink()
    else:
        (source / f"{place:02}.txt").write_text("something else\n" * 70)
    said = []
    prepare(source, tmp_path / "out", workers=1, say=said.append)
    assert ("the source has changed since: what follows is tokenised anew" in said) == (place != 59)
    prepare(source, tmp_path / "whole", workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_options_begin_anew_and_say_why_and_restart_says_nothing(corpus, tmp_path):
    prepare(corpus, tmp_path / "whole", Preparation(seed=1), workers=1)
    for options, restart in ((Preparation(seed=1), False), (Preparation(), True)):
        stopped(corpus, tmp_path / "out")
        said = []
        prepare(corpus, tmp_path / "out", options, workers=1, restart=restart, say=said.append)
        assert said == ([] if restart else ["an unfinished preparation had another options: begun anew"])
        assert (contents(tmp_path / "out") == contents(tmp_path / "whole")) == (not restart)


def test_an_interrupt_leaves_what_was_done(corpus, tmp_path):
    stopped(corpus, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.unfinished"]
    said = []
    prepare(corpus, tmp_path / "out", workers=1, say=said.append)
    assert said[0].startswith("going on with an unfinished preparation")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_goes_on_and_restarts(corpus, tmp_path, capsys):
    for restart in ((), ("--restart",)):
        stopped(corpus, tmp_path / "out", Preparation())
        assert main(["prepare", str(corpus), "--out", str(tmp_path / "out"), "--workers", "1", *restart]) == 0
        assert ("going on with an unfinished preparation" in capsys.readouterr().out) == (not restart)
    assert main(["prepare", str(corpus), "--out", str(tmp_path / "out"), "--workers", "-1"]) == 2


def test_two_preparations_of_one_folder_do_not_share_a_spool(corpus, tmp_path):
    def second(stage, done, total):
        if stage == "tokenise":
            with pytest.raises(ValueError, match="out: another process prepares it"):
                prepare(corpus, tmp_path / "out", workers=1)

    prepare(corpus, tmp_path / "out", progress=second, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_disk_is_waited_for_before_the_journal_vouches(corpus, tmp_path, monkeypatch):
    order, real = [], os.fsync
    monkeypatch.setattr(spooling, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(
        spooling.os, "fsync", lambda handle: order.append(os.readlink(f"/proc/self/fd/{handle}")) or real(handle)
    )
    prepare(corpus, tmp_path / "out", workers=1)
    names = [Path(path).name for path in order if ".out.unfinished/" in path]
    assert names[1:5] == ["spool", "answers", "records", "journal"]


def test_a_negative_number_of_workers_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"'workers' must be 0 \(one a core\) or more, not -1"):
        prepare(corpus, tmp_path / "out", workers=-1)


def test_a_process_that_tokenises_texts_begins_without_large_libraries():
    code = "import sys, atma.data.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
