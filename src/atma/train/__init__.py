"""Training: `train(recipe, out)` runs a recipe into a run folder and `train(..., resume=True)` goes on after any stop.

Reading order: loop.py (how a run begins), run.py (the run), step.py (one optimiser step), optim.py and schedule.py (how
parameters move), objectives.py and distractor.py (optional loss terms), parallel.py, owners.py and together.py (several
processes), resume.py, saving.py and record.py (what is kept on disk).
"""

from atma.train.loop import Stopped, train
from atma.train.progress import Progress, Silent, terminal_progress
from atma.train.record import export_tensorboard, read_record

__all__ = ["Progress", "Silent", "Stopped", "export_tensorboard", "read_record", "terminal_progress", "train"]
