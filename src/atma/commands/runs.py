"""`atma runs`: how run folders stand, in a table, as JSON, or as a page of their curves."""

import json as json_module
from pathlib import Path

from atma.commands.tables import print_table
from atma.runs.table import Column


def run(
    folders: tuple[Path, ...] = (Path("runs"),),
    /,
    sort: Column = "started",
    reverse: bool = False,
    json: bool = False,
    page: Path | None = None,
) -> None:
    """List the run folders of `atma train`: how each stands, its losses, speed and size.

    A run is running (a process trains in it), finished, stopped (it can go on with --resume), begun (nothing is trained
    yet) or broken (its recipe or record cannot be read). Time is that of training steps.

    Args:
        folders: Run folders, or folders with some in them, up to three levels down.
        sort: The column to sort by: newest, largest, fastest or lowest loss first.
        reverse: Sort the other way round.
        json: Print JSON, an object a run, in place of the table.
        page: Also write the curves of all these runs beside each other to this .html file; its folder is made.
    """
    from atma.commands.suite import check_page, command_line
    from atma.runs.reading import find_runs, read_run
    from atma.runs.table import HEAD, ordered, rows

    check_page(page)
    found = ordered([read_run(folder) for folder in find_runs(folders)], sort, reverse)
    written = None
    if page is not None:
        from atma.report.content import environment
        from atma.runs.page import page as write

        written = write(page, found, command_line(), environment())
    if json:
        print(json_module.dumps([one.as_dict() for one in found], indent=1, allow_nan=False))
    else:
        print_table(f"{len(found)} run{'s' * (len(found) != 1)}", HEAD, rows(found))
        for one in found:
            if one.why:
                print(f"broken: {one.folder}: {one.why}")
    if written is not None and not json:
        print(f"page: {written}")
