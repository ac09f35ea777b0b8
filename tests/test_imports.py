"""Imports go down: each module of the package imports only of its own layer and of those below, in functions too."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import atma.mixers
from atma.mixers.table import CORES, MEMORIES, MIXERS, POLICIES

SOURCES = Path(__file__).parents[1] / "src"
LAYERS = (
    "arguments bars deprecation device disk display large_pages launching model_argument notebook replacing "
    "saved_state settings shipped signals statistics strict weights",
    "bpe folders hub_files names rendered sampling text_pieces text_stream token_bytes tokenizer tokenizer_file words",
    "ops",
    "layers narrow state threads",
    "mixers",
    "config config_text lora_config model_config presets recipe_keys train_config",
    "model",
    "chat checkpoint decoding hashes layouts loading lora narrow_file selection stop_tokens talk",
    "generation",
    "serve",
    "report",
    "data",
    "train",
    "eval",
    "bench completion compress demo diagnose extend importer info integrations plan runs sweep",
    "compare",
    "commands help_text",
    "__init__",
    "cli",
    "__main__",
)
"""Parts of the package (modules and folders of src/atma), from bottom to top. Those of one layer may import each other.

`__init__` gives the names of the whole package, so that only its version is to be had from below it.
"""
CONCRETE = {place.partition(":")[0] for table in (MIXERS, CORES, MEMORIES, POLICIES) for place, _ in table.values()}
"""Modules of mixers, cores and memories: what is outside atma.mixers knows none of them, nor their states."""
NOT_YET: set[tuple[str, str]] = set()
"""Imports that are still to go: (file, what it imports)."""


class Import(NamedTuple):
    """One name that a file imports."""

    file: str
    line: int
    name: str
    """Dotted, of a module or of something in one."""

    def __str__(self) -> str:
        return f"src/{self.file}:{self.line} imports {self.name}"


def imports_of(file: str, text: str) -> Iterator[Import]:
    """All imports of a file, and what it takes of the whole package, as in `atma.load`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name) for alias in node.names if alias.name != "atma")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: write the module in full"
            yield from (Import(file, node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "atma":
            yield Import(file, node.lineno, f"atma.{node.attr}")


@functools.cache
def every_import() -> tuple[Import, ...]:
    files = sorted((SOURCES / "atma").rglob("*.py"))
    texts = {path.relative_to(SOURCES).as_posix(): path.read_text(encoding="utf-8") for path in files}
    return tuple(one for file, text in texts.items() for one in imports_of(file, text))


def upward(found: Import) -> str | None:
    """What is wrong with an import; None if it goes down."""
    heights = {part: height for height, parts in enumerate(LAYERS) for part in parts.split()}
    package, _, rest = found.name.partition(".")
    if package in ("tests", "benchmarks"):
        return f"{found}, which is not in the package"
    if package != "atma" or rest == "__version__":
        return None
    own, part = found.file.split("/")[1].removesuffix(".py"), rest.partition(".")[0]
    part = part if part in heights else "__init__"
    return f"{found}: '{part}' stands above '{own}'" if heights[part] > heights[own] else None


def concrete(found: Import) -> bool:
    """Whether it is of a mixer, core or memory, imported from outside their folder."""
    if not found.name.startswith("atma.mixers.") or found.file.startswith("atma/mixers/"):
        return False
    name = found.name.split(".")[2]
    return name in CONCRETE or not (name in atma.mixers.__all__ or (SOURCES / "atma/mixers" / f"{name}.py").is_file())


def test_every_part_of_the_package_has_one_layer():
    parts = [part for layer in LAYERS for part in layer.split()]
    found = {path.stem for path in (SOURCES / "atma").glob("*.py")}
    found |= {path.parent.name for path in (SOURCES / "atma").glob("*/__init__.py")}
    assert sorted(parts) == sorted(found)


def test_imports_go_down():
    assert [wrong for one in every_import() if (wrong := upward(one))] == []


def test_nothing_outside_mixers_imports_a_mixer_a_core_a_memory_or_its_state():
    found = {(one.file, one.name): str(one) for one in every_import() if concrete(one)}
    assert [told for known, told in found.items() if known not in NOT_YET] == []
    assert sorted(NOT_YET - found.keys()) == [], "these are gone: take them off the list"


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("state.py", "from atma.ops.paged.pages import Pages", None),
        ("ops/paged/native.py", "from atma.state import Pages", "'state' stands above 'ops'"),
        ("generation.py", "def f():\n    from atma.eval import provenance", "'eval' stands above 'generation'"),
        ("eval/tasks.py", "from atma.commands import suite", "'commands' stands above 'eval'"),
        ("data/dataset.py", "import atma.train.optim", "'train' stands above 'data'"),
        ("serve/disk.py", "from atma import state as states", None),
        ("serve/disk.py", "import atma\natma.load", "'__init__' stands above 'serve'"),
        ("serve/disk.py", "import atma\natma.__version__", None),
        ("commands/bench.py", "from tests.harness import reuse", "not in the package"),
    ],
)
def test_an_import_that_goes_up_is_told_with_its_file_and_line(file, line, told):
    wrong = [upward(one) for one in imports_of(f"atma/{file}", line)]
    assert wrong == [None] * len(wrong) if told is None else wrong and told in wrong[-1]
    if told is not None:
        assert wrong[-1].startswith(f"src/atma/{file}:{len(line.splitlines())} imports ")


@pytest.mark.parametrize(
    ("line", "known"),
    [
        ("from atma.mixers import Mixer, names", False),
        ("from atma.mixers import table", False),
        ("from atma.mixers.base import Place", False),
        ("from atma.mixers import Attention", True),
        ("from atma.mixers import gated_conv", True),
        ("from atma.mixers.attention import GlobalState", True),
        ("import atma.mixers.delta_memory", True),
    ],
)
def test_a_name_is_of_a_mixer_unless_it_is_of_the_table_or_the_base(line, known):
    assert [concrete(one) for one in imports_of("atma/eval/x.py", line)] == [known] * len(line.split(","))
    assert not any(concrete(one) for one in imports_of("atma/mixers/x.py", line))
