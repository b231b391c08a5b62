"""Contact sheets: the same prompts over steps, guidance, weights, recipes, seeds; with and without the LCM-LoRA.

`sheet` what a sheet is, `sweep` how its pictures are drawn.
"""

from .sheet import Cell, Line, Sheet
from .sweep import BASE_STEPS, LCM_STEPS, compare, sweep, sweep_guidance, sweep_steps

__all__ = ["BASE_STEPS", "LCM_STEPS", "Cell", "Line", "Sheet", "compare", "sweep", "sweep_guidance", "sweep_steps"]
