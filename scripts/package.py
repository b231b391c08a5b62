"""Build the sdist and the wheel, look at them, and use each from an empty environment as its first user would.

    python scripts/package.py [--out dist]

Needs the group `release` of pyproject.toml, and an index to install from. Downloads no model.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIP = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet")
CPU_TORCH = "https://download.pytorch.org/whl/cpu"
JUNK = re.compile(r"(^|/)(\.(?!gitignore$)|__pycache__|dist/|build/|site/|demo/|pocket-work/)|\.(pyc|pt|ckpt)$")
PROGRAM = """
import importlib, pkgutil, sys, lcmlora
assert "site-packages" in lcmlora.__file__, lcmlora.__file__
for name in lcmlora.__all__:
    getattr(lcmlora, name)
for module in pkgutil.walk_packages(lcmlora.__path__, "lcmlora."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # the page of `lcmlora live` stands on its extra
            assert (module.name, error.name) == ("lcmlora.live.web", "gradio"), error
"""
"""Every name and every module, with what was installed and no more."""


class Refused(SystemExit):
    """Something is wrong with the package."""

    def __init__(self, what: str) -> None:
        super().__init__(f"package: {what}")


def build(out: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is made of it."""
    shutil.rmtree(out, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def look_at(sdist: Path, wheel: Path) -> None:
    """Refuse junk, what is missing, and a description that does not stand alone."""
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = set(opened.namelist())
        (place,) = (name for name in in_wheel if name.endswith(".dist-info/METADATA"))
        about = email.message_from_bytes(opened.read(place))
    if junk := sorted(name for name in in_sdist | in_wheel if JUNK.search(name)):
        raise Refused(f"there is junk in it: {', '.join(junk[:5])}")
    text = str(about.get_payload())
    if relative := re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
        raise Refused(f"the README links to {relative[0]}, which is a file beside it: an index shows the text alone")
    pictures = {f"docs/images/{name}" for name in re.findall(r"docs/images/([\w.-]+)", text)}
    asked = {
        "LICENSE",
        "CHANGELOG.md",
        "docs/pitfalls.md",
        "tests/test_package.py",
        "examples/pocket/make.sh",
        *pictures,
    }
    for name in sorted(asked - in_sdist):
        raise Refused(f"the sdist has no {name}")
    licences = {name.rpartition("/")[2] for name in about.get_all("License-File", [])}
    if missing := {"LICENSE", "NOTO-EMOJI-APACHE-2.0.txt", "FLUENT-EMOJI-MIT.txt"} - licences:
        raise Refused(f"the metadata names no {', '.join(sorted(missing))}")
    if "lcmlora/py.typed" not in in_wheel:
        raise Refused("the wheel has no py.typed: its types would not be read")


def try_out(archive: Path) -> None:
    """Install it in an empty environment; import all of it, ask the shell, draw the demo, with no word too many."""
    with tempfile.TemporaryDirectory() as place:
        run(sys.executable, "-m", "venv", Path(place, "venv"))
        python, shell = Path(place, "venv/bin/python"), Path(place, "venv/bin/lcmlora")
        if not shutil.which("nvidia-smi"):  # as the README says; alone, as no other comes from there
            try_first = ("--no-deps", "--retries", "0", "--timeout", "15", "--extra-index-url", CPU_TORCH)
            run(python, *PIP, "--constraint", ROOT / "constraints.txt", *try_first, "torch")
        run(python, *PIP, "--constraint", ROOT / "constraints.txt", archive)
        run(python, "-m", "pip", "check")
        for told in (say(place, python, "-W", "error", "-c", PROGRAM), say(place, shell, "--help")):
            if told:
                raise Refused(f"{archive.name} is not quiet: {told}")
        lines = say(place, shell, "demo", "--out", "sheets").splitlines()
        if odd := [line for line in lines if not re.match(r"lcmlora demo:|loading |  [\w-].* \.\.\.$", line)]:
            raise Refused(f"the demo of {archive.name} says more than it should: {odd}")
        if len(list(Path(place, "sheets").glob("*.png"))) < 5:
            raise Refused(f"the demo of {archive.name} left sheets out")


def say(place: str, *command: str | Path) -> str:
    """Run a command as a user would, anywhere; what it says beside its result."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=place, env=own, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"{Path(command[0]).name} {command[1]} failed: {done.stderr}")
    return done.stderr.strip()


def run(*command: str | Path) -> None:
    if code := subprocess.run(command).returncode:
        raise Refused(f"{' '.join(map(str, command[:4]))} ... ended with {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for both; what is in it goes")
    archives = build(parser.parse_args().out)
    look_at(*archives)
    for archive in archives:
        print(f"{archive.name}: install, import, demo", flush=True)
        try_out(archive)
    print(f"{' and '.join(archive.name for archive in archives)} are good", flush=True)


if __name__ == "__main__":
    main()
