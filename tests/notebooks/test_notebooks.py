"""The notebooks are valid, hold no outputs, and run from their first cell to their last with their sizes cut."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install 'atma-lm[notebook]'")
nbclient = pytest.importorskip("nbclient", reason="pip install 'atma-lm[notebook]'")
pytest.importorskip("ipykernel", reason="pip install 'atma-lm[notebook]'")

from tests.documents.policy import texts  # noqa: E402

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
CUTS = {
    "does_my_model_hold_at_length": """
        MODEL, CONTROL, LENGTHS, DOCUMENTS, TRIALS, DEPTHS = "nano", "nano-rope-canon", [256, 512], 1, 1, [50]
    """,
    "train_short_run_long": """
        TOKENS, LENGTHS, DOCUMENTS, TRIALS, FOLDER = 4096, [256, 512], 1, 1, "train-short-run-long"
        SOURCE = "library"
    """,
}
SMALL_LIBRARY = """
import sysconfig
_real = sysconfig.get_path
sysconfig.get_path = lambda name, *rest: "library" if name == "stdlib" else _real(name, *rest)
from atma.ops import native
native.status()
import os
os.environ["XDG_CACHE_HOME"] = os.path.abspath("cache")
"""


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_stripped_and_has_its_parameters_in_one_cell(path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    [parameters] = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    names = re.findall(r"^([A-Z]+) =", parameters.source, re.M)
    assert names and all(re.search(rf"\b{name}\b", CUTS[path.stem]) for name in names)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem == "train_short_run_long")) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs_and_shows_its_figures(path, tmp_path, monkeypatch) -> None:
    texts(tmp_path / "library")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
    notebook = read(path)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = SMALL_LIBRARY + "\n".join(line.strip() for line in CUTS[path.stem].splitlines())
    nbclient.NotebookClient(notebook, timeout=540, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    html = "".join(output.get("data", {}).get("text/html", "") for output in shown)
    assert html.count("<svg viewBox") >= 2 and "rgb(" in html and "<script" not in html
    assert not [output for output in shown if output.get("name") == "stderr" and "Warning" in output.text]
    for cell in notebook.cells:  # progress is one line that changes, not many
        assert sum("text/html" in output.get("data", {}) for output in cell.get("outputs", ())) <= 3
