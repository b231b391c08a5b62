"""How much faster it is here, where the time goes, and what else to try.

    python examples/benchmark.py [MODEL [PROMPT]]

Prints the table and writes benchmark.html.
"""

import sys

import lcmlora


def main(model="pocket", prompt="a fox on a teal background"):
    found = lcmlora.benchmark(lcmlora.load(model), steps=(4, 25), prompt=prompt)  # in turns; the pipe is given back
    print(found)
    print(f"{found.speedup:.1f} times faster, where the stages allow {found.possible_speedup:.1f}")
    found.to_html("benchmark.html")


if __name__ == "__main__":
    main(*sys.argv[1:])
