"""Self-contained HTML pages, made from the templates beside this file: everything that is put in is escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """A template of `templates/` with these values."""
    return _environment.get_template(template).render(**values)


_environment = Environment(
    loader=PackageLoader("lcmlora"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
