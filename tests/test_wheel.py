"""The wheel as a stranger gets it: built with compiled kernels, installed beside nothing, run without a compiler."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from atma.ops import native
from atma.ops.native import levels

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel with the library of every level of this machine."""
    if native.find_compiler() is None or not levels.of_machine():
        pytest.skip("no C++ compiler here, or no level of this machine")
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "sources"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file() and name.startswith(
            ("src/", "recipes/", "docs/", "README", "LICENSE", "setup", "pyp")
        ):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(copy)]
    subprocess.run(command, env=os.environ | {"ATMA_BUILD_NATIVE": "1"}, check=True)
    [made] = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel):
    """The folder it is installed in; what it needs is taken from the environment of the tests."""
    folder = wheel.parent / "installed"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True)
    return folder


def run(installed, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """A command of the installed package, where there is no compiler."""
    places = {"PYTHONPATH": str(installed), "PATH": "/nowhere", "HOME": str(installed.parent), "CXX": ""}
    command = [sys.executable, "-m", "atma", *words]
    environment = os.environ | places | environment
    return subprocess.run(command, env=environment, cwd=installed.parent, capture_output=True, text=True, check=True)


def test_it_is_for_this_platform_and_any_python(wheel):
    assert wheel.name.split("-")[2:4] == ["py3", "none"] and not wheel.name.endswith("any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for level in levels.of_machine():
        assert sum(f"/lib/native-{level.name}-{levels.source_key()}-" in name for name in names) == 1
    for ending in ("atma/recipes/nano.toml", "atma/recipes/stacks/based-nano.toml", "atma/docs/guide.md", "LICENSE.md"):
        assert any(name.endswith(ending) for name in names), ending


def test_it_answers_without_a_compiler_by_its_own_library(installed):
    told = run(installed, "info", ATMA_NATIVE="require").stdout
    [line] = [line for line in told.splitlines() if line.startswith("native kernels")]
    assert str(installed) in line and "packaged" in line
    answer = run(installed, "generate", "def f(", "--max-tokens", "8", ATMA_NATIVE="packaged")
    assert answer.stdout and answer.stderr == ""


def test_its_recipes_have_names(installed):
    cut = ("train.tokens=2048", "train.batch_tokens=1024", "data.path=stdlib-none")
    command = [sys.executable, "-m", "atma", "train", "own-data", "--out", "run", "--set", *cut]
    environment = os.environ | {"PYTHONPATH": str(installed), "PATH": "/nowhere"}
    ended = subprocess.run(command, env=environment, cwd=installed.parent, capture_output=True, text=True)
    assert ended.returncode == 2 and "stdlib-none" in ended.stderr  # the recipe was found, its data are not there
