"""How fast a pipe is as it is and accelerated, and where its time goes.

`stages` tells the parts of a call apart, `run` lets both take turns, `result` holds what was found, `advice` says what
it suggests, `show` writes it down.
"""

from .result import PUBLISHED, Advice, Benchmark, Published, Row, Spread
from .run import benchmark

__all__ = ["PUBLISHED", "Advice", "Benchmark", "Published", "Row", "Spread", "benchmark"]
