"""Recall: small models of any mixer trained on tasks of remembering, and tested at lengths they were not trained on.

Multi-query associative recall, copying, selective copying, the six tasks of MAD, and a probe of how many pairs a state
of a model holds. Unlike the other suites this one measures a way to mix tokens and no given weights: every run begins
from fresh ones.
"""

from atma.eval.recall.suite import Recall, learn, recall
from atma.eval.recall.tasks import examples

__all__ = ["Recall", "examples", "learn", "recall"]
