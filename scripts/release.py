"""Make a release: set the version, date the CHANGELOG, build and check the package, commit, tag. Uploads nothing.

    make release VERSION=0.2.0

Whatever can be refused is refused before anything is touched; where the check fails, the files are as they were.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import subprocess
import sys
from pathlib import Path

VERSION_FILE, CHANGELOG = Path("src/lcmlora/__init__.py"), Path("CHANGELOG.md")
VERSION_LINE = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
UNRELEASED = re.compile(r"^## \[Unreleased\]\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


class Refused(SystemExit):
    """There is no release."""

    def __init__(self, what: str) -> None:
        super().__init__(f"release: {what}")


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"git {arguments[0]} says: {done.stderr.strip()}")
    return done.stdout.strip()


def numbers(version: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise Refused(f"{version!r} is no version: x.y.z is expected, such as 0.2.0")
    return tuple(map(int, version.split(".")))


def plan(version: str) -> dict[Path, str]:
    """What will stand in the files of the release, or a refusal."""
    wanted = numbers(version)
    if dirty := git("status", "--porcelain"):
        raise Refused(f"the tree has changes that are not committed: {dirty.splitlines()[0].strip()}")
    if git("tag", "--list", f"v{version}"):
        raise Refused(f"there is a tag v{version} already")
    code, changes = VERSION_FILE.read_text(encoding="utf-8"), CHANGELOG.read_text(encoding="utf-8")
    (found,) = VERSION_LINE.findall(code)
    if wanted < numbers(found) or (wanted == numbers(found) and git("tag", "--list", f"v{found}")):
        raise Refused(f"{version} does not come after {found}")
    if f"\n## [{version}]" in changes:
        raise Refused(f"{CHANGELOG} has a section for {version} already")
    section = UNRELEASED.search(changes)
    if section is None or not re.search(r"^- ", section[1], re.MULTILINE):
        raise Refused(f"{CHANGELOG} has no section [Unreleased] with a line in it: what is new in {version}?")
    dated = f"## [Unreleased]\n\n## [{version}] - {datetime.date.today().isoformat()}\n{section[1]}"
    return {
        VERSION_FILE: VERSION_LINE.sub(f'__version__ = "{version}"', code),
        CHANGELOG: changes[: section.start()] + dated + changes[section.end() :],
    }


def release(version: str, check: list[str]) -> None:
    new = plan(version)
    before = {file: file.read_bytes() for file in new}
    try:
        for file, text in new.items():
            file.write_text(text, encoding="utf-8")
        if code := subprocess.run(check).returncode:
            raise Refused(f"{shlex.join(check)} ended with {code}; nothing was committed")
        git("commit", "--quiet", "--message", f"Release {version}", "--", *map(str, new))
    except BaseException:
        for file, was in before.items():
            file.write_bytes(was)
        raise
    git("tag", "--annotate", f"v{version}", "--message", f"lcmlora {version}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version")
    check = shlex.join([sys.executable, "scripts/package.py"])
    parser.add_argument("--check", default=check, help="a command that must succeed")
    given = parser.parse_args()
    release(given.version, shlex.split(given.check))
    print(f"lcmlora {given.version} is committed, tagged and built. To publish it:")
    print(f"  git push --atomic origin HEAD v{given.version}")
    print(f"  {shlex.quote(sys.executable)} -m twine upload dist/lcmlora-{given.version}*")


if __name__ == "__main__":
    main()
