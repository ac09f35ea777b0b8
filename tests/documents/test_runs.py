"""A page's commands are run, small, in its order and in one folder, so that what one writes another reads."""

import contextlib
import io
import os
import sysconfig
from pathlib import Path

import pytest
import torch

from atma.cli import main
from tests.documents.policy import GIVEN, WRITTEN, cut, texts, why_not
from tests.documents.reading import EVERYTHING, ROOT, Code
from tests.documents.test_commands import is_mention

SLOW = {page for page in EVERYTHING if page != "README.md"}
FOLLOWED = {"docs/adding-a-mixer.md"}
"""Pages that tests/documents/test_following.py follows to the word."""


def runs(page):
    """What of a page is run."""
    return [one for one in EVERYTHING[page] if why_not(one) is None and (isinstance(one, Code) or not is_mention(one))]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder as a reader has it, beside the recipes; the standard library is a small part of it."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    texts(tmp_path / "library")
    real = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name, *rest: str(tmp_path / "library") if name == "stdlib" else real(name, *rest)
    )
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def give(words):
    """Make what a command takes for granted."""
    read = [word for before, word in zip(("", *words), words, strict=False) if before not in WRITTEN]
    for word in read:
        path = Path(word.rpartition("=")[2].rstrip("/"))
        if str(path) in GIVEN and not there(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            GIVEN[str(path)](path)


def there(path):
    """Whether it was made: the data of a recipe, or the thing itself."""
    return {"recipes/nano.toml": Path("data/stdlib")}.get(str(path), path).exists()


def carry_out(one):
    """What goes wrong when a command or a block of Python is run; None if nothing does."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        if isinstance(one, Code):
            exec(compile(one.text, str(one), "exec"), {})
            return None
        words = cut(one.words)
        give(words)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in one.environment.items():
                patch.setitem(os.environ, name, value)
            status = main(words[1:])
    if one.into:
        Path(one.into).write_text(told.getvalue())
    return None if status == 0 else f"{one}\n  run as: {' '.join(words)}\n  {told.getvalue().strip()[-600:]}"


PAGES = [
    pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW), id=page)
    for page in EVERYTHING
    if page not in FOLLOWED and runs(page)
]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_do_what_it_says(page, reader):
    failed = [wrong for one in runs(page) if (wrong := carry_out(one))]
    assert not failed, "\n".join(failed)


def test_every_program_that_is_no_command_of_ours_is_listed_with_a_reason():
    for one in (one for page in EVERYTHING.values() for one in page if not isinstance(one, Code)):
        assert one.words[0] == "atma" or why_not(one), f"{one}: tests/documents/policy.py says neither how nor why not"
