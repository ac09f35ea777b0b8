"""The libraries that a wheel carries: which is taken, what ATMA_NATIVE says, and what happens where none can be."""

import platform
import shutil
import subprocess

import pytest
import torch

from atma.cli import main
from atma.ops import native
from atma.ops.native import levels

HERE = [level for level in levels.LEVELS if platform.machine() in level.machines]
V3, V4 = (next(level for level in levels.LEVELS if level.name == name) for name in ("x86-64-v3", "x86-64-v4"))


FLAGS = ("-std=c++17", "-O0", "-fPIC", "-w")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder of one source, and of the library of it for the best level of this machine, quickly compiled."""
    compiler = native.find_compiler()
    if compiler is None or not HERE:
        pytest.skip("no C++ compiler here, or no level of this machine")
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "sources").mkdir()
    for file in (levels.SOURCES / "polar.cpp", *levels.SOURCES.glob("*.h")):
        shutil.copy(file, folder / "sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levels, "SOURCES", folder / "sources")
        patch.setattr(levels, "FLAGS", FLAGS)
        levels.build(compiler, levels.runnable()[:1], folder / "lib", lambda text: None)
    return folder


@pytest.fixture
def wheel(compiled, tmp_path, monkeypatch):
    """A folder of packaged libraries, with their source in place of ours."""
    shutil.copytree(compiled, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(levels, "SOURCES", tmp_path / "sources")
    monkeypatch.setattr(levels, "FLAGS", FLAGS)
    monkeypatch.setattr(levels.packaged, "__defaults__", (tmp_path / "lib",))
    monkeypatch.delenv("ATMA_NATIVE", raising=False)
    monkeypatch.setattr(native, "compiled", lambda: native.Status(None, "compiled here"))
    return tmp_path / "lib"


def found() -> native.Status:
    """What a fresh process would find."""
    return native.status.__wrapped__()


def test_the_best_level_that_the_processor_can_run_is_taken(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert [level.name for level in levels.runnable(V4.needs)] == ["x86-64-v4", "x86-64-v3"]
    assert [level.name for level in levels.runnable(V3.needs)] == ["x86-64-v3"]
    assert levels.runnable(V4.needs | {"avx512_bf16", "avx512_vnni"})[0].name == "x86-64-v4-bf16"
    assert levels.runnable(frozenset({"sse2"})) == []
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert [level.name for level in levels.runnable(frozenset())] == ["arm64"]


def test_the_packaged_library_is_taken_without_a_compiler_and_says_so(wheel, monkeypatch, capsys):
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    status = found()
    [path] = wheel.glob("*.so")
    assert status.library is not None and status.name == path.stem
    assert status.reason.startswith(f"{path}, packaged, ") and capsys.readouterr().err == ""
    assert status.library.threaded() == 1  # with the OpenMP of the process: it names none


def test_it_names_no_openmp_of_its_own(wheel):
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf here")
    [path] = wheel.glob("*.so")
    told = subprocess.run([readelf, "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in told and "omp" not in told


def test_a_library_of_other_sources_is_not_taken(wheel):
    (levels.SOURCES / "polar.cpp").write_text("// others")
    assert levels.packaged() is None and found().reason == "compiled here"


def test_one_of_another_build_or_cut_short_is_told_and_one_is_compiled(wheel, monkeypatch, capsys):
    [path] = wheel.glob("*.so")
    other = path.with_name(f"{path.stem[:-8]}00000000.so")
    path.rename(other)  # sorted first, and called otherwise inside
    assert found().reason == "compiled here" and "the library of another build" in capsys.readouterr().err
    beginning = other.read_bytes()[:1000]
    monkeypatch.setenv("ATMA_NATIVE", "packaged")
    assert "cannot be loaded" in found().reason and "the library of another build" in found().reason
    monkeypatch.delenv("ATMA_NATIVE")
    other.unlink()  # it is mapped by this process
    other.write_bytes(beginning)
    assert found().reason == "compiled here" and "the packaged kernels cannot be loaded" in capsys.readouterr().err


def test_a_newer_library_of_a_level_replaces_the_older(wheel, monkeypatch):
    [old] = wheel.glob("*.so")
    monkeypatch.setattr(levels, "FLAGS", (*levels.FLAGS, "-g0"))
    [new] = levels.build(native.find_compiler(), levels.runnable()[:1], wheel, lambda text: None)
    assert list(wheel.iterdir()) == [new] and new != old


@pytest.mark.parametrize(
    ("mode", "there", "reason"),
    [
        ("", True, "packaged, "),
        ("1", True, "packaged, "),
        ("auto", True, "packaged, "),
        ("require", True, "packaged, "),
        ("packaged", True, "packaged, "),
        ("PACKAGED", False, "no library for this processor"),
        ("compile", True, "compiled here"),
        ("auto", False, "compiled here"),
        ("off", True, "switched off by ATMA_NATIVE"),
        ("0", True, "switched off by ATMA_NATIVE"),
    ],
)
def test_atma_native_chooses(wheel, monkeypatch, mode, there, reason):
    if not there:
        shutil.rmtree(wheel)
    monkeypatch.setenv("ATMA_NATIVE", mode)
    assert reason in found().reason


def test_required_kernels_that_are_not_there_are_an_error(wheel, monkeypatch):
    shutil.rmtree(wheel)
    monkeypatch.setenv("ATMA_NATIVE", "require")
    with pytest.raises(ValueError, match="ATMA_NATIVE=require, and there are no compiled CPU kernels: compiled here"):
        found()
    monkeypatch.setenv("ATMA_NATIVE", "never")
    with pytest.raises(ValueError, match="ATMA_NATIVE=never: none of auto, compile, packaged, require, off"):
        found()


def test_the_command_compiles_for_levels_of_this_machine_alone(wheel, monkeypatch, capsys):
    shutil.rmtree(wheel)
    monkeypatch.setattr(levels, "FOLDER", wheel)
    level = levels.runnable()[0].name
    assert main(["compile", "--levels", level]) == 0
    told = capsys.readouterr()
    assert [str(path) for path in wheel.iterdir()] == told.out.split() and level in told.err
    foreign = next(level.name for level in levels.LEVELS if level not in HERE)
    assert main(["compile", "--levels", foreign]) == 2 and "this machine compiles for" in capsys.readouterr().err
    monkeypatch.setattr(native, "find_compiler", lambda: "/bin/false")
    assert main(["compile", "--levels", level]) == 2 and "is no C++ compiler" in capsys.readouterr().err
    assert main(["compile"]) == 2 and "compiled here" in capsys.readouterr().err  # the reason why there is none
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    assert main(["compile"]) == 2 and "no C++ compiler found" in capsys.readouterr().err


def test_the_last_bits_are_of_the_library_on_a_cpu_and_of_pytorch_elsewhere():
    status = native.status()
    assert native.name(torch.device("cpu")) == (status.name or f"torch {torch.__version__} on cpu")
    assert native.name(torch.device("cuda")) == f"torch {torch.__version__} on cuda"
