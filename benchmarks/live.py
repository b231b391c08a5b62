"""How live `lcmlora live` is, measured in headless Chromium: milliseconds from a key to its picture on the screen, and
pictures a second while somebody goes on typing. `--screenshot FILE` draws the page for the documents instead.

    python benchmarks/live.py --out benchmarks/results/live.json
    python benchmarks/live.py --screenshot docs/images/live.png
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import gradio
import torch
from playwright.sync_api import sync_playwright

import lcmlora
from lcmlora import live, pocket

SCREENSHOT_PROMPT = "a large fox on a teal background"
WATCH = """() => {
  const frame = document.querySelector("#live-fast"), text = document.querySelector("#live-prompt textarea");
  window.shown = [];
  window.typed = {};
  text.addEventListener("input", () => { window.typed[text.value.trim()] ??= performance.now(); }, true);
  let last = frame.querySelector("figure").dataset.once;
  new MutationObserver(() => {
    const figure = frame.querySelector("figure"), picture = frame.querySelector("img");
    if (!figure || figure.dataset.once === last || !picture) return;
    last = figure.dataset.once;
    const seconds = +figure.dataset.seconds, prompt = picture.alt;
    requestAnimationFrame(() => window.shown.push({prompt, seconds, at: performance.now()}));
  }).observe(frame, {childList: true, subtree: true});
}"""


@contextmanager
def page_of(base: bool, width: int = 1280, height: int = 960) -> Iterator[Any]:
    """The page of the embedded model, settled, in a browser."""
    pipe = lcmlora.load_pocket()
    pipe.set_progress_bar_config(disable=True)
    with (
        live.Room(pipe, base=base, base_guidance=pocket.GUIDANCE, styles={"3d": pocket.STYLE}) as room,
        live.serve(room, SCREENSHOT_PROMPT, port=0) as address,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=1)
        page.goto(address)
        settle(page)
        yield page
        browser.close()


def settle(page: Any) -> None:
    page.wait_for_function("document.querySelector('#live-fast img')", timeout=300_000)
    page.wait_for_function("!document.querySelector('#live figure.busy')", timeout=300_000)


def one_key_after_the_other(page: Any, keys: int) -> dict[str, Any]:
    """Each key when the picture before is there and the base's has begun: how long until its own is shown."""
    times, draws = [], []
    for number in range(keys):
        page.keyboard.type("abcdefgh"[number % 8])
        page.wait_for_function("shown.some(one => one.prompt in typed && one.prompt === Object.keys(typed).at(-1))")
        found = page.evaluate("[shown.at(-1), typed[shown.at(-1).prompt]]")
        times.append(found[0]["at"] - found[1])
        draws.append(found[0]["seconds"] * 1000)
        page.wait_for_timeout(400)  # the base is being drawn when the next key comes
    return {
        "keys": keys,
        "median_ms": round(statistics.median(times), 1),
        "slowest_ms": round(max(times), 1),
        "median_ms_of_the_call": round(statistics.median(draws), 1),
    }


def typing_on(page: Any, seconds: float, every_ms: int = 60) -> dict[str, Any]:
    """Keys without a pause: how many pictures a second are shown."""
    page.evaluate("window.shown = []")
    for number in range(int(seconds * 1000 / every_ms)):
        page.keyboard.type("abcdefgh "[number % 9])
        if number % 20 == 19:
            page.locator("#live-prompt textarea").fill(SCREENSHOT_PROMPT)
            page.keyboard.press("End")
        page.wait_for_timeout(every_ms)
    shown = page.evaluate("shown")
    span = (shown[-1]["at"] - shown[0]["at"]) / 1000
    return {"seconds": round(span, 2), "pictures_per_second": round((len(shown) - 1) / span, 2)}


def measure(keys: int, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, base in (("with the base beside it", True), ("alone", False)):
        with page_of(base) as page:
            page.evaluate(WATCH)
            page.locator("#live-prompt textarea").focus()
            page.keyboard.press("End")
            found[name] = {"key": one_key_after_the_other(page, keys), "typing": typing_on(page, seconds)}
    versions = {"lcmlora": lcmlora, "torch": torch, "diffusers": diffusers, "gradio": gradio}
    return {
        **found,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads of torch",
        "load": os.getloadavg()[0],
        "versions": {name: str(module.__version__) for name, module in versions.items()},
    }


def screenshot(file: Path) -> None:
    with page_of(True, 1100, 800) as page:
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=file, full_page=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--screenshot", type=Path, help="a PNG file; nothing is measured then")
    parser.add_argument("--keys", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    if given.screenshot:
        screenshot(given.screenshot)
        return
    found = measure(given.keys, given.seconds)
    print(json.dumps(found, indent=1))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
