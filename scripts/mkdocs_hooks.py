"""What the site has and a code host's view of the same Markdown has not: see `hooks` in mkdocs.yml.

- CONTRIBUTING.md and CHANGELOG.md, which lie where a code host looks for them, are pages.
- Links out of docs/ lead to the repository.
- Formulas ($x$) are MathML, which browsers draw without a script.
- `DistillConfig`'s docstring is made of its fields' help when it is imported, so the reference imports it.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from lcmlora.distillation.config import DistillConfig

ROOT = Path(__file__).parents[1]
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    for page, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    depth = page.file.src_uri.count("/") + 1
    return re.sub(rf"\]\((?:\.\./){{{depth}}}(?!\.)", f"]({config.extra['repository']}/blob/main/", markdown)


def on_page_content(content: str, **_: Any) -> str:
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', _inline, content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', _block, content, flags=re.DOTALL)


def _inline(found: re.Match[str]) -> str:
    return convert(html.unescape(found[1]))


def _block(found: re.Match[str]) -> str:
    return f'<div class="formula">{convert(html.unescape(found[1]), display="block")}</div>'


class Settings(griffe.Extension):
    """The reference's `DistillConfig` as `help` shows it."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        found = pkg["distillation.config.DistillConfig"]
        found.docstring.value = inspect.getdoc(DistillConfig)
        for field in dataclasses.fields(DistillConfig):
            found.members[field.name].value = repr(field.default)
