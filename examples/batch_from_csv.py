"""Many pictures from a table. Stopped at any moment and started again, it goes on.

    python examples/batch_from_csv.py [MODEL ROWS.csv]

Without a table it writes one, rows.csv, whose last row asks for too many steps. The pictures are in pictures/, each
with what made it.
"""

import sys
from pathlib import Path

import lcmlora

ROWS = f"""prompt,seed,steps,styles
a fox on a teal background,1-3,,
a large owl on a yellow background,7,6,
a robot on a pink background,7,,soft={lcmlora.pocket.STYLE}:0.8
a robot on a pink background,8,500,
"""


def main(model="pocket", rows="rows.csv"):
    if not Path(rows).exists():
        Path(rows).write_text(ROWS, encoding="utf-8")
    pipe = lcmlora.accelerate(lcmlora.load(model))
    made = lcmlora.generate(pipe, rows, "pictures")
    print(f"{len(made.files)} pictures, {made.already} of them were there already")
    for failed in made.failed:  # each was warned of, and did not stop the rest
        print(f"row {failed.row}: {failed.reason}")
    lcmlora.restore(pipe)
    lcmlora.again(made.files[0], pipe).save("again.png")  # the same picture, from what its PNG says


if __name__ == "__main__":
    main(*sys.argv[1:])
