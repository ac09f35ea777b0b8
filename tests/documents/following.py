"""Follows a page word for word: its files are written where it says, its commands run in its order.

A line that is a path in a code span and a colon, before a fenced block, says that the block is that file. A fenced
block without a language is of commands; it is run in a clone of the repository where the paragraph before it says so.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from tests.documents.reading import ROOT

STEP = re.compile(r"(?P<before>[^\n]*(?:\n[^\n]+)*)\n\n```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
FILE = re.compile(r"`([\w./-]+)`:")


class Step(NamedTuple):
    """A file to write, or a line for the shell."""

    file: str
    """Where, in the reader's folder; "" for a line of the shell."""
    text: str
    in_clone: bool


def steps(page: str) -> list[Step]:
    """What a page tells its reader to do, in its order."""
    found = []
    for block in STEP.finditer(page):
        paragraph = block["before"].rpartition("\n\n")[2]
        if file := FILE.fullmatch(paragraph.strip()):
            found.append(Step(file[1], block["text"], False))
        elif not block["language"]:
            in_clone = "in a clone of atma" in " ".join(paragraph.split())
            found += [Step("", line, in_clone) for line in block["text"].splitlines()]
    return found


class Reader:
    """Someone with an empty folder and an environment in which atma is installed, and nothing can be downloaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "reader"
        self.folder.mkdir()
        made = folder / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(made)}))
        seen = [str(ROOT / "src"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        (packages / "seen.pth").write_text("\n".join(dict.fromkeys(seen)) + "\n")
        for program in ("atma", "pip"):
            script = made / "bin" / program
            script.write_text(f'#!/bin/sh\nexec "{made}/bin/python" -m {program} "$@"\n')
            script.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        path = {"PATH": f"{made}/bin{os.pathsep}{os.environ['PATH']}"}
        self.environment = kept | offline | path | {"OMP_NUM_THREADS": "1"}

    def do(self, step: Step) -> str:
        """Write the file, or run the line; what it printed. AssertionError: it failed."""
        if step.file:
            path = self.folder / step.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.text, encoding="utf-8")
            return ""
        at = ROOT if step.in_clone else self.folder
        done = subprocess.run(step.text, shell=True, cwd=at, env=self.environment, text=True, capture_output=True)
        assert done.returncode == 0, f"{step.text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout
