"""Does `generate` keep its word? 200 rows of the embedded model by one process, by two, and with kill -9 in between.

python benchmarks/batch_acceptance.py [--rows 200] [--kills 3] [--json FILE]

The same rows are drawn in the shell by one process, by two (torchrun), and by one that is killed at random moments
and started again. All three folders have to hold the same pictures, each once, none missing, none half-written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

import lcmlora
from lcmlora import pocket

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(lcmlora.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",  # of each process: both have the same, so that their sums are added in the same order
    "HF_HUB_OFFLINE": "1",
}
STYLE = f"3d={pocket.STYLE / 'pytorch_lora_weights.safetensors'}"
ONE = [sys.executable, "-m", "lcmlora"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lcmlora"]


def write_rows(path: Path, count: int) -> None:
    """Rows of every kind: three sets of styles, steps of 1 to 4, guidance of 1 to 2, mixed."""
    words = pocket.words()
    chosen = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {
                "prompt": f"a {chosen.choice(words['things'])} on a {chosen.choice(words['backgrounds'])} background",
                "seed": number,
                "steps": chosen.randint(1, 4),
                "guidance": chosen.choice([1, 1, 1.5]),
                "styles": chosen.choice([{}, {"3d": 0.5}, {"3d": 1.0}]),
                "name": f"{number % 4}/{number:04d}",
            }
            file.write(json.dumps(row) + "\n")


def command(rows: Path, out: Path) -> list[str]:
    return ["generate", "--rows", str(rows), "-m", "pocket", "--style", STYLE, "--out", str(out), "--quiet"]


def draw(launcher: list[str], rows: Path, out: Path) -> float:
    began = time.perf_counter()
    subprocess.run([*launcher, *command(rows, out)], env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def draw_and_kill(rows: Path, out: Path, kills: int, count: int) -> list[int]:
    """Start it, kill it at a random moment, and again; how many pictures were there at each kill."""
    chosen, there = random.Random(os.urandom(8)), []
    for kill in range(kills):
        until = chosen.uniform(kill + 0.2, kill + 0.8) * count / kills
        running = subprocess.Popen([*ONE, *command(rows, out)], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        while len(list(out.rglob("*.png"))) < until and running.poll() is None:
            time.sleep(0.005)
        time.sleep(chosen.uniform(0, 0.1))  # anywhere between two pictures, or within one
        running.kill()
        running.wait()
        there.append(len(list(out.rglob("*.png"))))
    return there


def pixels(folder: Path) -> dict[str, str]:
    """Each picture's digest, decoded to its last pixel."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with Image.open(file) as image:
            image.load()
            found[file.relative_to(folder).as_posix()] = hashlib.sha256(image.tobytes()).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, rows = Path(place), Path(place) / "rows.jsonl"
        write_rows(rows, asked.rows)
        seconds = {"one process": draw(ONE, rows, folder / "one"), "two processes": draw(TWO, rows, folder / "two")}
        killed = draw_and_kill(rows, folder / "killed", asked.kills, asked.rows)
        seconds["the rest, after the kills"] = draw(ONE, rows, folder / "killed")
        one, two, resumed = (pixels(folder / name) for name in ("one", "two", "killed"))
    wanted = {f"{number % 4}/{number:04d}.png" for number in range(asked.rows)}
    result = {
        "rows": asked.rows,
        "pictures, each once, none else": {"one": one.keys() == wanted, "killed": resumed.keys() == wanted},
        "two processes: pictures that differ from one's": sum(one[name] != two.get(name) for name in one),
        "killed at (pictures there)": killed,
        "killed: pictures that differ from one's": sum(one[name] != resumed.get(name) for name in one),
        "seconds, loading included": {name: round(value, 1) for name, value in seconds.items()},
    }
    print(json.dumps(result, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    assert wanted == one.keys() == two.keys() == resumed.keys()
    assert one == two == resumed


if __name__ == "__main__":
    main()
