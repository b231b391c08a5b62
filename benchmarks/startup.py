"""Seconds until `import lcmlora` and `lcmlora --help` are done, each in a fresh process.

python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shapes import interleaved, save, summary

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import lcmlora": [sys.executable, "-c", "import lcmlora"],
    "lcmlora --help": [str(Path(sys.executable).parent / "lcmlora"), "--help"],
}


def main() -> None:
    works = {
        name: lambda command=command: subprocess.run(command, check=True, capture_output=True)
        for name, command in COMMANDS.items()
    }
    times = interleaved(works, repeats=15)
    save("startup", {name: summary(t) for name, t in times.items()})


if __name__ == "__main__":
    main()
