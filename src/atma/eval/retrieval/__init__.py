"""Retrieval over long contexts: passkeys, needles and the task types of RULER, by length, depth and haystack.

`Retrieval` is the suite; `Maker` gives its prompts alone, `exported` as texts for use elsewhere. heat_map.py draws it.
"""

from atma.eval.retrieval.export import exported
from atma.eval.retrieval.maker import Maker
from atma.eval.retrieval.presets import PRESETS, TASKS, Setting, settings
from atma.eval.retrieval.suite import Retrieval, measured

__all__ = ["PRESETS", "TASKS", "Maker", "Retrieval", "Setting", "exported", "measured", "settings"]
