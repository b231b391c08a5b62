"""The report page as it is written: escaped, alone, small. `test_browser.py` uses it as a person does."""

from __future__ import annotations

import base64
import html
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import lcmlora
from lcmlora.sheets import Cell, Line, Sheet, report

NASTY = "</script><script>alert(1)</script><!-- & \"quoted\" 'so' {{ 7 * 7 }} 狐"


def noise(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def a_sheet(lines=2, columns=3, text="a fox", label="", **row: object) -> Sheet:
    """As a sweep makes it, every row with what it has to tell."""

    def cell(line, column):
        told = {"prompt": f"{text} {line}", "column": f"{column} steps", "line": label, "seed": 1337}
        told |= {"num_inference_steps": column, "guidance_scale": 1.0, "height": 512, "width": 512}
        told |= {
            "accelerated": True,
            "recipe": "lcm",
            "weight": 1.0,
            "styles": {"ink": 0.5},
            "scheduler": "LCMScheduler",
        }
        told |= {"seconds": 1 / (3 + column), "seconds_per_step": 1 / 7, "peak_bytes": 10**9 + column, "flag": None}
        return Cell(noise(line * columns + column), {**told, **row})

    cells = tuple(tuple(cell(line, column) for column in range(columns)) for line in range(lines))
    names = tuple(f"{column} steps" for column in range(columns))
    return Sheet(cells, names, tuple(Line(f"{text} {line}", label) for line in range(lines)), text)


class Elements(HTMLParser):
    """Every element with its attributes, and the text of the page outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.text, self.within = [], "", ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.within = tag

    def handle_data(self, data):
        self.text += data if self.within not in ("script", "style") else ""


def uris(page: str) -> list[str]:
    return [attributes["src"] for tag, attributes in Elements(page).found if tag == "img" and attributes.get("src")]


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def test_every_picture_is_there_pixel_for_pixel_and_named():
    sheet = a_sheet(label="guidance 2")
    page = report.page(sheet)
    assert [decoded(uri).tobytes() for uri in uris(page)] == [image.tobytes() for image in sheet.images]
    alts = [attributes["alt"] for tag, attributes in Elements(page).found if tag == "img" and attributes.get("src")]
    assert alts[4] == "1 steps, guidance 2: a fox 1"


def test_whatever_a_sheet_says_is_text():
    """Title, prompt, labels, names and values of rows, and a column's name in the script's reach."""
    sheet = a_sheet(text=NASTY, label=NASTY, **{NASTY: NASTY, "mapping": {NASTY: [NASTY]}})
    sheet = Sheet(sheet.cells, (NASTY,) * 3, sheet.lines, sheet.title)
    page = report.page(sheet)
    plain = Elements(report.page(a_sheet(label="guidance 2", name="value")))
    assert page.count("<script") == page.count("</script") == 1
    assert {tag for tag, _ in Elements(page).found} == {tag for tag, _ in plain.found}
    assert {name for _, given in Elements(page).found for name in given} == {n for _, g in plain.found for n in g}
    assert Elements(page).text.count(NASTY) > 20
    assert html.escape("<script>") in page


def test_the_page_asks_for_nothing():
    page = report.page(a_sheet())
    assert not re.search(r"https?:|//[a-z]|@import|<link rel=\"stylesheet|fetch\(|XMLHttpRequest", page)
    policies = [given["content"] for tag, given in Elements(page).found if given.get("http-equiv")]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; img-src data:;")


@pytest.mark.parametrize(("lines", "columns"), [(1, 1), (4, 8), (8, 8)])
def test_the_page_is_small_without_its_pictures(lines, columns):
    page = report.page(a_sheet(lines, columns, label="guidance 1.5"))
    bare = len(page.encode()) - sum(map(len, uris(page)))
    assert 10_000 < bare < 60_000


def test_the_table_holds_what_differs_and_says_the_rest_once():
    sheet = a_sheet(styles={"ink": 0.5, "paper": [0.1, 0.2]}, extra="same")
    names, rows, same = report._table(sheet)
    assert names == ["picture", "column", "num_inference_steps", "seconds", "peak_bytes", "prompt"]
    assert rows[4] == [5, "1 steps", 1, 0.25, 10**9 + 1, "a fox 1"]
    assert dict(same).items() >= {"seed": 1337, "styles.ink": 0.5, "styles.paper": [0.1, 0.2], "extra": "same"}.items()
    assert "flag" not in dict(same)  # None in each: nothing to say
    assert report._table(a_sheet(label="x"))[0][:3] == ["picture", "column", "line"]


def test_a_flat_picture_is_marked():
    assert report.page(a_sheet(flag="flat")).count('<span class="warn">flat</span>') == 6
    assert '<span class="warn">' not in report.page(a_sheet())


def test_a_sheet_that_was_stopped_has_gaps():
    sheet = a_sheet()
    stopped = Sheet((sheet.cells[0], (sheet.cells[1][0], None, None)), sheet.columns, sheet.lines, sheet.title)
    page = report.page(stopped)
    assert page.count("not drawn") == 2
    assert len(uris(page)) == 4
    assert "4 of 6 pictures" in page
    assert [row[:2] for row in report._table(stopped)[1]][-1] == [4, "0 steps"]


def test_pictures_lose_nothing_unless_the_page_would_be_huge(monkeypatch):
    sheet = a_sheet(1, 2)
    lossless, lossy = report.page(sheet), report.page(sheet, 30)
    assert len(lossy) < len(lossless)
    assert "shown as WebP of quality 30" in lossy
    assert report.page(sheet, 100) == lossless
    assert "quality" not in Elements(lossless).text
    monkeypatch.setattr(report, "_LOSSLESS_PIXELS", 2 * 16 * 16 - 1)
    assert "shown as WebP of quality 90" in report.page(sheet)
    assert report.page(sheet, 100) == lossless


@pytest.mark.parametrize("quality", [0, 101, 1.5, "high", True])
def test_a_quality_that_is_none_is_refused(quality, tmp_path):
    with pytest.raises(lcmlora.DataError, match=f"quality={quality!r} is none of a picture: pass 1 to 100"):
        a_sheet().to_html(tmp_path / "a.html", quality=quality)
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_differing_size_keep_their_proportion():
    cells = (Cell(noise(1, (16, 16)), {"a": 1}), Cell(noise(2, (64, 32)), {"a": 2}))
    page = report.page(Sheet((cells,), ("small", "large"), (Line("x"),)))
    assert 'width="16" height="16" style="width: 25%"' in page
    assert 'width="64" height="32" alt=' in page


def test_to_html_writes_the_page(tmp_path):
    sheet = a_sheet()
    file = sheet.to_html(tmp_path / "new/a.html")
    assert file.read_text(encoding="utf-8") == report.page(sheet)
