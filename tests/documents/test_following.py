"""docs/adding-a-mixer.md is followed word for word: its mixer is installed, trains, writes, and keeps the laws."""

import json

import pytest

from tests.documents.following import Reader, Step, steps
from tests.documents.reading import ROOT

PAGE = (ROOT / "docs" / "adding-a-mixer.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Someone who has followed the page up to the laws, with what each line printed."""
    person = Reader(tmp_path_factory.mktemp("reader"))
    (person.folder / "my_texts").mkdir()
    for i in range(12):
        text = f"The cat of number {i} sat on mat {i * 7}, and ran.\n" * (30 + i)
        (person.folder / "my_texts" / f"{i}.txt").write_text(text)
    person.printed = {step.text: person.do(step) for step in steps(PAGE) if not step.in_clone}
    return person


def printed(reader, beginning):
    (told,) = (told for line, told in reader.printed.items() if line.startswith(beginning))
    return told


def test_the_page_has_every_step():
    found = steps(PAGE)
    assert [step.file for step in found if step.file] == ["fade/pyproject.toml", "fade/atma_fade.py", "fade.toml"]
    lines = [step.text.split()[:2] for step in found if not step.file]
    verbs = [["pip", "install"], ["atma", "info"], *(["atma", v] for v in ("prepare", "train", "generate", "eval"))]
    assert lines == [*verbs, ["python", "-m"]]
    assert found[-1] == Step("", 'python -m pytest tests/laws -k "fade and not none"', True)


@pytest.mark.slow
def test_its_mixer_is_found_once_it_is_installed(reader):
    assert "fade" in printed(reader, "atma info").split()


@pytest.mark.slow
def test_its_mixer_trains_and_learns(reader):
    rows = [json.loads(line) for line in (reader.folder / "runs/fade/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row.get("kind") == "step" or "loss" in row]
    assert losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_its_mixer_writes(reader):
    assert len(printed(reader, "atma generate").strip()) > 7


@pytest.mark.slow
def test_its_mixer_is_measured(reader):
    assert "256" in printed(reader, "atma eval")


@pytest.mark.slow
def test_its_mixer_keeps_the_laws(reader):
    (laws,) = (step for step in steps(PAGE) if step.in_clone)
    assert "100%" in reader.do(laws)
