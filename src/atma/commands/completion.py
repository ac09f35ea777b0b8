"""`atma completion`: a script that makes TAB complete commands."""

from typing import Literal


def run(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print the script that makes TAB complete verbs, options, their values, models, recipes and settings.

    Write it where the shell looks for such scripts, as in the examples, and begin a new shell; zsh needs the folder in
    its fpath, before compinit. Make it anew after an update. Completing runs nothing but the shell.

    Args:
        shell: bash, zsh or fish.
    """
    import importlib

    import atma
    from atma.completion.facts import table
    from atma.completion.scripts import script

    verbs = importlib.import_module("atma.cli").VERBS  # the table of this verb too, which stands above it
    print(script(shell, table(verbs), atma.__version__), end="")
