"""Pages are read as a person reads them."""

import pytest

from tests.documents.reading import EVERYTHING, Code, Command, read

PAGE = """# Title

Try `atma eval lengths --model
nano` or `atma.generate`, then `make test`.

```
atma prepare 'my texts/' --out a \\
    --tokenizer bytes    # a remark
X=1 Y=2 atma info > info.txt && make check
```

```python
import atma
```

```text
atma nothing
```

```console
$ atma info
atma 1.0
```

```
User: hello
```
"""


def test_commands_are_found_in_order_with_their_lines(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    found = read(tmp_path / "page.md", "page.md")
    assert [(one.line, one.words) if isinstance(one, Command) else (one.line, one.text) for one in found] == [
        (3, ("atma", "eval", "lengths", "--model", "nano")),
        (4, ("make", "test")),
        (7, ("atma", "prepare", "my texts/", "--out", "a", "--tokenizer", "bytes")),
        (9, ("atma", "info")),
        (9, ("make", "check")),
        (13, "import atma\n"),
        (21, ("atma", "info")),
    ]
    assert found[3].environment == {"X": "1", "Y": "2"} and found[3].into == "info.txt"


def test_a_line_among_commands_that_is_none_is_told(tmp_path):
    (tmp_path / "page.md").write_text("```\natma info\natmo info\n```\n")
    with pytest.raises(ValueError, match=r"page.md:3 atmo info: no command"):
        read(tmp_path / "page.md", "page.md")


def test_the_pages_have_commands_and_python():
    assert any(isinstance(one, Code) for one in EVERYTHING["docs/guide.md"])
    assert {"atma", "make"} <= {one.words[0] for one in EVERYTHING["README.md"] if isinstance(one, Command)}
