"""What is released: versions that agree, dependencies that are declared, and a release as one command."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import lcmlora

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CHANGES = """# Changelog

## [Unreleased]

### Added
- Something.

## [0.1.0] - 2026-11-24

### Added
- All.
"""


def test_the_version_is_the_newest_of_the_changelog():
    released = re.findall(r"^## \[(\d.*)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0][0] == lcmlora.__version__
    assert [day for _, day in released] == sorted((day for _, day in released), reverse=True)


# -- what is declared -------------------------------------------------------------------------------------------------


def named(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


OPTIONAL = {
    "bitsandbytes": "a GPU's 8-bit optimizer, named by the error where it is missing",
    "torchvision": "has to fit the torch that is there, as the error says",
    "fsspec": "comes with datasets, whose rows alone need it",
}
"""Imported where they are there, and in no extra."""


def test_every_import_of_the_package_is_declared_and_every_dependency_imported():
    imported = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    found = packages_distributions()
    needed = {
        named(found[name][0]) if name in found else name for name in imported - sys.stdlib_module_names - {"lcmlora"}
    }
    extras = PROJECT["project"]["optional-dependencies"].values()
    declared = {named(one) for group in (PROJECT["project"]["dependencies"], *extras) for one in group}
    assert needed - OPTIONAL.keys() == declared


RUN = json.loads((ROOT / "benchmarks/results/versions.json").read_text(encoding="utf-8"))


def test_what_is_claimed_was_run():
    """docs/versions.md: the lowest versions are those of pyproject.toml, each named Python was run, all passed."""
    least = dict(re.match(r"([\w.-]+)>=([\d.]+)", one).groups() for one in PROJECT["project"]["dependencies"])
    for name in least.keys() & RUN["lowest"]["versions"].keys():
        assert RUN["lowest"]["versions"][name][0].removesuffix(".0").startswith(least[name]), name
    pythons = {line.rpartition(" ")[2] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line}
    assert pythons == {found["python"].rpartition(".")[0] for found in RUN.values()}
    assert f">={min(pythons)}" == PROJECT["project"]["requires-python"]
    assert not [words for found in RUN.values() for words in found["tests"].values() if "failed" in words]


# -- a release --------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path):
    """A project with a version, changes and a history."""
    (tmp_path / "src/lcmlora").mkdir(parents=True)
    (tmp_path / "src/lcmlora/__init__.py").write_text('"""Doc."""\n\n__version__ = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGES)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "config", "user.name", "a test")
    git(tmp_path, "config", "user.email", "test@example.org")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "Begin")
    git(tmp_path, "tag", "v0.1.0")
    return tmp_path


def git(folder, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def release(folder, version: str, check: str = "true") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/release.py", version, "--check", check]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def state(folder) -> tuple[str, ...]:
    files = ("src/lcmlora/__init__.py", "CHANGELOG.md")
    return (git(folder, "log", "--oneline"), git(folder, "tag"), *((folder / file).read_text() for file in files))


def test_a_release_sets_dates_checks_commits_and_tags_and_uploads_nothing(repository):
    done = release(repository, "0.2.0", "grep -q '\"0.2.0\"' src/lcmlora/__init__.py")
    assert (done.returncode, done.stderr) == (0, "")
    assert "twine upload dist/lcmlora-0.2.0*" in done.stdout
    assert git(repository, "show", "v0.2.0:src/lcmlora/__init__.py").endswith('__version__ = "0.2.0"')
    changes = git(repository, "show", "v0.2.0:CHANGELOG.md")
    assert re.search(r"## \[Unreleased\]\n\n## \[0\.2\.0\] - \d{4}-\d\d-\d\d\n\n### Added\n- Something\.\n", changes)
    assert git(repository, "status", "--porcelain") == ""
    assert git(repository, "cat-file", "-t", "v0.2.0") == "tag"
    assert release(repository, "0.3.0").stderr.startswith("release: CHANGELOG.md has no section [Unreleased] with a")


REFUSALS = {
    "no version": ("2", lambda folder: None, "no version: x.y.z is expected"),
    "going back": ("0.0.9", lambda folder: None, "0.0.9 does not come after 0.1.0"),
    "a tag": ("0.2.0", lambda folder: git(folder, "tag", "v0.2.0"), "there is a tag v0.2.0 already"),
    "a dirty tree": ("0.2.0", lambda folder: (folder / "new.py").write_text(""), "not committed: ?? new.py"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_release_is_refused_before_anything_is_touched(what, repository):
    version, spoil, words = REFUSALS[what]
    spoil(repository)
    before = state(repository)
    done = release(repository, version)
    assert done.returncode == 1
    assert words in done.stderr
    assert state(repository) == before


def test_a_release_whose_package_fails_leaves_the_files_as_they_were(repository):
    before = state(repository)
    done = release(repository, "0.2.0", "false")
    assert done.returncode == 1
    assert "false ended with 1; nothing was committed" in done.stderr
    assert state(repository) == before
    assert git(repository, "status", "--porcelain") == ""
