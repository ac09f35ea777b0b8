"""Sweeps: one recipe, many cells, any number of workers, and a folder that survives whatever stops them.

Reading order: recipe.py (what may be written under `[sweep]`), cells.py (from there to cells), task.py (how many
processes share one piece of work through files), ledger.py (the folder of a sweep), cell.py and metrics.py (one cell,
trained and measured), worker.py, controller.py, launch.py, status.py.
"""
