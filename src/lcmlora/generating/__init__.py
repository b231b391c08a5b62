"""Many pictures from rows, each in a PNG that says what made it, and the same picture again from that PNG.

`reading` files of rows, `rows` what they ask for, `records` what a picture says, `loop` the drawing, `overview`
all of them on one sheet, `remaking` the same again.
"""

from .loop import Generated, generate
from .remaking import again

__all__ = ["Generated", "again", "generate"]
