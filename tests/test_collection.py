"""Every worker of a parallel run finds the same tests: no name depends on the time, addresses, hashes or an order."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONS = ("--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist")


def names(folder, seed, **environment):
    """The names of all tests, in their order, as a process with this seed of hashes finds them."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | environment
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS],
        cwd=folder,
        env=kept | {"PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def twice(folder, **environment):
    """The names that one of two processes alone finds; or None where both find the same in the same order."""
    first, begun = names(folder, 1, **environment), time.time()
    while int(time.time()) == int(begun):  # a name may hold the second
        time.sleep(0.05)
    second = names(folder, 2, **environment)
    return None if first == second else sorted({*first} ^ {*second}) or "the order"


@pytest.mark.slow  # a parallel run compares them itself
def test_two_processes_find_the_same_tests():
    assert twice(ROOT) is None


def test_names_that_hold_the_time_an_address_or_an_order_of_hashes_are_told(tmp_path):
    values = {"time": "int(time.time())", "address": "id(object())", "order": "sum(map(hash, 'ab'))"}
    lines = [f"@pytest.mark.parametrize('x', [{value}])\ndef test_{name}(x): ..." for name, value in values.items()]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text("\n".join(["import pytest, time", *lines, "def test_same(): ..."]))
    told = twice(tmp_path, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")  # others' plugins take seconds to import
    assert len(told) == 6 and all(any(f"test_{name}[" in one for one in told) for name in values)
