"""Contact sheets: what is called, how it is laid out, what is written beside it."""

from __future__ import annotations

import json
import warnings

import pytest
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

import lcmlora
from conftest import sd_pipe, sdxl_pipe, snapshot
from lcmlora import sheets

SMALL = {"height": 16, "width": 16}


@pytest.fixture
def pipe(lcm_file):
    pipe = sd_pipe()
    return lcmlora.accelerate(pipe, lora=lcm_file(pipe))


def passes(pipe) -> list[int]:
    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    return batches


def test_steps_of_an_accelerated_pipe_go_from_one_to_eight(pipe):
    batches = passes(pipe)
    sheet = lcmlora.sweep_steps(pipe, ["a fox", "a cat"], **SMALL)
    assert batches == [1] * 2 * sum(range(1, 9))
    assert sheet.columns == ("1 step", *(f"{n} steps" for n in range(2, 9)))
    assert [row["prompt"] for row in sheet.rows] == ["a fox"] * 8 + ["a cat"] * 8
    assert sheet.rows[3]["status"]["accelerated"] is True


def test_a_picture_hangs_on_nothing_but_its_own_cell(pipe):
    """Pitfall 27: LCM draws noise in each step, so every cell needs a generator of its own."""
    whole = lcmlora.sweep_steps(pipe, ["a fox", "a cat"], (1, 2, 3), **SMALL)
    alone = lcmlora.sweep_steps(pipe, "a cat", (3,), **SMALL)
    assert whole.images[5].tobytes() == alone.images[0].tobytes()
    other = lcmlora.sweep_steps(pipe, "a cat", (3,), seed=1, **SMALL)
    assert other.images[0].tobytes() != alone.images[0].tobytes()


def test_guidance_doubles_the_passes_above_one(pipe):
    batches = passes(pipe)
    lcmlora.sweep_guidance(pipe, "a fox", (1.0, 1.5), num_inference_steps=1, negative_prompt=None, **SMALL)
    assert batches == [1, 2]


def test_compare_gives_the_pipe_back(lcm_file):
    pipe = sd_pipe()
    scheduler, batches = pipe.scheduler, passes(pipe)
    sheet = lcmlora.compare(pipe, "a fox", base_steps=(2, 3), accelerate={"lora": lcm_file(pipe)}, **SMALL)
    assert batches == [2] * 5 + [1] * 4
    assert sheet.columns == ("base, 2 steps", "base, 3 steps", "LCM, 4 steps")
    assert pipe.scheduler is scheduler
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    with pytest.raises(lcmlora.PipelineError, match="restore"):
        lcmlora.compare(pipe, "a fox")


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda pipe: lcmlora.compare(pipe, "x", styles={}), r"'styles'. Is accelerate={'styles': ...} meant\?"),
        (lambda pipe: lcmlora.compare(pipe, "x", gidance_scale=1), r"'gidance_scale'. Is guidance_scale meant\?"),
        (lambda pipe: lcmlora.compare(pipe, "x", call={"heigth": 16}), r"'heigth'. Is height meant\?"),
        (lambda pipe: lcmlora.compare(pipe, "x", accelerate={"stpes": 4}), r"'stpes'. Is steps meant\?"),
        (lambda pipe: lcmlora.sweep_steps(pipe, "x", stpes=(1,)), r"call takes no argument 'stpes'."),
        (lambda pipe: lcmlora.sweep_guidance(pipe, "x", num_infernce_steps=1), "Is num_inference_steps meant"),
        (lambda pipe: sheets.sweep(pipe, "x", {"a": {}, "b": {"hight": 16}}), r"'hight'. Is height meant\?"),
    ],
)
def test_an_unknown_argument_is_refused_before_the_first_picture(draw, words):
    pipe = sd_pipe()
    before, batches = snapshot(pipe), passes(pipe)
    with pytest.raises(TypeError, match=words):
        draw(pipe)
    assert batches == []
    assert not lcmlora.is_accelerated(pipe)
    assert snapshot(pipe).keys() == before.keys()


def test_an_argument_of_one_pipeline_alone_goes_into_call(pipe):
    sheet = lcmlora.sweep_steps(pipe, "a fox", (1,), call={"output_type": "pil", "eta": 0.0}, **SMALL)
    assert sheet.rows[0]["eta"] == 0.0


def test_E9_rows_and_labels_say_what_ran(pipe):
    batches = passes(pipe)
    with pytest.warns(lcmlora.LcmLoraWarning, match="guidance_scale=7.5"):
        sheet = lcmlora.sweep_guidance(pipe, ["a fox", "a cat"], (1, 2, 7.5), **SMALL)
    assert [row["guidance_scale"] for row in sheet.rows] == [1, 2, 2] * 2
    assert [row["num_inference_steps"] for row in sheet.rows] == [4] * 6
    assert sheet.columns == ("guidance 1", "guidance 2", "guidance 7.5, ran 2")
    assert [row["column"] for row in sheet.rows] == [*sheet.columns] * 2
    assert sheet.seconds("guidance 7.5, ran 2") > 0
    assert batches == ([1] * 4 + [2] * 8) * 2
    assert sheet.images[1].tobytes() == sheet.images[2].tobytes()


@pytest.mark.parametrize(
    ("strength", "ran", "columns"),
    [(0.5, [2, 4], ("2 steps", "4 steps")), (0.04, [2, 2], ("2 steps", "4 steps, ran 2"))],
)
def test_E9_rows_say_how_many_steps_ran_at_a_strength(strength, ran, columns, lcm_file):
    pipe = sd_pipe(cls=StableDiffusionImg2ImgPipeline)
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    batches, picture = passes(pipe), Image.new("RGB", (16, 16), "teal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lcmlora.LcmLoraWarning)
        sheet = lcmlora.sweep_steps(pipe, "a fox", (2, 4), image=picture, strength=strength)
    assert len(batches) == sum(ran)
    assert [row["num_inference_steps"] for row in sheet.rows] == ran
    assert sheet.columns == columns


def test_E9_a_split_counts_the_steps_of_its_side(lcm_file):
    pipe = sdxl_pipe()
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    batches = passes(pipe)
    call = {"denoising_end": 0.5, "output_type": "pil"}
    sheet = lcmlora.sweep_steps(pipe, "a fox", (8,), call=call)
    assert sheet.rows[0]["num_inference_steps"] == len(batches) < 8
    assert sheet.columns == (f"8 steps, ran {len(batches)}",)


def test_the_sheet_shows_each_picture_in_its_place(pipe):
    """Two rows of two coloured squares, and text around them."""
    colours = ["red", "green", "blue", "yellow"]
    images = tuple(Image.new("RGB", (16, 16), colour) for colour in colours)
    cells = [sheets.Cell(image, {}) for image in images]
    lines = (sheets.Line("a"), sheets.Line("b"))
    sheet = lcmlora.Sheet((tuple(cells[:2]), tuple(cells[2:])), ("one", "two"), lines, "title")
    found = [
        colour
        for _, colour in sheet.image.getcolors(1 << 20)
        if colour in {image.getpixel((0, 0)) for image in images}
    ]
    assert len(found) == 4
    assert [sheet.image.getpixel((x, y)) for y in (60, 220) for x in (60, 190)] == [i.getpixel((0, 0)) for i in images]


def test_saved_is_the_sheet_and_what_made_it(pipe, tmp_path):
    sheet = lcmlora.sweep_steps(pipe, "a fox", (1, 2), **SMALL)
    file = sheet.save(tmp_path / "new", "steps")
    assert Image.open(file).size == sheet.image.size
    rows = json.loads((tmp_path / "new/steps.json").read_text())["pictures"]
    assert [row["num_inference_steps"] for row in rows] == [1, 2]
    assert all(row["seconds"] > 0 and row["seed"] == 1337 for row in rows)


def test_sheets_of_the_same_prompts_stand_side_by_side(pipe):
    one, two = (lcmlora.sweep_steps(pipe, ["a", "b"], (n,), **SMALL) for n in (1, 2))
    both = one + two
    assert both.columns == ("1 step", "2 steps")
    assert both.images == (one.images[0], two.images[0], one.images[1], two.images[1])
    with pytest.raises(ValueError, match="other prompts"):
        one + lcmlora.sweep_steps(pipe, "c", (1,), **SMALL)
