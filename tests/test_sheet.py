"""A sheet as a picture, in a notebook, as files. Its cells are coloured squares: nothing is drawn by a model here."""

from __future__ import annotations

import csv
import io
import json
import shutil

import pytest
from PIL import Image, ImageFont

import lcmlora
from lcmlora import pages
from lcmlora.sheets import Cell, Line, Sheet, fonts

COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta")
LONG = "a very detailed painting of an old lighthouse above a stormy sea, " * 6


def a_sheet(lines=1, columns=2, size=(16, 16), missing=(), title="over steps", prompt="a fox", label="") -> Sheet:
    """Squares of `COLOURS`, in turn."""

    def cell(line, column):
        if (line, column) in missing:
            return None
        image = Image.new("RGB", size, COLOURS[(line * columns + column) % len(COLOURS)])
        row = {"prompt": prompt, "column": f"{column + 1} steps", "num_inference_steps": column + 1, "seed": 7}
        return Cell(image, {**row, "styles": {"ink": 0.5}, "sizes": [1, 2], "seconds": 0.25})

    cells = tuple(tuple(cell(line, column) for column in range(columns)) for line in range(lines))
    names = tuple(f"{column + 1} steps" for column in range(columns))
    return Sheet(cells, names, tuple(Line(prompt, label and f"{label} {n}") for n in range(lines)), title)


def boxes(image: Image.Image) -> dict[str, tuple[int, int, int, int]]:
    """Where the pixels of each colour lie."""
    found = {}
    for colour in COLOURS:
        solid = Image.new("RGB", image.size, colour)
        same = Image.new("1", image.size)
        same.putdata([a == b for a, b in zip(image.get_flattened_data(), solid.get_flattened_data(), strict=True)])
        if box := same.getbbox():
            found[colour] = box
    return found


# -- the picture ------------------------------------------------------------------------------------------------------


def test_pictures_stand_in_lines_and_columns():
    at = boxes(a_sheet(2, 3).image)
    assert len(at) == 6
    assert at["red"][0] == at["yellow"][0] < at["lime"][0] == at["cyan"][0] < at["blue"][0] == at["magenta"][0]
    assert at["red"][1] == at["lime"][1] == at["blue"][1] < at["yellow"][1] == at["cyan"][1] == at["magenta"][1]
    assert {(right - left, low - top) for left, top, right, low in at.values()} == {(128, 128)}


@pytest.mark.parametrize("side", [8, 64, 100, 128, 300])
def test_small_pictures_are_enlarged_and_others_keep_their_pixels(side):
    left, top, right, low = boxes(a_sheet(size=(side, side)).image)["red"]
    assert right - left == low - top == side * max(1, round(128 / side))


def test_each_line_and_column_is_as_large_as_its_largest_picture():
    sheet = a_sheet(2, 2)
    large = Cell(Image.new("RGB", (32, 24), "magenta"), {})
    at = boxes(Sheet(((large, sheet.cells[0][1]), sheet.cells[1]), sheet.columns, sheet.lines).image)
    middle = {name: ((left + right) / 2, (top + low) / 2) for name, (left, top, right, low) in at.items()}
    assert middle["magenta"][0] == middle["blue"][0]
    assert middle["magenta"][1] == middle["lime"][1]
    assert [at[name][2] - at[name][0] for name in ("magenta", "lime")] == [128, 64]


def test_a_picture_that_was_not_drawn_is_an_empty_frame():
    whole, stopped = a_sheet(2, 2), a_sheet(2, 2, missing={(1, 1)})
    assert stopped.image.size == whole.image.size
    left, top, right, low = boxes(whole.image)["yellow"]
    frame = stopped.image.crop((left, top, right, low))
    assert frame.getpixel((64, 64)) == (255, 255, 255)
    assert all(frame.getpixel(place) != (255, 255, 255) for place in ((0, 0), (64, 0), (0, 64), (127, 127)))
    assert boxes(a_sheet(2, 2, missing={(0, 0), (0, 1)}).image).keys() == {"blue", "yellow"}
    assert boxes(a_sheet(2, 2, missing={(0, 1), (1, 1)}).image).keys() == {"red", "blue"}


@pytest.mark.parametrize(("lines", "columns"), [(1, 12), (12, 1), (1, 1)])
@pytest.mark.parametrize("size", [(64, 64), (8, 256), (256, 8)])
def test_no_text_reaches_into_a_picture_or_out_of_the_sheet(lines, columns, size):
    """Long texts everywhere: every picture is whole, and the sheet's edge is white."""
    sheet = a_sheet(lines, columns, size, title=LONG, prompt=LONG, label="guidance")
    sheet = Sheet(sheet.cells, tuple(LONG for _ in sheet.columns), sheet.lines, sheet.title)
    zoom = max(1, round(128 / size[0]))
    counts = {colour: count for count, colour in sheet.image.getcolors(1 << 20)}
    red = sum(cell.image.getpixel((0, 0)) == (255, 0, 0) for line in sheet.cells for cell in line)
    assert counts[(255, 0, 0)] == red * size[0] * size[1] * zoom**2
    image = sheet.image
    edges = [image.crop(box) for box in ((0, 0, image.width, 2), (0, 0, 2, image.height))]
    edges += [image.crop((image.width - 2, 0, image.width, image.height))]
    assert all(edge.getcolors() == [(edge.width * edge.height, (255, 255, 255))] for edge in edges)


def test_letters_grow_with_the_pictures():
    """They stay readable where a sheet of large pictures is shown small."""

    def ink(size: int) -> int:
        image = a_sheet(columns=1, size=(size, size), title="", prompt="").image
        black = image.crop((0, 0, image.width, image.height - size)).convert("L").point(lambda v: 255 * (v < 60))
        _, top, _, low = black.getbbox()
        return low - top

    assert ink(1024) > 4 * ink(128)


def test_a_prompt_is_written_once_for_the_lines_that_share_it():
    one, two = a_sheet(2, 1, label="guidance"), a_sheet(2, 1, label="guidance", prompt="")
    first, second = (boxes(sheet.image)["lime"][1] for sheet in (one, two))
    assert first == second
    below = [sheet.image.crop((0, first, 100, first + 128)).tobytes() for sheet in (one, two)]
    assert below[0] == below[1]
    assert one.image.crop((0, 0, 100, first)).tobytes() != two.image.crop((0, 0, 100, first)).tobytes()


def test_a_huge_sheet_is_made_smaller_so_that_anyone_can_open_it(monkeypatch):
    monkeypatch.setattr("lcmlora.sheets.drawing._MOST_PIXELS", 90_000)
    image = a_sheet(3, 3, (300, 300)).image
    assert 70_000 < image.width * image.height < 110_000
    assert len(boxes(image)) == 6


def test_it_is_drawn_once():
    sheet = a_sheet()
    assert sheet.image is sheet.image


def test_a_sheet_without_pictures_says_so_wherever_one_is_needed(tmp_path):
    empty = a_sheet(1, 1, missing={(0, 0)})
    for use in (lambda: empty.image, lambda: empty.save(tmp_path), lambda: empty.to_html(tmp_path / "a.html")):
        with pytest.raises(lcmlora.DataError, match="no picture to show"):
            use()
    assert list(tmp_path.iterdir()) == []
    assert empty._repr_png_() is None
    assert "0 of 1 picture" in empty._repr_html_()
    assert empty.to_csv(tmp_path / "a.csv").read_text().strip() == ""


# -- text in any script -----------------------------------------------------------------------------------------------


def tofu(text: str) -> bool:
    """Whether any letter is drawn as Pillow's font draws what it lacks."""
    return any(face.file is None and not fonts._has(face, c) for face, c in fonts._faces(text) if not c.isspace())


needs_cyrillic = pytest.mark.skipif(
    not any("DejaVuSans.ttf" in file for file in fonts._files()),
    reason="no font with Cyrillic and Arabic",
)


@needs_cyrillic
@pytest.mark.parametrize("fontconfig", [True, False])
def test_other_scripts_are_drawn_by_a_font_of_the_system(fontconfig, monkeypatch):
    fonts._system_face.cache_clear()
    if not fontconfig:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    text = "рыжая лиса, ثعلب أحمر, a fox → ½"
    assert not tofu(text)
    assert "".join(run for _, run in fonts._runs(text)) == text
    fonts._system_face.cache_clear()


@needs_cyrillic
def test_words_of_a_script_from_right_to_left_are_one_run():
    assert [run for _, run in fonts._runs("ثعلب أحمر في الثلج")] == ["ثعلب أحمر في الثلج"]
    assert [run for face, run in fonts._runs("a ثعلب fox") if face.file is None] == ["a ", " fox"]


def test_what_no_font_has_is_drawn_all_the_same(monkeypatch):
    monkeypatch.setattr(fonts, "_system_face", lambda character: None)
    assert tofu("狐")
    assert a_sheet(prompt="狐").image.size[0] > 0


def test_a_bitmap_font_of_one_size_is_scaled(monkeypatch):
    """As fonts of colour emoji are: a font that has 109 pixels only stands for one."""
    large, small = (ImageFont.load_default(size) for size in (109, 20))

    def one_size(file, size, index):
        if size != 109:
            raise OSError("invalid pixel size")
        return large

    monkeypatch.setattr(ImageFont, "truetype", one_size)
    fonts._loaded.cache_clear()
    emoji = fonts.Face("emoji.ttf")
    monkeypatch.setattr(fonts, "_faces", lambda text: ((emoji, character) for character in text))
    image = Image.new("RGB", (200, 60), "white")
    fonts.draw(image, (10, 40), "MMM", 20, "black")
    left, top, right, low = image.convert("L").point(lambda value: 255 * (value < 128)).getbbox()
    assert 10 <= left < right <= 10 + fonts.width("MMM", 20) + 1
    assert 12 <= low - top <= 20
    assert abs(fonts.width("MMM", 20) - small.getlength("MMM")) < 2
    fonts._loaded.cache_clear()


def test_what_is_no_character_of_a_line_is_a_space():
    for odd in ("\n", "\x00", "\u2029", "\ud800", "\t"):
        assert fonts.width(f"a{odd}fox", 12) == fonts.width("a fox", 12)


@pytest.mark.parametrize("text", [LONG, "雪" * 80, "x" * 300, "  two   words\n", ""])
def test_a_text_is_wrapped_into_its_room(text):
    lines = fonts.wrapped(text, 12, 100, 4)
    assert len(lines) <= 4
    assert all(fonts.width(line, 12) <= 100 for line in lines)
    joined = "".join(lines).replace(" ", "")
    whole = "".join(text.split())
    assert joined == whole or (joined.endswith("…") and whole.startswith(joined[:-1]))
    assert (joined == whole) == (len(whole) < 60)


def test_a_text_breaks_at_its_spaces():
    assert fonts.wrapped("a small rocket on a black background", 12, 120, 3) == [
        "a small rocket on a",
        "black background",
    ]


# -- in a notebook ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sheet", "text"),
    [
        (a_sheet(4, 8), "Sheet(4 lines x 8 columns, 32 pictures, 'over steps')"),
        (a_sheet(4, 8, missing={(3, 6), (3, 7)}), "Sheet(4 lines x 8 columns, 30 of 32 pictures, 'over steps')"),
        (a_sheet(1, 1, title=""), "Sheet(1 line x 1 column, 1 picture)"),
    ],
)
def test_its_repr_is_one_line(sheet, text):
    assert repr(sheet) == text


def test_a_notebook_shows_the_sheet_small_and_escaped():
    sheet = a_sheet(1, 12, (256, 256), title="<script>alert(1)</script>")
    shown = Image.open(io.BytesIO(sheet._repr_png_()))
    assert shown.width == 1200 < sheet.image.width
    html = sheet._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert len(html) < 100_000


# -- files ------------------------------------------------------------------------------------------------------------


def test_saved_are_picture_json_and_table(tmp_path):
    sheet = a_sheet(2, 2, missing={(1, 1)}, prompt='狐, "a"\nfox', label="guidance")
    assert sheet.save(tmp_path / "new", "steps") == tmp_path / "new/steps.png"
    assert Image.open(tmp_path / "new/steps.png").tobytes() == sheet.image.tobytes()
    known = json.loads((tmp_path / "new/steps.json").read_text(encoding="utf-8"))
    assert known == sheet.to_dict()
    assert known["columns"] == ["1 steps", "2 steps"]
    assert known["lines"][1] == {"prompt": '狐, "a"\nfox', "label": "guidance 1"}
    assert len(known["pictures"]) == 3
    with (tmp_path / "new/steps.csv").open(newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    assert [row["num_inference_steps"] for row in table] == ["1", "2", "1"]
    assert table[0]["prompt"] == '狐, "a"\nfox'
    assert table[0]["styles.ink"] == "0.5"
    assert json.loads(table[0]["sizes"]) == [1, 2]


def test_numbers_that_json_lacks_are_none(tmp_path):
    image = Image.new("RGB", (4, 4))
    cells = (Cell(image, {"a": float("nan"), "b": {"c": [float("inf"), 1.5]}}), Cell(image, {"d": 2}))
    sheet = Sheet((cells,), ("one", "two"), (Line("x"),))
    assert sheet.to_dict()["pictures"] == [{"a": None, "b": {"c": [None, 1.5]}}, {"d": 2}]
    assert sheet.to_csv(tmp_path / "a.csv").read_text().splitlines() == ["a,b.c,d", ',"[null, 1.5]",', ",,2"]


@pytest.mark.parametrize(
    "write", [lambda s, at: s.save(at), lambda s, at: s.to_csv(at / "a"), lambda s, at: s.to_html(at / "a")]
)
def test_what_cannot_be_written_is_one_sentence(write, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(lcmlora.DataError, match=r"can't be written: .*\."):
        write(a_sheet(), tmp_path / "file")


def test_sheets_with_gaps_stand_side_by_side():
    both = a_sheet(2, 1, missing={(0, 0)}) + a_sheet(2, 2)
    assert both.columns == ("1 steps", "1 steps", "2 steps")
    assert [[cell is None for cell in line] for line in both.cells] == [[True, False, False], [False] * 3]
    with pytest.raises(TypeError):
        a_sheet() + 1
    with pytest.raises(lcmlora.DataError, match="'9 steps' was drawn: the columns are 1 steps, 1 steps, 2"):
        both.seconds("9 steps")
    assert pages.shown(both.seconds("1 steps")) == "0.25"
