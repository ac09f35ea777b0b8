"""What the pages and notebooks show of Python passes pyright's strict mode: an editor has nothing to underline."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents.reading import EVERYTHING, ROOT, Code

PAGES = ("README.md", "docs/guide.md", "docs/python.md", "docs/notebooks.md")


def written(folder: Path) -> None:
    """The blocks of the pages and the notebooks, a module each, and pyright's settings."""
    for one in (one for page in PAGES for one in EVERYTHING[page] if isinstance(one, Code)):
        (folder / f"{one.page.replace('/', '_').replace('.', '_')}_{one.line}.py").write_text(one.text)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        (folder / f"{path.stem}.py").write_text("\n\n".join(code))
    settings = {"include": ["."], "typeCheckingMode": "strict", "pythonVersion": "3.11"}
    settings |= {"extraPaths": [str(ROOT / "src")], "reportUnusedExpression": False}  # a cell's last line is shown
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))


def test_what_pages_and_notebooks_show_is_typed_strictly(tmp_path) -> None:
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    pyright = shutil.which("pyright", path=beside)
    if pyright is None or subprocess.run([pyright, "--version"], capture_output=True).returncode:
        pytest.skip("pyright is not installed: pip install 'atma-lm[check]'")
    written(tmp_path)
    assert len(list(tmp_path.glob("*.py"))) >= 8
    command = [pyright, "-p", str(tmp_path), "--pythonpath", sys.executable]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
