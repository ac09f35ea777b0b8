"""`atma compile`: the CPU kernels ahead of time."""

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
    from atma.ops.native import finding
    from atma.ops.native.levels import FOLDER, build, of_machine

    compiler = finding.find_compiler()
    if compiler is None:
        raise ValueError("no C++ compiler found (c++, g++ or clang++, or the one that CXX names); install one")
    if not levels:
        print(finding.compiled().reason)
        return
    wanted = [level for level in of_machine() if level.name in levels]
    if len(wanted) < len(set(levels)):
        able = ", ".join(level.name for level in of_machine())
        raise ValueError(f"--levels {' '.join(levels)}: this machine compiles for {able or 'none of them'}")
    for path in build(compiler, wanted, FOLDER, finding.tell):
        print(path)
