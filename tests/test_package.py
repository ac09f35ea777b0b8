"""The package's own names: complete, lazy, and told by `help(atma)` with examples that run."""

import contextlib
import io
import pydoc
import re
import subprocess
import sys
import textwrap

import pytest

import atma
from atma.ops import native
from tests.documents.policy import texts

EXAMPLES = [
    textwrap.dedent(block)
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", atma.__doc__ or "", re.M)
    if block.strip()
]


def test_every_name_is_there_once_and_tells_what_it_is() -> None:
    assert atma.__all__ == sorted(atma.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    homes = [name for names in atma._HOMES.values() for name in names.split()]
    assert sorted([*homes, "__version__"]) == sorted(atma.__all__)
    for name in homes:
        assert getattr(atma, name).__doc__, name
    assert set(atma.__all__) <= set(dir(atma))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'loads'"):
        _ = atma.loads


def test_importing_it_imports_nothing_large() -> None:
    code = "import sys, atma; print([name for name in ('torch', 'numpy', 'rich', 'IPython') if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_help_teaches_in_five_examples() -> None:
    assert len(EXAMPLES) == 5
    told = pydoc.render_doc(atma, renderer=pydoc.plaintext)
    for example in EXAMPLES:
        assert example.splitlines()[-1] in told


def test_the_examples_run_in_their_order(tmp_path, monkeypatch) -> None:
    texts(tmp_path / "my_texts")
    native.status()  # built, if it is not yet, before the cache is another
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told, names = io.StringIO(), {}
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), small_library(tmp_path / "my_texts"):
        for example in EXAMPLES:
            exec(compile(example, "help(atma)", "exec"), names)
    assert "nano: needles" in told.getvalue() and "ModelState" in told.getvalue()
    names["llm"].close()


@contextlib.contextmanager
def small_library(folder):
    import sysconfig

    real = sysconfig.get_path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_path", lambda name, *rest: str(folder) if name == "stdlib" else real(name, *rest))
        yield
