"""Building the compiled kernels: once, kept, and never required."""

import os
import subprocess
import sys

import pytest

from tests.ops.backends import NATIVE

REPORT = (
    "import torch; from atma.ops import native, backend_for; "
    "print(backend_for()); print(native.status().reason); torch.manual_seed(0); "
    "from atma.ops import polar_attention as f; x = torch.randn(1, 1, 40, 16); one = torch.ones(1); "
    "print(f(x, x, x, one, one, one, one, torch.zeros(1, 16))[0].double().sum().item())"
)


def run(cache, **environment):
    """The backend that a fresh process takes, the reason, and a sum of what polar attention returns there."""
    settings = {key: value for key, value in os.environ.items() if key not in ("ATMA_NATIVE", "CXX")}
    settings |= {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run([sys.executable, "-c", REPORT], env=settings, capture_output=True, text=True, check=True)
    backend, reason, total = result.stdout.splitlines()
    return backend, reason, float(total)


def compiler(folder, body):
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo one; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    return str(path)


def test_switched_off_every_operation_takes_its_pytorch_path(tmp_path):
    backend, reason, _ = run(tmp_path, ATMA_NATIVE="off")
    assert (backend, reason) == ("cpu", "switched off by ATMA_NATIVE")


def test_a_failed_build_leaves_a_log_and_the_pytorch_path_and_is_not_tried_again(tmp_path):
    count = tmp_path / "count"
    broken = compiler(tmp_path, f"echo tried >> {count}; echo 'no such instruction' >&2; exit 1")
    for _ in range(2):
        backend, reason, total = run(tmp_path / "cache", CXX=broken)
        [log] = (tmp_path / "cache" / "atma").glob("native-*.log")
        assert backend == "cpu" and str(log) in reason
        assert "no such instruction" in log.read_text()
    assert count.read_text().split() == ["tried", "tried"]  # with and without OpenMP, the first time
    assert total == pytest.approx(run(tmp_path, ATMA_NATIVE="off")[2], rel=1e-9)


def test_a_cache_that_cannot_be_written_is_a_reason_not_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    backend, reason, _ = run(tmp_path / "file")
    assert backend == "cpu" and "the build failed" in reason


@pytest.mark.parametrize("backend", [NATIVE])
def test_a_library_is_built_once_and_agrees_with_pytorch(tmp_path, backend):
    found, reason, total = run(tmp_path)
    [library] = (tmp_path / "atma").iterdir()
    assert found == backend and str(library) in reason
    before = library.stat().st_mtime_ns
    assert run(tmp_path)[:2] == (found, reason)
    assert library.stat().st_mtime_ns == before
    assert total == pytest.approx(run(tmp_path, ATMA_NATIVE="off")[2], rel=1e-5)
