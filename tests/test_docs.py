"""The documents as a reader uses them: snippets run, links lead somewhere, names exist, the site builds.

Every ```python block of a page runs, from top to bottom in one namespace, in an empty folder. Exceptions are written
in the page: `<!-- not run: why -->` above a block has it compiled alone, `<!-- setup: code -->` runs unseen.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import linecache
import os
import pydoc
import re
import shlex
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import click
import pytest

import lcmlora
from lcmlora import base, recipe
from lcmlora.cli import main

ROOT = Path(__file__).parents[1]
REPOSITORY, RAW = "https://github.com/lcmlora/lcmlora", "https://raw.githubusercontent.com/lcmlora/lcmlora/main"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFERENCE = sorted((ROOT / "docs/reference").glob("*.md"))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# -- snippets ---------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A snippet, the line of the page where its code begins, why it is not run, and the page up to the next one."""

    code: str
    line: int
    not_run: str | None = None
    after: str = ""


_BLOCK = re.compile(
    r"^<!-- setup:(?P<setup>.*?)-->"
    r"|^(?: *<!-- not run:(?P<reason>.*?)-->\s*?\n)?"
    r"(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
_FENCE = re.compile(r"^ *```+(\S+)", re.MULTILINE)
LANGUAGES = {"python", "console", "sh", "text", "json", "jsonl", "csv", "toml", "yaml", "dockerfile"}


def blocks_of(text: str) -> list[Block]:
    """A page's snippets and hidden set-ups, in the order in which they stand there."""
    found = []
    matches = list(_BLOCK.finditer(text))
    for match, following in itertools.zip_longest(matches, matches[1:]):
        kind = "code" if match["code"] is not None else "setup"
        reason = match["reason"].strip() if match["reason"] else None
        after = text[match.end() : following.start() if following else None]
        found.append(Block(textwrap.dedent(match[kind]), text.count("\n", 0, match.start(kind)) + 1, reason, after))
    return found


def compiled(block: Block, page: Path):
    """With the page as its file: a traceback shows the page's line."""
    return compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)


def run(page: Path) -> None:
    """Run a page's blocks; an lcmlora warning that the page says nothing of is a failure."""
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        code = compiled(block, page)
        if block.not_run is not None:
            continue
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", lcmlora.LcmLoraWarning)
            exec(code, namespace)
        ours = [str(w.message) for w in told if issubclass(w.category, lcmlora.LcmLoraWarning)]
        said = "warn" in block.code or "LcmLoraWarning" in block.after
        assert said or not ours, (
            f"{name_of(page)}, line {block.line}: the block warns, and neither it nor its output says so: {ours}"
        )


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """An empty working folder; afterwards no trace of what a page did to this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_registered", dict(base._registered))
    monkeypatch.setattr(recipe, "_registered", dict(recipe._registered))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    environment, modules = dict(os.environ), set(sys.modules)
    yield tmp_path
    os.environ.clear()
    os.environ.update(environment)
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    linecache.clearcache()


SNIPPETS = [page for page in PAGES if blocks_of(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", SNIPPETS, ids=name_of)
def test_the_snippets_of_a_page_run_in_an_empty_folder(page, empty_folder):
    run(page)


GUIDES = """accelerating among-other-code benchmark distillation generate guidance in-your-library offline pipelines
recipes servers several-processes sharing sheets styles troubleshooting"""


@pytest.mark.parametrize("name", GUIDES.split())
def test_a_guide_begins_with_something_to_run(name):
    first = next(iter(blocks_of((ROOT / f"docs/{name}.md").read_text(encoding="utf-8"))))
    assert first.not_run is None
    assert "lcmlora.load_pocket()" in first.code


@every_page
def test_every_block_has_a_known_language_and_a_reason_if_it_is_not_run(page):
    text = page.read_text(encoding="utf-8")
    found = blocks_of(text)
    assert set(_FENCE.findall(text)) <= LANGUAGES
    assert len(re.findall(r"^ *(?:```python|<!-- *setup)", text, re.MULTILINE)) == len(found)
    marks = re.findall(r"^ *<!-- *not.?run", text, re.MULTILINE)
    assert len(marks) == sum(block.not_run is not None for block in found)
    assert all(block.not_run != "" for block in found)
    for block in found:
        compiled(block, page)


def test_the_runner_runs_what_it_should_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- setup:\nseen = [1]\n-->\n\n!!! note\n\n    ```python\n    seen.append(2)\n    ```\n\n"
        "<!-- not run: it would fail -->\n```python\nseen.append(1 / 0)\n```\n\n"
        "```python\nseen.append(3)\nassert seen == [1, 2, 3]\n```\n"
    )
    assert [block.not_run for block in blocks_of(page.read_text())] == [None, None, "it would fail", None]
    run(page)
    page.write_text("one\n\n```python\nx = 1\nx.y\n```\n")
    with pytest.raises(AttributeError) as failed:
        run(page)
    assert (failed.traceback[-1].path, failed.traceback[-1].lineno + 1) == (page, 5)
    hidden = "<!-- setup:\nimport warnings, lcmlora\ndef f(): warnings.warn('x', lcmlora.LcmLoraWarning)\n-->\n"
    page.write_text(hidden + "```python\nf()  # warns\n```\n")
    run(page)
    page.write_text(hidden + "```python\nf()\n```\n")
    with pytest.raises(AssertionError, match="neither it nor its output says so"):
        run(page)
    page.write_text(hidden + "```python\nf()\n```\n\n```text\nLcmLoraWarning: x\n```\n")
    run(page)


# -- the shell --------------------------------------------------------------------------------------------------------


def commands_of(text: str) -> list[list[str]]:
    """The lcmlora commands in a page's console blocks, as words."""
    lines = []
    for block in re.findall(r"^ *```(?:console|sh)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        joined = block.replace("\\\n", " ")
        shown = re.findall(r"^ *\$ (.*)$", joined, re.MULTILINE) or joined.splitlines()
        shown = [re.split(r" [|>&;]", line)[0] for line in shown if "_LCMLORA_COMPLETE" not in line]
        lines += [shlex.split(line, comments=True) for line in shown if "lcmlora" in line]
    return [words[words.index("lcmlora") + 1 :] for words in lines if "lcmlora" in words and "pip" not in words]


@every_page
def test_commands_have_options_that_exist(page):
    for words in commands_of(page.read_text(encoding="utf-8")):
        if not words or words[0] in ("COMMAND", "--help", "-h", "--version"):
            continue
        command = main.commands.get(words[0])
        assert command is not None, f"lcmlora has no command {words[0]}"
        command.make_parser(click.Context(command, info_name=words[0])).parse_args(words[1:])


# -- links ------------------------------------------------------------------------------------------------------------

_LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)(?: \"[^\"]*\")?\)")


def without_code(text: str) -> str:
    """A page without its blocks, code and comments."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`(?!\])", "", text)


def anchors_of(page: Path) -> set[str]:
    """A page's headings as a code host, and the site, spell them in links."""
    headings = re.findall(
        r"^#+ (.+?) *$", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S), re.M
    )
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def leads_to(page: Path, target: str) -> str | None:
    """Why a link leads nowhere; None where it does not."""
    folder, ours = page.parent, re.match(f"{REPOSITORY}/(?:blob|tree)/main/|{RAW}/", target)
    if ours:
        folder, target = ROOT, target[ours.end() :]
    elif re.match(r"[a-z]+:", target):
        return None
    place, _, anchor = target.partition("#")
    file = (folder / place).resolve() if place else page
    if not file.exists():
        return f"{target}: there is no such file"
    if anchor and file.suffix == ".md" and anchor not in anchors_of(file):
        return f"{target}: {file.name} has no such heading"
    return None


@every_page
def test_every_link_leads_somewhere(page):
    links = _LINK.findall(without_code(page.read_text(encoding="utf-8")))
    assert [why for link in links if (why := leads_to(page, link))] == []


def test_the_readme_has_no_relative_link():
    """The package index shows it too, where there is nothing beside it."""
    links = _LINK.findall(without_code((ROOT / "README.md").read_text(encoding="utf-8")))
    assert len(links) > 5
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_a_wrong_option_and_a_wrong_link_are_found(tmp_path):
    (words,) = commands_of("```console\n$ lcmlora generate x \\\n    --no-such 3 | head\n```\n")
    with pytest.raises(click.NoSuchOption, match="--no-such"):
        main.commands["generate"].make_parser(click.Context(main.commands["generate"])).parse_args(words[1:])
    page = ROOT / "docs/index.md"
    assert leads_to(page, "quickstart.md#install") is None
    assert leads_to(page, "https://example.org/anything") is None
    for wrong in ("no-page.md", "quickstart.md#no-heading", f"{REPOSITORY}/blob/main/no-file", f"{RAW}/no.png"):
        assert leads_to(page, wrong) is not None


@every_page
def test_every_picture_has_words_in_its_place(page):
    assert "![](" not in page.read_text(encoding="utf-8")


# -- names ------------------------------------------------------------------------------------------------------------


@every_page
def test_documents_name_what_there_is(page):
    found = set(re.findall(r"(?<![\w/])lcmlora\.(\w+)\(", page.read_text(encoding="utf-8")))
    assert found <= set(lcmlora.__all__)


def test_every_pitfall_has_a_row_and_every_row_a_test_that_exists():
    """docs/pitfalls.md: numbered rows, each with a test's name, or with the words "out of reach" and why."""
    text = (ROOT / "docs/pitfalls.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 70
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    for number, row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named or "out of reach" in row, f"row {number} names no test"
        assert set(named) <= defined, f"row {number}: {set(named) - defined}"


# -- the reference ----------------------------------------------------------------------------------------------------

DOCUMENTED = [name for page in REFERENCE for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)]


def thing_of(dotted: str) -> object:
    """What a dotted name of the package stands for."""
    front, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(front), name)


def test_every_public_name_is_in_the_reference_once():
    assert sorted(DOCUMENTED) == sorted(set(DOCUMENTED))
    assert {f"lcmlora.{name}" for name in lcmlora.__all__} <= set(DOCUMENTED)
    assert all(thing_of(name) is not None for name in DOCUMENTED)


def has_a_help_page(dotted: str) -> bool:
    thing = thing_of(dotted)
    return inspect.isfunction(thing) or (isinstance(thing, type) and not issubclass(thing, tuple | dict))


@pytest.mark.parametrize("dotted", filter(has_a_help_page, DOCUMENTED))
def test_help_names_nothing_private(dotted):
    """Only what a reader can look up: public names of the package, and none that begins with an underscore."""
    thing = thing_of(dotted)
    shown = re.sub(r"_DataclassParams\(.*", "", pydoc.render_doc(thing, renderer=pydoc.plaintext))
    assert re.findall(r"(?<![\w.\"'])_[a-zA-Z]\w*", shown) == []
    own = [thing, *(member for name, member in inspect.getmembers(thing) if not name.startswith("_"))]
    texts = [inspect.getdoc(one) or "" for one in own if isinstance(thing, type) or one is thing]
    cited = {name.rstrip(".") for text in texts for name in re.findall(r"\blcmlora(?:\.\w+)+", text)}
    modules = {name.rpartition(".")[0] for name in DOCUMENTED}
    files = {"lcmlora.json"}
    assert cited <= {*DOCUMENTED, *modules, *files}


# -- the site ---------------------------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in REFERENCE:
        built = tmp_path / "site/reference" / ("" if page.stem == "index" else page.stem) / "index.html"
        shown = re.sub(r"<[^>]+>", "", built.read_text("utf-8").partition("<article")[2].partition("</article")[0])
        assert re.findall(r"(?<![\w./\"'-])_[a-zA-Z]\w*", shown) == [], page.name
    assert "enforce_inference_steps" in (tmp_path / "site/reference/accelerate/index.html").read_text("utf-8")
