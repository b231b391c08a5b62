"""Pages that stand alone: escaping, tables, line charts, pictures, whole files."""

from __future__ import annotations

import base64
import io
import re

import jinja2
import numpy as np
import pytest
from PIL import Image

from lcmlora import DataError, pages

NASTY = "</script><script>alert(1)</script> & \"quoted\" 'so' 狐"


def made(macro: str, *arguments: object, **more: object) -> str:
    """What a macro writes."""
    return str(getattr(pages._environment().get_template("macros.html.j2").module, macro)(*arguments, **more))


@pytest.fixture
def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 16, 3), dtype=np.uint8))


def of_uri(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


def test_a_picture_is_kept_pixel_for_pixel_unless_a_quality_is_given(noise):
    assert of_uri(pages.picture_uri(noise)).tobytes() == noise.tobytes()
    small = pages.picture_uri(noise, 30)
    assert len(small) < len(pages.picture_uri(noise))
    assert of_uri(small).size == noise.size


def test_a_picture_of_any_mode_and_size_is_one_of_a_page(noise):
    for mode in ("L", "RGBA", "I;16", "1"):
        assert of_uri(pages.picture_uri(noise.convert("L").convert(mode))).size == noise.size
    long = Image.new("RGB", (1, 16384))  # WebP holds less
    assert of_uri(pages.picture_uri(long)).size == long.size


def test_what_a_table_holds_is_escaped():
    html = made("table", [NASTY], [[NASTY], [["<b>"]]], NASTY) + made("facts", [(NASTY, NASTY)])
    assert "<script" not in html
    assert "<b>" not in html
    assert html.count("&lt;/script&gt;&lt;script&gt;") >= 5


def test_a_table_sets_numbers_right_and_keeps_all_their_digits_for_sorting():
    html = made("table", ["n", "text"], [[None, "a"], [0.123456789, "b"], [True, None]])
    assert re.findall(r"<th [^>]*number", html) == ['<th scope="col" class="number']
    assert '<td class="number" data-v="0.123456789">0.1235</td>' in html
    assert ">yes</td>" in html


@pytest.mark.parametrize("log", [False, True])
def test_a_chart_encloses_its_points_and_leaves_out_what_is_no_number(log):
    points = [(0, 3.2), (10, 0.07), (20, float("nan")), (30, -1 if log else 1), (40, 12)]
    drawn = pages.chart({"loss": points}, width=100, height=50, log=log)
    ((name, line),) = drawn["lines"]
    places = [tuple(map(float, place.split(","))) for place in line.split()]
    assert name == "loss"
    assert len(places) == 3 if log else 4
    assert all(0 <= x <= 100 and 0 <= y <= 50 for x, y in places)
    assert [x for x, _ in places] == ([0, 25, 100] if log else [0, 25, 75, 100])
    heights = [y for _, y in places]
    assert max(heights) == heights[1]
    assert drawn["x"] == [(0, "0"), (25, "10"), (50, "20"), (75, "30"), (100, "40")]
    ticks = [float(text) for _, text in drawn["y"]]
    assert ticks == sorted(ticks)
    assert ticks[-1] >= 12


@pytest.mark.parametrize("points", [[], [(1, 5)], [(0, 2), (9, 2)], [(1, 1e-9), (2, 3e-9)], [(0, 0.0), (1, 1e12)]])
@pytest.mark.parametrize("log", [False, True])
def test_a_chart_of_little_is_a_chart(points, log):
    drawn = pages.chart({"one": points, "none": []}, log=log)
    assert 2 <= len(drawn["x"]) <= 8
    assert 2 <= len(drawn["y"]) <= 25
    svg = made("line_chart", {NASTY: points}, title=NASTY, x_label="step", y_label="loss", log=log)
    assert "<script" not in svg
    assert "nan" not in svg
    assert ("<circle" in svg) is (" " not in drawn["lines"][0][1] != "")  # no line


def test_a_page_without_what_its_template_names_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="title"):
        pages.render("sheet.html.j2")


def test_a_file_is_written_whole_or_refused_in_a_sentence(tmp_path):
    file = pages.write(tmp_path / "new/folder/a.html", "狐 \ud800")
    assert file.read_text(encoding="utf-8") == "狐 ?"
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(DataError, match=r"a.html/b.csv can't be written: .*\.$"):
        pages.write(file / "b.csv", b"")
