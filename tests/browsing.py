"""The system's own chromium, for the tests of pages. No page may go wrong, or ask anything of anybody else."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visiting(
    browser: Any, address: str, own: tuple[str, ...], height: int, allowed: tuple[str, ...] = ()
) -> Iterator[Callable[..., Any]]:
    """What opens the page of an address, as often as is wished; troubles of all of them fail at the end.

    Args:
        browser: the fixture.
        address: of the page.
        own: what the addresses begin with that it may ask for.
        height: of its window.
        allowed: the kinds of messages that may stand on its console.
    """
    troubles: list[str] = []
    contexts = []

    def open_page(width: int = 1280, height: int = height, **more: object) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **more))
        page = contexts[-1].new_page()
        page.on("console", lambda message: message.type in allowed or troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: request.url.startswith(own) or troubles.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def look(page: Any, name: str, **more: object) -> None:
    """Keep a picture of the page where LOOK names a folder."""
    if folder := os.environ.get("LOOK"):
        page.screenshot(path=Path(folder) / f"{name}.png", **more)


def keep_looks(file: str) -> None:
    """Run the tests of a file, with pictures in the folder that the command line names."""
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    os.environ["LOOK"] = str(Path(sys.argv[1]).resolve())
    sys.exit(pytest.main([file, "-p", "no:cacheprovider"]))
