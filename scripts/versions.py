"""Run the core of the tests in the lowest and the newest versions that pyproject.toml allows, for docs/versions.md.

    python scripts/versions.py [--work FOLDER] [--sets lowest newest] [--tests test_merge.py ...]

Needs `uv`, and the Pythons named in SETS; torch comes from the index with its CUDA libraries, several GB a set.
Results are kept in benchmarks/results/versions.json, test file by test file, so that a part can be run again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/versions.json", ROOT / "docs/versions.md"
SETS = {
    "lowest": ("3.11", "lowest-direct"),
    "newest": ("3.13", "highest"),
    "newest, Python 3.12": ("3.12", "highest"),
}
"""By name: Python, and how uv chooses versions."""
SHOWN = (
    "torch",
    "diffusers",
    "peft",
    "transformers",
    "huggingface-hub",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
)
TESTS = (
    "test_pocket.py",
    "test_lora_files.py",
    "test_merge.py",
    "test_acceleration.py",
    "test_styles.py",
    "test_generating.py",
    "test_quiet.py",
)
HEAD = """# Versions

The whole suite runs at every change in the versions of [constraints.txt]({constraints}), on Python 3.11.
`scripts/versions.py` runs the core of it in the lowest and in the newest versions that `pyproject.toml` allows.
A cell says the version and the day of its release.

"""


def install(work: Path, name: str) -> dict[str, list[str]]:
    """Make the environment of a set, where there is none; its versions with their days."""
    python, resolution = SETS[name]
    folder = work / name.replace(", ", "-").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "pylock.toml"
    if not (folder / "venv/bin/pytest").exists():
        asked = ["--all-extras", "--group", "test", "--resolution", resolution, "--python-version", python]
        uv("pip", "compile", "pyproject.toml", *asked, "--format", "pylock.toml", "--output-file", lock)
        uv("venv", "--clear", "--python", python, folder / "venv")
        uv("pip", "sync", "--python", folder / "venv/bin/python", lock)
    packages = {package["name"]: package for package in tomllib.loads(lock.read_text())["packages"]}
    return {one: [packages[one]["version"], day_of(packages[one])] for one in SHOWN}


def day_of(package: dict[str, Any]) -> str:
    """When the first of a release's files was uploaded."""
    return min(str(wheel["upload-time"])[:10] for wheel in package["wheels"])


def uv(*arguments: str | Path) -> None:
    subprocess.run(["uv", "--quiet", *arguments], cwd=ROOT, check=True)


def run(folder: Path, test: str) -> str:
    """Run a test file; how many passed, and which did not."""
    report = folder / "report.xml"
    own = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [folder / "venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    subprocess.run([*command, f"tests/{test}"], cwd=ROOT, env=own, check=False)
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [
        str(case.get("name")) for case in cases if any(case.find(kind) is not None for kind in ("failure", "error"))
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    words = f"{len(cases) - len(bad) - skipped} passed"
    return words + (f", {skipped} skipped" if skipped else "") + (f", failed: {', '.join(bad)}" if bad else "")


def page(results: dict[str, Any]) -> str:
    names = [name for name in SETS if name in results]
    lines = [f"| | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    lines.append("| Python | " + " | ".join(results[name]["python"] for name in names) + " |")
    for one in SHOWN:
        cells = [" of ".join(results[name]["versions"][one]) for name in names]
        lines.append(f"| {one} | {' | '.join(cells)} |")
    for test in TESTS:
        cells = [results[name]["tests"].get(test, "not run") for name in names]
        lines.append(f"| `{test}` | {' | '.join(cells)} |")
    lines.append("| run on | " + " | ".join(results[name]["day"] for name in names) + " |")
    return (
        HEAD.format(constraints="https://github.com/lcmlora/lcmlora/blob/main/constraints.txt")
        + "\n".join(lines)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".versions", help="the folder for environments")
    parser.add_argument("--sets", nargs="*", default=SETS, choices=SETS)
    parser.add_argument("--tests", nargs="*", default=TESTS, choices=TESTS)
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in given.sets:
        versions = install(given.work, name)
        folder = given.work / name.replace(", ", "-").replace(" ", "-")
        shown = subprocess.run([folder / "venv/bin/python", "-V"], capture_output=True, text=True, check=True).stdout
        row = results.setdefault(name, {"tests": {}})
        if row.get("versions") not in (None, versions):
            row["tests"] = {}  # those were of other versions
        row.update(python=shown.split()[1], versions=versions)
        for test in given.tests:
            row["tests"][test] = run(folder, test)
            row["day"] = datetime.date.today().isoformat()
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
