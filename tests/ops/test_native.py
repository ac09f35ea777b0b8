"""Building the compiled kernels: once, kept, checked before they are loaded, and never required."""

import contextlib
import io
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

from atma.ops import native, polar_attention, use_backend
from tests.harness.processes import forked

REPORT = (
    "from atma.ops import native, backend_for; from tests.ops.test_native import total; "
    "print(backend_for()); print(native.status().reason); print(total())"
)
TWO_SOURCES = """for one; do
  shift
  case "$one" in */polar.cpp|*/conv.cpp) ;; *.cpp) continue ;; esac
  set -- "$@" "$one"
done
exec c++ "$@" -O1"""
"""A compiler in little time: of two of the sources that it is given, and the last word of how well holds."""
PLANTED = """
#include <stdio.h>
__attribute__((constructor)) void ran(void) { fclose(fopen("ran", "w")); }
long vector_bytes(void) { return 32; }
long threaded(void) { return 0; }
"""


PROGRESS = ("atma: compiling ", "atma: compiled in ")


class Found(NamedTuple):
    native: bool
    reason: str
    told: str
    progress: str = ""


def settings(cache, folder, environment):
    kept = {key: value for key, value in os.environ.items() if key not in ("ATMA_NATIVE", "CXX")}
    (folder / "tmp").mkdir(exist_ok=True)
    places = {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    return kept | places | environment


def total() -> float:
    """A sum of what polar attention returns."""
    x, one = torch.randn(1, 1, 40, 16, generator=torch.Generator().manual_seed(0)), torch.ones(1)
    return polar_attention(x, x, x, one, one, one, one, torch.zeros(1, 16))[0].double().sum().item()


def expected() -> float:
    with use_backend("cpu"):
        return total()


def run(cache, **environment):
    """The backend that a fresh process takes, the reason, the sum there, and what it says besides."""
    environment = settings(cache, cache.parent, environment)
    [ended] = forked(["-c", REPORT], [environment])
    assert ended.status == 0, ended.err
    backend, reason, total = ended.out.splitlines()
    return backend, reason, float(total), ended.err


def status(folder, **environment) -> Found:
    """What a fresh process would find with its cache in `folder`, standing there."""
    told = io.StringIO()
    with (
        patch.dict(os.environ, settings(folder / "cache", folder, environment), clear=True),
        patch.object(tempfile, "tempdir", None),
        contextlib.chdir(folder),
        contextlib.redirect_stderr(told),
    ):
        library, reason, _ = native.status.__wrapped__()
    lines = told.getvalue().splitlines(keepends=True)
    progress = "".join(line for line in lines if line.startswith(PROGRESS))
    return Found(library is not None, reason, "".join(x for x in lines if not x.startswith(PROGRESS)), progress)


def compiler(folder, body):
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo one; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache that holds a library, made by the compiler whose version is "one"."""
    if next(filter(None, map(shutil.which, ("c++", "cc"))), None) is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path_factory.mktemp("built")
    found = status(folder, CXX=compiler(folder, TWO_SOURCES))
    assert found.native and found.told == "" and found.progress.count("\n") == 2 and "about a minute" in found.progress
    return folder / "cache"


@pytest.fixture
def library(built, tmp_path):
    """The library in a copy of that cache, and beside it a compiler that takes no time and counts."""
    shutil.copytree(built, tmp_path / "cache")
    [found] = (tmp_path / "cache" / "atma").glob("native-*.so")
    found.parent.chmod(0o700)
    shutil.copy(found, tmp_path / "again.so")
    copy = f'echo built >> {tmp_path}/count\nfor last; do :; done\ncp {tmp_path}/again.so "$last"'
    compiler(tmp_path, copy)
    return found


def builds(library) -> int:
    count = library.parents[2] / "count"
    return len(count.read_text().split()) if count.exists() else 0


def found_with(library) -> Found:
    folder = library.parents[2]
    return status(folder, CXX=str(folder / "compiler"))


def test_switched_off_every_operation_takes_its_pytorch_path_and_nothing_is_said(tmp_path):
    backend, reason, total, told = run(tmp_path / "cache", ATMA_NATIVE="off")
    assert (backend, reason, told) == ("cpu", "switched off by ATMA_NATIVE", "")
    assert total == pytest.approx(expected(), rel=1e-9)


def test_a_library_is_built_once_and_agrees_with_pytorch(built):
    [library] = (built / "atma").glob("native-*.so")
    before = library.stat().st_mtime_ns
    backend, reason, total, told = run(built, CXX=str(built.parent / "compiler"))
    assert backend == "native" and str(library) in reason and told == ""
    assert library.stat().st_mtime_ns == before
    assert total == pytest.approx(expected(), rel=1e-5)


def test_the_kernels_of_all_sources_compile(built):
    if "ATMA_NATIVE" in os.environ or "CXX" in os.environ:
        pytest.skip("this environment chooses the kernels")
    found = native.status()
    assert found.library is not None and found.library.threaded() == 1, found.reason


def test_new_folders_and_files_are_for_this_user_alone_whatever_the_umask(library):
    shutil.rmtree(library.parents[1])
    before = os.umask(0)
    try:
        assert found_with(library).native
    finally:
        os.umask(before)
    for path in (library, library.with_suffix(".sha256"), library.parent, library.parents[1]):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def plant(library) -> Path:
    """Code that leaves a file where the process stands, in place of the library, with the right hash."""
    source = library.parents[2] / "planted.c"
    source.write_text(PLANTED)
    library.unlink()
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library.parents[2] / "ran"


def give_away(path) -> None:
    if os.getuid():
        pytest.skip("only root can give a file to another user")
    os.chown(path, 65534, 65534)


def link(path) -> None:
    path.rename(path.with_name(".real"))
    path.symlink_to(path.with_name(".real"))


SPOILT = [
    (lambda library: None, "damaged"),
    (lambda library: give_away(library), "belongs to user 65534"),
    (lambda library: library.chmod(0o770), "others can write it"),
    (lambda library: library.chmod(0o702), "others can write it"),
    (link, "a link"),
    (lambda library: library.with_suffix(".sha256").unlink(), "no hash beside it"),
    (lambda library: library.with_suffix(".sha256").chmod(0o666), "others can write it"),
]


@pytest.mark.parametrize(
    ("spoil", "why"),
    SPOILT,
    ids=["other contents", "owner", "group", "others", "link", "no hash", "loose hash"],
)
def test_a_planted_library_never_runs_and_is_compiled_again(library, spoil, why):
    ran = plant(library)
    spoil(library)
    found = found_with(library)
    assert not ran.exists()
    assert found.native and str(library) in found.reason and why in found.told and builds(library) == 1
    again = found_with(library)
    assert again.native and again.told == again.progress == "" and builds(library) == 1


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda folder: folder.chmod(0o777), "others can write it"),
        (lambda folder: give_away(folder), "belongs to user 65534"),
        (lambda folder: folder.chmod(0o770), "others can write it"),
        (link, "a link, not a folder"),
    ],
    ids=["others", "owner", "group", "link"],
)
def test_a_folder_of_others_is_not_used_a_private_one_is_and_that_is_told(library, spoil, why):
    ran = plant(library)
    spoil(library.parent)
    private = library.parents[2] / "tmp" / f"atma-{os.getuid()}"
    for _ in range(2):
        found = found_with(library)
        assert not ran.exists()
        assert found.native and str(private / library.name) in found.reason
        assert f"atma: compiled kernels are kept in {private}: {library.parent}: {why}" in found.told
        assert len(found.told.splitlines()) == 1
    assert builds(library) == 1 and stat.S_IMODE(private.stat().st_mode) == 0o700


def test_with_no_folder_to_trust_a_process_has_one_of_its_own_and_leaves_nothing(library):
    library.parent.chmod(0o777)
    temporary = library.parents[2] / "tmp"
    (temporary / f"atma-{os.getuid()}").mkdir(parents=True)
    (temporary / f"atma-{os.getuid()}").chmod(0o777)
    found = found_with(library)
    assert found.native and "kept in" in found.told
    assert [entry.name for entry in temporary.iterdir()] == [f"atma-{os.getuid()}"]


def test_a_library_that_was_cut_short_is_told_and_compiled_again(library):
    os.truncate(library, library.stat().st_size // 2)
    found = found_with(library)
    assert found.native and "damaged" in found.told and builds(library) == 1


def test_what_is_loaded_is_what_was_checked_whatever_happens_to_the_file(library):
    cut = (
        "import os, sys; from atma.ops import native; native.status(); os.truncate(sys.argv[1], 0); import torch; "
        "from atma.ops import causal_conv; print(causal_conv(torch.ones(1, 4, 4), torch.ones(4, 2)).sum().item())"
    )
    if not hasattr(os, "memfd_create"):
        pytest.skip("this system cannot load a copy")
    folder = library.parents[2]
    environment = settings(folder / "cache", folder, {"CXX": str(folder / "compiler")})
    command = [sys.executable, "-c", cut, str(library)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "28.0\n")


@pytest.mark.parametrize("home", [{"XDG_CACHE_HOME": "relative"}, {"XDG_CACHE_HOME": "", "HOME": ""}])
def test_a_relative_cache_is_not_used(library, home):
    folder = library.parents[2]
    home = {"HOME": str(folder / "home")} | home
    found = status(folder, CXX=str(folder / "compiler"), **home)
    expected = folder / "home" / ".cache" if home["HOME"] else folder / "tmp"
    assert found.native and str(expected) in found.reason
    assert not (folder / "relative").exists() and not (folder / ".cache").exists()


def test_a_cache_that_cannot_be_made_is_told_with_the_path_that_is_taken(library):
    folder = library.parents[2]
    shutil.rmtree(folder / "cache")
    (folder / "cache").write_text("")
    found = found_with(library)
    assert found.native and str(folder / "tmp") in found.reason and f"kept in {folder / 'tmp'}" in found.told


def test_a_failed_build_leaves_a_log_and_the_pytorch_path_and_is_tried_again_after_a_time(tmp_path):
    count, cxx = tmp_path / "count", {}
    cxx["CXX"] = compiler(tmp_path, f"echo tried >> {count}; echo 'no such instruction' >&2; exit 1")
    for _ in range(2):
        found = status(tmp_path, **cxx)
        [log] = (tmp_path / "cache" / "atma").glob("native-*.log")
        assert not found.native and str(log) in found.reason
        assert len(found.told.splitlines()) == 1 and found.reason in found.told and "several times slower" in found.told
        assert "no such instruction" in log.read_text()
    assert count.read_text().split() == ["tried", "tried"]  # with and without OpenMP, the first time
    assert run(tmp_path / "cache", **cxx)[2] == pytest.approx(expected(), rel=1e-9)
    os.utime(log, (0, 0))
    status(tmp_path, **cxx)
    assert len(count.read_text().split()) == 4


@pytest.mark.parametrize(
    "body",
    [
        "echo 'No space left on device' >&2; exit 1",
        "echo 'virtual memory exhausted: Cannot allocate memory' >&2; exit 1",
        "echo 'c++: fatal error: Killed signal terminated program cc1plus' >&2; exit 1",
        "kill -9 $$",
        "exit 137",
    ],
)
def test_a_build_that_failed_for_a_passing_reason_is_tried_at_the_next_start(library, body):
    folder, cxx = library.parents[2], library.parents[2] / "compiler"
    library.unlink()
    working = cxx.read_text()
    compiler(folder, f"echo tried >> {folder}/tries\n{body}")
    found = found_with(library)
    assert not found.native and "the next command tries again" in found.told
    assert (folder / "tries").read_text().split() == ["tried"]  # and not without OpenMP, to be kept as the slower one
    cxx.write_text(working)
    again = found_with(library)
    assert again.native and again.told == ""


def test_a_library_without_the_kernels_is_a_reason_and_is_not_compiled_at_every_start(library):
    folder = library.parents[2]
    (folder / "planted.c").write_text(PLANTED)
    subprocess.run(["cc", "-shared", "-fPIC", str(folder / "planted.c"), "-o", str(folder / "again.so")], check=True)
    shutil.rmtree(library.parents[1])
    for _ in range(2):
        found = found_with(library)
        assert not found.native and ".log" in found.reason
    [log] = library.parent.glob("*.log")
    assert "not a library of these kernels" in log.read_text() and builds(library) == 1
