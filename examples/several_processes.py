"""Rows drawn by several processes, one for each GPU; each picture is the one that a single process would draw.

    accelerate launch --num_processes 2 examples/several_processes.py [MODEL ROWS]

On a processor: torchrun --standalone --nproc-per-node 2 ... The pictures are in pictures/.
"""

import os
import sys

import lcmlora

ROWS = [{"prompt": f"a {thing} on a teal background", "seed": "1-2"} for thing in ("fox", "owl", "robot", "cactus")]


def main(model="pocket", rows=None):
    pipe = lcmlora.accelerate(lcmlora.load(model))  # each process loads onto its own GPU,
    made = lcmlora.generate(pipe, rows or ROWS, "pictures")  # draws its part, and knows what all have drawn
    if os.environ.get("RANK", "0") == "0":
        print(f"{len(made.files)} pictures by {os.environ.get('WORLD_SIZE', 1)} processes")


if __name__ == "__main__":
    main(*sys.argv[1:])
