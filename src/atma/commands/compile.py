"""`atma compile`: the CPU kernels ahead of time."""

import subprocess
from typing import Literal

LevelName = Literal["x86-64-v3", "x86-64-v4", "x86-64-v4-bf16", "arm64"]


def run(levels: tuple[LevelName, ...] = ()) -> None:
    """Compile the CPU kernels now, so that no later command waits for it: when an image is built, or for the last
    percent of speed.

    Without --levels for this very processor, into the user's cache: an installation without packaged kernels takes them
    from now on, one with them where ATMA_NATIVE=compile. With --levels for others, into the package: an image that is
    built on one machine and runs on many.

    Args:
        levels: Instruction levels to compile for, instead of this processor.
    """
    from atma.ops import native
    from atma.ops.native.levels import FOLDER, build, of_machine

    compiler = native.find_compiler()
    if compiler is None:
        raise ValueError("no C++ compiler found (c++, g++ or clang++, or the one that CXX names); install one")
    if not levels:
        print(_here())
        return
    wanted = [level for level in of_machine() if level.name in levels]
    if len(wanted) < len(set(levels)):
        able = ", ".join(level.name for level in of_machine())
        raise ValueError(f"--levels {' '.join(levels)}: this machine compiles for {able or 'none of them'}")
    try:
        made = build(compiler, wanted, FOLDER, native.tell)
    except subprocess.SubprocessError as error:
        raise ValueError(f"{compiler} is no C++ compiler: {error}") from None
    print("\n".join(map(str, made)))


def _here() -> str:
    """Where the library for this processor is. ValueError: there is none to be had."""
    from atma.ops import native

    try:
        found = native.compiled()
    except subprocess.SubprocessError as error:
        raise ValueError(f"{native.find_compiler()} is no C++ compiler: {error}") from None
    if found.library is None:
        raise ValueError(found.reason)
    return found.reason
