"""The report page as a person uses it, in the system's own chromium. `python tests/test_browser.py FOLDER` writes
pictures of it to look at. Skipped where playwright (`pip install --group browser`) or chromium is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lcmlora
from browsing import CHROMIUM, keep_looks, look, visiting
from browsing import browser as browser
from lcmlora import demo
from lcmlora.sheets import Sheet, metrics

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
expect = sync_api.expect
NASTY = "a fox </script><script>document.title = 'pwned'</script> & \"狐\""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The page of a sheet of the embedded model, stopped before its last picture."""
    pipe = lcmlora.load_pocket()
    pipe.set_progress_bar_config(disable=True)
    with lcmlora.accelerated(pipe):
        sheet = lcmlora.sweep_steps(pipe, [*demo.PROMPTS[:2], NASTY], (1, 2, 4, 8), title="LCM-LoRA over steps")
    cells = (*sheet.cells[:2], (*sheet.cells[2][:3], None))
    sheet = metrics.measured(Sheet(cells, sheet.columns, sheet.lines, sheet.title))
    return sheet.to_html(tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def visit(browser, report) -> Iterator[Callable[..., sync_api.Page]]:
    """Open the page. Nothing may be said on its console, and nothing asked for outside."""
    with visiting(browser, report.as_uri(), ("file:", "data:"), 900) as open_page:
        yield open_page


def pictures(page: sync_api.Page) -> sync_api.Locator:
    return page.locator("button.picture:visible")


def test_it_shows_all_pictures_and_what_was_not_drawn(visit):
    page = visit()
    expect(pictures(page)).to_have_count(11)
    expect(page.get_by_text("not drawn")).to_have_count(1)
    expect(page.get_by_text("3 lines x 4 columns, 11 of 12 pictures")).to_be_visible()
    expect(page.get_by_alt_text(f"4 steps: {demo.PROMPTS[1]}")).to_be_visible()
    assert page.evaluate("[...document.images].filter(i => i.src && !i.naturalWidth).length") == 0
    look(page, "desktop", full_page=True)


def test_a_prompt_with_markup_is_text(visit):
    page = visit()
    expect(page.get_by_role("heading", name=NASTY)).to_be_visible()
    expect(page).to_have_title("LCM-LoRA over steps")


def test_the_slider_shows_one_column_at_a_time(visit):
    page = visit()
    slider = page.get_by_label("Column")
    slider.fill("3")
    expect(pictures(page)).to_have_count(3)
    expect(page.locator("figcaption b:visible")).to_have_text(["4 steps"] * 3)
    expect(page.locator("#controls output")).to_have_text("4 steps (3 of 4)")
    look(page, "desktop-one-column")
    slider.press("ArrowRight")
    expect(pictures(page)).to_have_count(2)
    expect(page.get_by_text("not drawn")).to_be_visible()
    slider.press("Home")
    expect(pictures(page)).to_have_count(11)
    page.locator("body").press("ArrowRight")  # the arrows need no focus on it
    expect(page.locator("figcaption b:visible")).to_have_text(["1 step"] * 3)


def test_a_click_on_a_heading_sorts(visit):
    page = visit()
    numbers = page.locator("table.sortable tbody tr td:first-child")
    heading = page.get_by_role("button", name="seconds", exact=True)
    place = page.locator("table.sortable thead th").all_inner_texts().index("seconds") + 1
    column = page.locator(f"table.sortable tbody tr td:nth-child({place})")
    expect(numbers).to_have_text([str(number) for number in range(1, 12)])
    for order, backwards in (("ascending", False), ("descending", True)):
        heading.click()
        expect(page.locator(f"th[aria-sort={order}]")).to_have_text("seconds")
        values = [float(one) for one in column.evaluate_all("cells => cells.map(cell => cell.dataset.v)")]
        assert values == sorted(values, reverse=backwards)
    last = page.locator("table.sortable tbody tr td:last-child")
    page.get_by_role("button", name="prompt").press("Enter")
    expect(last).to_have_text([NASTY] * 3 + [demo.PROMPTS[0]] * 4 + [demo.PROMPTS[1]] * 4)
    look(page, "desktop-sorted", full_page=True)


def wipe(page: sync_api.Page) -> float:
    """Which part of the width the left picture has, by where the handle is seen."""
    handle, pair = page.locator("#grip").bounding_box(), page.locator("#pair").bounding_box()
    return (handle["x"] + handle["width"] / 2 - pair["x"]) / pair["width"]


def test_two_clicks_compare_by_a_wipe(visit):
    page = visit()
    pictures(page).nth(0).click()
    expect(page.locator("#chosen")).to_contain_text("Picture 1 is chosen")
    look(page, "desktop-chosen")
    pictures(page).nth(3).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    expect(dialog.get_by_role("row", name="column")).to_have_text("column1 step8 steps")
    assert wipe(page) == pytest.approx(0.5, abs=0.01)
    look(page, "desktop-wipe")
    slider = page.get_by_label("Wipe")
    expect(slider).to_be_focused()
    slider.press("Home")
    assert wipe(page) == pytest.approx(0, abs=0.01)
    slider.press("End")
    assert wipe(page) == pytest.approx(1, abs=0.01)
    box = page.locator("#pair").bounding_box()
    page.locator("#pair").click(position={"x": box["width"] / 4, "y": 40})
    assert wipe(page) == pytest.approx(0.25, abs=0.01)
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 80, steps=4)
    page.mouse.up()
    assert wipe(page) == pytest.approx(0.7, abs=0.01)
    page.get_by_role("button", name="Zoom in").click()
    slider.press("+")
    expect(page.locator("#zoom")).to_have_text("4\u00d7")
    assert page.locator("#pair").bounding_box()["width"] == pytest.approx(4 * box["width"], rel=0.02)
    look(page, "desktop-zoom")
    before = page.locator("#under").get_attribute("src")
    page.get_by_role("button", name="Swap").click()
    expect(page.locator("#over")).to_have_attribute("src", before)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("[aria-pressed=true]")).to_have_count(0)
    expect(pictures(page).nth(0)).to_be_focused()  # the second one, since they were swapped


def test_the_keyboard_alone_compares(visit):
    page = visit()
    pictures(page).nth(4).press("Enter")
    pictures(page).nth(4).press("Enter")
    expect(page.locator("#chosen")).to_be_empty()
    pictures(page).nth(5).press("Space")
    pictures(page).nth(6).press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_system_into_the_dark_and_back_by_a_button(visit, scheme):
    page = visit(color_scheme=scheme)
    dark, light = "rgb(20, 23, 26)", "rgb(255, 255, 255)"
    body = page.locator("body")
    expect(body).to_have_css("background-color", dark if scheme == "dark" else light)
    look(page, scheme, full_page=True)
    page.get_by_role("button", name="Light" if scheme == "dark" else "Dark").click()
    expect(body).to_have_css("background-color", light if scheme == "dark" else dark)


def test_it_is_readable_on_a_phone(visit):
    page = visit(390, 844, has_touch=True, is_mobile=True)
    expect(pictures(page)).to_have_count(3)  # one column at first
    assert pictures(page).first.bounding_box()["width"] > 300
    look(page, "phone", full_page=True)
    page.get_by_label("Column").fill("0")
    expect(pictures(page)).to_have_count(11)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert all(one.bounding_box()["x"] + one.bounding_box()["width"] <= 390 for one in pictures(page).all())
    pictures(page).nth(0).tap()
    look(page, "phone-all")
    pictures(page).nth(2).tap()
    expect(page.get_by_role("dialog")).to_be_visible()
    box = page.locator("#pair").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] * 0.8, box["y"] + 40)
    assert wipe(page) == pytest.approx(0.8, abs=0.01)
    close = page.get_by_role("button", name="Close").bounding_box()
    assert close["x"] + close["width"] <= 390
    look(page, "phone-wipe")


def test_many_columns_scroll_beside_their_prompt(visit):
    page = visit(720, 700)
    sheet, heading = page.locator("#sheet"), page.get_by_role("heading", name=demo.PROMPTS[0])
    sheet.evaluate("sheet => sheet.style.setProperty('--w', '224px')")
    sheet.evaluate("sheet => { sheet.scrollLeft = 200; }")
    assert sheet.evaluate("sheet => sheet.scrollLeft") == 200
    assert page.evaluate("document.documentElement.scrollWidth") == 720
    assert heading.bounding_box()["x"] >= 0
    look(page, "tablet")


def test_without_scripts_everything_is_there(visit):
    page = visit(java_script_enabled=False)
    expect(pictures(page)).to_have_count(11)
    expect(page.get_by_label("Column")).to_be_hidden()
    expect(page.locator("table.sortable tbody tr")).to_have_count(11)


if __name__ == "__main__":
    keep_looks(__file__)
