"""Likelihood by length of any model, in bits per byte, so that models of different tokenizers can be compared.

`Likelihood` (suite.py) is the suite; texts.py cuts the texts, reading.py reads them, trend.py tests what is seen.
"""

from atma.eval.likelihood.suite import Likelihood
from atma.eval.likelihood.trend import Trend, trend

__all__ = ["Likelihood", "Trend", "trend"]
