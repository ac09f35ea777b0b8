"""What moves information between tokens: one module a mixer, what each keeps to (`base`), and their names (`table`)."""

from atma.mixers.base import Call, Mixer, Place
from atma.mixers.stretches_prefix import Transition
from atma.mixers.table import CORES, MEMORIES, MIXERS, find, names, small

__all__ = ["CORES", "MEMORIES", "MIXERS", "Call", "Mixer", "Place", "Transition", "find", "names", "small"]
