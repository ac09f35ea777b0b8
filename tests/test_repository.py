"""House rules that a machine can check: sizes, names, no code from data, and pages that name only what exists."""

import ast
import functools
import re
import statistics
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
ALL_CODE = [path for folder in ("src", "tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
MEBIBYTE = 1 << 20
CUDA = re.compile("nvidia-|cuda-")
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


class Sized(NamedTuple):
    """A function of a file, the lines it has and the arguments that it is called with."""

    path: Path
    name: str
    lines: int
    arguments: int


@functools.cache
def functions() -> list[Sized]:
    def arguments(node):
        given = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        return len([name for name in given if name not in ("self", "cls")])

    return [
        Sized(path, node.name, node.end_lineno - node.lineno + 1, arguments(node))
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if isinstance(node, Function)
    ]


def named(path):
    return path.relative_to(ROOT).as_posix()


def test_no_file_is_long():
    limits = {path: 600 if path.stem.startswith("gpu") else 300 for path in SOURCES}
    long = [named(path) for path, limit in limits.items() if len(path.read_text().splitlines()) > limit]
    assert not long


def test_no_function_is_long():
    long = [one for one in functions() if one.lines > (120 if one.path.stem.startswith("gpu") else 60)]
    assert not long


def test_most_functions_are_short():
    sizes = sorted(one.lines for one in functions())
    assert statistics.median(sizes) <= 12
    assert sizes[int(0.9 * (len(sizes) - 1))] <= 40


FOREIGN = {
    f"src/atma/integrations/transformers/{name}"
    for name in ("base_model.py:forward", "causal_lm.py:forward", "cache.py:update", "pretrained.py:save_pretrained")
}
"""Methods whose arguments transformers asks for."""


def test_no_function_takes_many_arguments():
    operations = ROOT / "src" / "atma" / "ops"
    many = [
        f"{named(one.path)}:{one.name}"
        for one in functions()
        if one.arguments > 8 and operations not in one.path.parents
    ]
    assert not set(many) - FOREIGN


def test_public_functions_take_no_keyword_bag():
    bags = []
    for path in SOURCES:
        tree = tree_of(path)
        bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef))]
        public = [n for body in bodies for n in body if isinstance(n, Function) and not n.name.startswith("_")]
        bags += [f"{named(path)}:{node.name}" for node in public if is_bag(node.args.kwarg)]
    assert not set(bags) - FOREIGN


def is_bag(keywords):
    """Whether keyword arguments are of any name: those of a TypedDict are told to editors, and checked."""
    annotation = "" if keywords is None or keywords.annotation is None else ast.unparse(keywords.annotation)
    return keywords is not None and not annotation.startswith("Unpack[")


def test_no_module_is_named_after_nothing():
    assert not [named(path) for path in SOURCES if path.stem in FORBIDDEN_NAMES or path.parent.name in FORBIDDEN_NAMES]


def test_every_module_says_what_it_is():
    silent = [named(path) for path in SOURCES if path.stat().st_size and not ast.get_docstring(tree_of(path))]
    assert not silent


def test_nothing_is_pickled_and_no_except_is_bare():
    texts = {path: path.read_text(encoding="utf-8") for path in ALL_CODE}
    suspects = [path for path, text in texts.items() if re.search(r"\bpickle\b|\bexcept\s*:", text)]
    wrong = [f"{named(path)}:{node.lineno}" for path in suspects for node in ast.walk(tree_of(path)) if is_wrong(node)]
    assert suspects and not wrong


def is_wrong(node):
    """Whether it imports pickle, but for its error, or is a bare except."""
    if isinstance(node, ast.Import):
        return "pickle" in {name.name for name in node.names}
    if isinstance(node, ast.ImportFrom) and node.module == "pickle":
        return {name.name for name in node.names} != {"UnpicklingError"}
    return isinstance(node, ast.ExceptHandler) and node.type is None


def test_torch_load_is_in_the_importer_alone_and_loads_weights_only():
    calls = {}
    for path in (path for path in SOURCES if re.search(r"\bload\b", path.read_text(encoding="utf-8"))):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                calls[named(path)] = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    assert list(calls) == ["src/atma/importer.py"]
    assert calls["src/atma/importer.py"]["weights_only"] == "True"


def test_packaged_models_stay_small():
    big = [named(path) for path in (ROOT / "src/atma/pretrained").rglob("*") if path.stat().st_size > 6 * MEBIBYTE]
    assert not big


def test_readme_names_only_files_that_exist():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    text = readme.read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!https?://|#|mailto:)([^)\s#]+)", text)
    quoted = re.findall(r"`((?:src|tests|docs|recipes|benchmarks|\.ci)/[\w./-]*)`", text)
    missing = [path for path in {*linked, *quoted} if not (ROOT / path).exists()]
    assert not missing


def test_pages_and_sections_that_code_cites_exist():
    headings = {
        page: set(re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", (ROOT / "docs" / f"{page}.md").read_text(), re.M))
        for page in ("maths", "mixers", "protocols")
    }
    missing = [
        f"{named(path)}: {page}.md has no section {section}"
        for path in ALL_CODE
        for page, rest in re.findall(
            r"\b(maths|mixers|protocols)\.md(, sections? [0-9., and]*[0-9])?", path.read_text()
        )
        for section in re.findall(r"\d+(?:\.\d+)?", rest)
        if section not in headings[page]
    ]
    assert not missing


def test_the_make_targets_that_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    pages = [path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if path.exists()]
    told = {name for page in pages for name in re.findall(r"(?:^|`)make ([a-z-]+)", page, re.M)}
    assert told
    assert not {name for name in told if not re.search(rf"^{name}:", makefile, re.M)}


def test_the_lock_holds_every_package_that_the_project_asks_for_and_no_place():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {}
    for line in (ROOT / "constraints-locked.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            found = Requirement(line)
            (pin,) = found.specifier
            assert pin.operator == "==" and not found.url
            locked.setdefault(canonical(found.name), []).append(pin.version)
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    capped = (ROOT / "constraints.txt").read_text().splitlines()
    for one in map(Requirement, (*asked, *(line for line in capped if not line.startswith("#")))):
        if one.name != project["name"]:
            assert locked[canonical(one.name)] and all(map(one.specifier.contains, locked[canonical(one.name)])), one


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_the_locked_packages_need_is_locked():
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "constraints-locked.txt").read_text().splitlines() if not line.startswith("#")]
    locked = {canonical(one.name): one for one in map(Requirement, lines)}
    missing = set()
    for name, one in locked.items():
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if one.specifier.contains(found.version):
            needs = [need for need in map(Requirement, found.requires or ()) if not CUDA.match(need.name)]
            wanted = {
                canonical(need.name) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})
            }
            missing |= {f"{name} needs {need}" for need in wanted - set(locked)}
    assert not missing
