"""Contact sheets: the same prompts over any one or two settings; with and without the LCM-LoRA.

`sheet` what a sheet is, `axes` what its columns and lines differ in, `states` what the pipe is brought to for them,
`grid` the cells, planned, `sweeping` how the pictures are drawn, `metrics` numbers for them.
"""

from .sheet import Cell, Line, Sheet
from .sweeping import BASE_STEPS, LCM_STEPS, compare, sweep, sweep_guidance, sweep_steps, sweep_weights

__all__ = [
    "BASE_STEPS",
    "LCM_STEPS",
    "Cell",
    "Line",
    "Sheet",
    "compare",
    "sweep",
    "sweep_guidance",
    "sweep_steps",
    "sweep_weights",
]
