"""Contact sheets: what is called, how it is laid out, what is written beside it."""

from __future__ import annotations

import copy
import json
import warnings
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.pipelines.animatediff.pipeline_output import AnimateDiffPipelineOutput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

import lcmlora
from conftest import assert_same, sd_pipe, sdxl_pipe, snapshot
from lcmlora import meanwhile, sheets
from lcmlora.sheets import states
from lcmlora.sheets.metrics import distance
from lcmlora.sheets.sweeping import picture_of
from lcmlora.testing import tiny_lora

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
    assert sheet.rows[3]["accelerated"] is True


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
    given = {"lora": lcm_file(pipe)}
    sheet = lcmlora.compare(pipe, "a fox", base_steps=(2, 3), lcm_steps=(4,), accelerate=given, **SMALL)
    assert batches == [2] * 5 + [1] * 4
    assert sheet.columns == ("base, 2 steps", "base, 3 steps", "LCM, 4 steps")
    assert pipe.scheduler is scheduler
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    again = lcmlora.compare(pipe, "a fox", base_steps=(2, 3), lcm_steps=(4,), **SMALL)
    assert cells(again) == cells(sheet)
    assert lcmlora.is_accelerated(pipe)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda pipe: lcmlora.compare(pipe, "x", styles={}), r"'styles'. Is accelerate={'styles': ...} meant\?"),
        (lambda pipe: lcmlora.compare(pipe, "x", steps=4), r"compare takes no argument 'steps'. Is lcm_steps meant\?"),
        (lambda pipe: lcmlora.compare(pipe, "x", gidance_scale=1), r"'gidance_scale'. Is guidance_scale meant\?"),
        (lambda pipe: lcmlora.compare(pipe, "x", call={"heigth": 16}), r"'heigth'. Is height meant\?"),
        (lambda pipe: lcmlora.compare(pipe, "x", accelerate={"stpes": 4}), r"'stpes'. Is steps meant\?"),
        (lambda pipe: lcmlora.sweep_steps(pipe, "x", stpes=(1,)), r"call takes no argument 'stpes'."),
        (lambda pipe: lcmlora.sweep_steps(pipe, "x", call={"image": 1}), r"no argument 'image'.*Image2Image"),
        (lambda pipe: lcmlora.generate(pipe, [], "out", image=1), r"generate takes no argument 'image'\.$"),
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


# -- any axis by any axis ---------------------------------------------------------------------------------------------


def single(pipe, prompt="a fox", seed=1337, **call):
    """The same picture as one call."""
    return pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), **SMALL, **call).images[0].tobytes()


def cells(sheet) -> list[list[bytes]]:
    return [[cell.image.tobytes() for cell in line] for line in sheet.cells]


def test_two_axes_cross_for_each_prompt_and_each_cell_equals_its_single_call(pipe):
    sheet = lcmlora.sweep(pipe, ["a", "b"], x={"steps": (1, 3)}, y={"guidance": (1, 1.5)}, **SMALL)
    assert sheet.columns == ("1 step", "3 steps")
    assert sheet.lines == (("a", "guidance 1"), ("a", "guidance 1.5"), ("b", "guidance 1"), ("b", "guidance 1.5"))
    assert [(row["num_inference_steps"], row["guidance_scale"]) for row in sheet.rows[:4]] == [
        (1, 1), (3, 1), (1, 1.5), (3, 1.5)
    ]  # fmt: skip
    assert cells(sheet) == [
        [single(pipe, prompt, num_inference_steps=n, guidance_scale=g) for n in (1, 3)]
        for prompt in "ab"
        for g in (1, 1.5)
    ]


def test_any_argument_of_the_call_and_the_seed_are_axes(pipe):
    sheet = lcmlora.sweep(
        pipe, "a fox", x={"seed": range(3)}, y={"negative_prompt": ("x", "y")}, guidance_scale=2, **SMALL
    )
    assert sheet.columns == ("seed 0", "seed 1", "seed 2")
    assert [line.label for line in sheet.lines] == ["negative_prompt x", "negative_prompt y"]
    assert len({image for line in cells(sheet) for image in line}) == 6
    assert cells(sheet)[1][2] == single(pipe, seed=2, negative_prompt="y", guidance_scale=2)


@pytest.mark.parametrize("fast", [True, False])
def test_weights_are_axes_and_a_merge_is_made_once_for_all_cells_of_it(fast, lcm_file, tmp_path, monkeypatch):
    pipe, calls = sd_pipe(), []
    lcm, ink = lcm_file(pipe), tiny_lora(pipe, tmp_path / "ink.safetensors", seed=5)
    before = snapshot(pipe)
    given = {"lora": lcm, "styles": {"ink": ink}}
    if fast:
        lcmlora.accelerate(pipe, **given)
    active = lcmlora.status(pipe)
    monkeypatch.setattr(states, "varied", lambda *args: calls.append(args) or meanwhile.varied(*args))
    monkeypatch.setattr(
        states, "accelerated", lambda *args, **more: calls.append(more) or lcmlora.accelerated(*args, **more)
    )
    sheet = lcmlora.sweep_weights(
        pipe, ["a", "b"], (0.5, 1.0), {"ink": (0, 0.7)}, accelerate=None if fast else given, **SMALL
    )
    assert len(calls) == 4  # and eight pictures
    assert [line.label for line in sheet.lines] == ["ink 0", "ink 0.7"] * 2
    assert [(row["weight"], row["styles"].get("ink", 0)) for row in sheet.rows[:4]] == [
        (0.5, 0), (1, 0), (0.5, 0.7), (1, 0.7)
    ]  # fmt: skip
    assert lcmlora.status(pipe) == active
    if fast:
        lcmlora.restore(pipe)
    assert_same(snapshot(pipe), before)
    lcmlora.accelerate(pipe, lora=lcm, weight=0.5, styles={"ink": lcmlora.Style(ink, 0.7)})
    assert cells(sheet)[1][0] == single(pipe, "a")


def test_a_styles_weight_alone_is_enough_where_there_is_one_style(pipe, tmp_path):
    lcmlora.set_styles(pipe, {"ink": tiny_lora(pipe, tmp_path / "ink.safetensors")})
    sheet = lcmlora.sweep_weights(pipe, "a", (1,), (0, 1), **SMALL)
    assert [line.label for line in sheet.lines] == ["ink 0", "ink 1"]
    lcmlora.set_styles(pipe, {})
    with pytest.raises(lcmlora.CallError, match=r"style: which one is meant\?"):
        lcmlora.sweep_weights(pipe, "a", (1,), (0, 1), **SMALL)


def test_recipes_are_an_axis(lcm_file):
    pipe = sd_pipe()
    given = {"lora": lcm_file(pipe, "mine.safetensors")}
    sheet = lcmlora.sweep(pipe, "a fox", x={"recipe": ("lcm", "tcd")}, y={"steps": (1, 2)}, accelerate=given, **SMALL)
    assert [row["scheduler"] for row in sheet.rows] == ["LCMScheduler", "TCDScheduler"] * 2
    assert [row["recipe"] for row in sheet.rows] == ["lcm", "tcd"] * 2


@pytest.mark.parametrize("fast", [True, False])
def test_the_scheduler_of_the_plain_pipe_is_an_axis(fast, lcm_file):
    pipe = sd_pipe()
    found = pipe.scheduler
    if fast:
        lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    kinds = ("EulerDiscrete", "DPMSolverMultistepScheduler", DDIMScheduler)
    sheet = lcmlora.sweep(pipe, "a fox", x={"scheduler": kinds}, num_inference_steps=2, **SMALL)
    assert sheet.columns == ("EulerDiscrete", "DPMSolverMultistep", "DDIM")
    assert [row["scheduler"] for row in sheet.rows] == [
        "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"
    ]  # fmt: skip
    assert lcmlora.is_accelerated(pipe) == fast
    if fast:
        lcmlora.restore(pipe)
    assert pipe.scheduler is found
    pipe.scheduler = EulerDiscreteScheduler.from_config(found.config)
    assert cells(sheet)[0][0] == single(pipe, num_inference_steps=2)


@pytest.mark.parametrize("fuse", [True, False])
def test_without_is_the_pipe_as_it_was_at_its_own_steps(fuse, lcm_file, tmp_path):
    plain, pipe = sd_pipe(), sd_pipe()
    lcm, ink = lcm_file(pipe), tiny_lora(pipe, tmp_path / "ink.safetensors")
    lcmlora.accelerate(pipe, lora=lcm, styles={"ink": ink}, fuse=fuse, steps=2)
    active, expected = lcmlora.status(pipe), single(pipe)
    sheet = lcmlora.sweep(pipe, "a fox", x={"weight": (0.5, 1)}, without={"steps": 3}, **SMALL)
    assert sheet.columns == ("without", "weight 0.5", "weight 1")
    assert sheet.rows[0]["accelerated"] is False
    assert cells(sheet)[0][0] == single(plain, num_inference_steps=3)
    assert lcmlora.status(pipe) == active
    assert single(pipe) == expected


def test_one_number_where_several_are_expected_is_told_how_to_type_it(pipe):
    with pytest.raises(
        lcmlora.CallError, match=r"lcm_steps=4: several numbers are expected, such as lcm_steps=\(4,\)"
    ):
        lcmlora.compare(pipe, "a fox", lcm_steps=4)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    "x", [{"accelerated": (False, True)}, {"recipe": ("tcd",)}, {"weight": (0.5,)}, {"styles": ({},)}]
)
def test_what_others_put_into_an_accelerated_pipe_is_there_afterwards(x, fuse, lcm_file, tmp_path):
    """A scheduler of the user's own, and a LoRA that was loaded since."""
    pipe = sd_pipe()
    given = {"lora": lcm_file(pipe)}
    lcmlora.accelerate(pipe, **given, fuse=fuse)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    if fuse:  # beside adapters it would have put the LCM-LoRA out
        late = tiny_lora(pipe, tmp_path / "late.safetensors")
        pipe.load_lora_weights(str(tmp_path), weight_name=late.name, adapter_name="late")
    scheduler, kind, expected = pipe.scheduler, type(pipe), single(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lcmlora.LcmLoraWarning)  # of the file's recipe
        lcmlora.sweep(pipe, "a fox", x, y={"steps": (1,)}, accelerate=given if "recipe" in x else {}, **SMALL)
    assert (pipe.scheduler is scheduler, type(pipe) is kind) == (True, True)
    assert single(pipe) == expected
    assert list(lcmlora.status(pipe).styles) == ["late"] * fuse


@pytest.mark.parametrize("x", [{"accelerated": (False, True)}, {"weight": (0.5, 0)}])
def test_other_threads_wait_for_cells_of_another_state(x, lcm_file):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    sibling = copy.copy(pipe)
    expected, alone, found = single(sibling), cells(lcmlora.sweep(pipe, "a fox", x, **SMALL)), []
    with ThreadPoolExecutor(1) as others:

        def ask(*given):
            if not found:
                found.append(others.submit(single, sibling))
                wait(found, timeout=0.2)

        hook = pipe.unet.register_forward_pre_hook(ask)
        assert cells(lcmlora.sweep(pipe, "a fox", x, **SMALL)) == alone
        hook.remove()
    assert found[0].result() == expected


def test_without_keeps_out_of_the_other_axis_of_steps(pipe):
    sheet = lcmlora.sweep(pipe, "a", x={"weight": (1,)}, y={"steps": (1, 2)}, without=True, **SMALL)
    assert [row["num_inference_steps"] for row in sheet.rows] == [50, 1, 50, 2]


def test_labels_with_settings_of_their_own_are_an_axis(lcm_file):
    pipe = sd_pipe()
    x = {"base": {"accelerated": False, "steps": 3}, "fast": {"steps": 2, "lora": lcm_file(pipe)}}
    sheet = lcmlora.sweep(pipe, "a", x, **SMALL)
    assert [row["accelerated"] for row in sheet.rows] == [False, True]
    assert not lcmlora.is_accelerated(pipe)


@pytest.mark.parametrize(
    ("axes", "error", "words"),
    [
        ({"x": {"steps": (1,), "seed": (1,)}}, lcmlora.CallError, "one name with one or more values"),
        ({"x": {"steps": ()}}, lcmlora.CallError, "one or more values"),
        ({"x": {"recipe": "lcm"}}, lcmlora.CallError, "one or more values"),
        ({"x": (1, 2)}, lcmlora.CallError, "one name and its values"),
        ({"x": {"steps": (1,)}, "y": {"stpes": (1,)}}, TypeError, r"takes no argument 'stpes'. Is steps meant\?"),
        ({"x": {"recipe": ("lcm", "lmc")}}, lcmlora.BaseModelError, "'lmc' is not known"),
        ({"x": {"weight": (1, "much")}}, lcmlora.LcmLoraError, "much"),
        ({"x": {"styles.ink": (0, 1)}}, lcmlora.LcmLoraError, "ink"),
        ({"x": {"lora": ("nowhere.safetensors",)}}, lcmlora.LoraFileError, "nowhere"),
        ({"x": {"scheduler": ("Oiler",)}}, lcmlora.CallError, "'Oiler': a scheduler of diffusers"),
        ({"x": {"a": {"scheduler": "DDIM", "accelerated": True}}}, lcmlora.CallError, "an accelerated one has"),
        ({"x": {"a": {"weight": 1, "accelerated": False}}}, lcmlora.CallError, "weight: the pipe as it was"),
        ({"x": {"num_images_per_prompt": (1, 2)}}, lcmlora.CallError, "several seeds"),
        ({"x": {"steps": (1,)}, "accelerate": {"wieght": 1}}, TypeError, "'wieght'. Is weight meant"),
        ({"x": {1: (1,)}}, lcmlora.CallError, "one name and its values"),
        ({"x": {"steps": (1, 0)}}, lcmlora.CallError, "num_inference_steps=0: a whole number from 1"),
        ({"x": {"steps": (1, 51)}}, lcmlora.CallError, "num_inference_steps=51"),
        ({"x": {"a": {"steps": 1}, "b": {"steps": 1.5, "accelerated": False}}}, lcmlora.CallError, "steps=1.5"),
        ({"x": {"guidance": (1, float("nan"))}}, lcmlora.CallError, "guidance_scale=nan: a number"),
        ({"x": {"height": (16, 17)}}, lcmlora.CallError, "height=17: a whole number, a multiple of 8"),
        ({"x": {"seed": (1, 1.5)}}, lcmlora.CallError, "seed=1.5: a whole number from 0"),
        ({"x": {"steps": (1,)}, "seed": 2**70}, lcmlora.CallError, "seed=1180"),
        ({"x": {"accelerated": (True, "false")}}, lcmlora.CallError, "accelerated='false': True or False"),
        ({"x": {"size": ("16x16",)}}, lcmlora.CallError, "size: give width and height"),
        ({"x": {"steps": (1,)}, "y": {"num_inference_steps": (2,)}}, lcmlora.CallError, "x gives it, and y too"),
        ({"x": {"steps": (1,)}, "num_inference_steps": 2}, lcmlora.CallError, "steps=2 is given for all cells"),
        ({"x": {"weight": (1,)}, "accelerate": {"weight": 0.5}}, lcmlora.CallError, "weight=0.5 is given for all"),
        ({"x": {"steps": (1,)}, "folder": __file__}, lcmlora.DataError, "can't be written to"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_the_first_picture(axes, error, words, pipe):
    active, batches = lcmlora.status(pipe), passes(pipe)
    with pytest.raises(error, match=words):
        lcmlora.sweep(pipe, "a fox", **axes)
    assert batches == []
    assert lcmlora.status(pipe) == active


def test_without_needs_originals(lcm_file):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), keep=None)
    batches = passes(pipe)
    with pytest.raises(lcmlora.PipelineError, match="keep=None"):
        lcmlora.compare(pipe, "a fox", base_steps=(2,), lcm_steps=(1,))
    assert batches == []


@pytest.mark.parametrize("prompts", [[], (), None, [1], "half a character: \ud800"])
def test_prompts_are_texts(prompts, pipe):
    with pytest.raises(lcmlora.CallError, match="prompts="):
        lcmlora.sweep_steps(pipe, prompts, (1,))


# -- stopping, going on, one bar --------------------------------------------------------------------------------------


def stop_at(pipe, count):
    """Ctrl-C in the UNet pass of that number; returns the hook and the passes."""
    seen = []

    def hook(module, args):
        seen.append(args[0].shape[0])
        if len(seen) == count:
            raise KeyboardInterrupt

    return pipe.unet.register_forward_pre_hook(hook), seen


@pytest.mark.parametrize("fast", [True, False])
def test_after_ctrl_c_there_is_what_was_drawn_and_the_pipe_is_back(fast, lcm_file):
    pipe = sd_pipe()
    lcm = lcm_file(pipe)
    if fast:
        lcmlora.accelerate(pipe, lora=lcm)
    active = lcmlora.status(pipe)
    hook, _ = stop_at(pipe, 4)
    with pytest.warns(lcmlora.LcmLoraWarning, match="stopped after 3 of 4 pictures"):
        sheet = lcmlora.sweep(
            pipe, ["a", "b"], x={"weight": (0.5, 1)}, accelerate={"lora": lcm}, num_inference_steps=1, **SMALL
        )
    hook.remove()
    assert [[cell is not None for cell in line] for line in sheet.cells] == [[True, True], [True, False]]
    assert lcmlora.status(pipe) == active
    assert sheet.columns == ("weight 0.5", "weight 1")


def test_a_sheet_in_a_folder_goes_on_where_it_was_stopped(pipe, tmp_path):
    args = (pipe, ["a", "b"], {"steps": (1, 2)}, {"seed": (1, 2)})
    whole = lcmlora.sweep(*args, **SMALL)
    hook, _ = stop_at(pipe, 5)
    with pytest.warns(lcmlora.LcmLoraWarning, match="stopped after 3 of 8"):
        lcmlora.sweep(*args, folder=tmp_path / "out", **SMALL)
    hook.remove()
    drawn = passes(pipe)
    sheet = lcmlora.sweep(*args, folder=tmp_path / "out", **SMALL)
    assert len(drawn) == 12 - 4
    assert cells(sheet) == cells(whole)
    assert [row["column"] for row in sheet.rows] == [row["column"] for row in whole.rows]
    drawn.clear()
    assert cells(lcmlora.sweep(*args, folder=tmp_path / "out", **SMALL)) == cells(whole)
    assert drawn == []
    assert len([*(tmp_path / "out" / "cells").iterdir()]) == 8
    assert (tmp_path / "out" / "sheet.png").exists()


def test_a_damaged_cell_is_drawn_again_and_one_with_a_callback_always(pipe, tmp_path):
    whole = cells(lcmlora.sweep_steps(pipe, "a", (1, 2), folder=tmp_path, **SMALL))
    damaged = min((tmp_path / "cells").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:60])
    drawn = passes(pipe)
    assert cells(lcmlora.sweep_steps(pipe, "a", (1, 2), folder=tmp_path, **SMALL)) == whole
    assert len(drawn) in (1, 2)

    def scaled(by):
        return lambda pipe, step, timestep, given: {"latents": given["latents"] * by}

    axis = {"callback_on_step_end": [scaled(1), scaled(0.5)]}
    one, other = lcmlora.sweep(pipe, "a", axis, folder=tmp_path, num_inference_steps=1, **SMALL).images
    assert one.tobytes() != other.tobytes()


def test_values_of_numpy_and_of_torch_are_values(pipe, tmp_path):
    steps = lcmlora.sweep_steps(pipe, "a", (1, 2), **SMALL)
    for _ in range(2):
        sheet = lcmlora.sweep_steps(pipe, "a", np.array([1, 2]), folder=tmp_path, **SMALL)
        assert cells(sheet) == cells(steps)
    axes = {"x": {"weight": np.float32([0, 1])}, "y": {"seed": torch.tensor([3, 4])}}
    sheet = lcmlora.sweep(pipe, "a", **axes, **SMALL)
    assert (sheet.columns, [line.label for line in sheet.lines]) == (("weight 0", "weight 1"), ["seed 3", "seed 4"])
    assert len({image.tobytes() for image in sheet.images}) == 4


def test_objects_of_one_class_are_states_of_their_own():
    pipe = sd_pipe()
    schedulers = [
        DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=s) for s in ("leading", "trailing")
    ]
    one, other = lcmlora.sweep(pipe, "a", {"scheduler": schedulers}, num_inference_steps=2, **SMALL).images
    assert one.tobytes() != other.tobytes()


@pytest.mark.parametrize("change", ["weights", "style", "scheduler", "call"])
def test_pictures_of_another_model_or_setting_in_the_folder_are_not_taken(change, pipe, tmp_path):
    ink = tiny_lora(pipe, tmp_path / "ink.safetensors")
    lcmlora.set_styles(pipe, {"ink": ink})
    lcmlora.sweep_steps(pipe, "a", (1,), folder=tmp_path, **SMALL)
    drawn, more = passes(pipe), {}
    if change == "weights":
        pipe.vae.decoder.conv_in.weight.data.mul_(1.5)
    elif change == "style":
        tiny_lora(pipe, ink, seed=9)
        lcmlora.set_styles(pipe, {"ink": ink})
    elif change == "scheduler":
        pipe.scheduler.register_to_config(original_inference_steps=25)
    else:
        more = {"guidance_scale": 1.5}
    lcmlora.sweep_steps(pipe, "a", (1,), folder=tmp_path, **more, **SMALL)
    assert len(drawn) == 1


@pytest.mark.parametrize("config", [None, {"desc": "mine", "leave": False}, {"disable": True}])
def test_one_bar_for_the_whole_sheet_that_honours_the_pipes_setting(config, lcm_file, capfd):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    if config is None:
        del pipe._progress_bar_config
    else:
        pipe.set_progress_bar_config(**config)
    lcmlora.sweep_steps(pipe, ["a", "b"], (1, 2), title="my sheet", **SMALL)
    said = capfd.readouterr().err
    assert ("/4" in said) == (config != {"disable": True})
    assert "/2" not in said
    assert getattr(pipe, "_progress_bar_config", None) == config


def test_a_pipeline_without_a_unet_is_swept_and_a_picture_of_one_colour_is_told(tmp_path):
    class Plain(DiffusionPipeline):
        def __init__(self):
            super().__init__()

        def __call__(self, prompt, num_inference_steps=3, generator=None):
            picture = Image.new("RGB", (16, 16), (num_inference_steps, 0, 0))
            if num_inference_steps > 1:
                picture.putpixel((0, 0), (255, 255, 255))
            return ImagePipelineOutput([picture])

    sheet = lcmlora.sweep(Plain(), "a", x={"steps": (1, 2)}, y={"seed": (1,)}, folder=tmp_path)
    assert [row["flag"] for row in sheet.rows] == ["flat", None]
    assert sheet.rows[0]["seconds_per_step"] == sheet.rows[0]["seconds"]
    assert sheet.rows[1]["accelerated"] is False


def test_of_a_video_the_middle_frame_is_the_picture():
    frames = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(5)]
    assert picture_of(AnimateDiffPipelineOutput([frames])) is frames[2]
    with pytest.raises(lcmlora.PipelineError, match="output_type"):
        picture_of(AnimateDiffPipelineOutput(torch.zeros(1, 3)))


def test_what_ran_of_a_plain_image_to_image_pipe_is_what_strength_leaves(lcm_file):
    pipe = sd_pipe(cls=StableDiffusionImg2ImgPipeline)
    batches = passes(pipe)
    sheet = lcmlora.sweep(pipe, "a", {"strength": (0.5, 1.0)}, image=Image.new("RGB", (16, 16)), num_inference_steps=4)
    assert [row["num_inference_steps"] for row in sheet.rows] == [2, 4]
    assert len(batches) == 6


def test_a_strength_that_leaves_no_step_of_the_plain_pipe_is_refused_and_compare_leaves_such_out(lcm_file):
    pipe = sd_pipe(cls=StableDiffusionImg2ImgPipeline)
    more = {"image": Image.new("RGB", (16, 16)), "strength": 0.3}
    with pytest.raises(lcmlora.CallError, match=r"strength=0\.3 leaves none of 3 steps"):
        lcmlora.sweep(pipe, "a", {"steps": (4, 3)}, **more)
    sheet = lcmlora.compare(pipe, "a", lcm_steps=(1,), accelerate={"lora": lcm_file(pipe)}, **more)
    assert sheet.columns[0] == "base, 4 steps, ran 1"


def test_there_is_no_pipe_without_the_lora_where_a_sibling_has_it(pipe):
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(lcmlora.PipelineError, match="another pipe that shares this one's UNet"):
        lcmlora.benchmark(other, (1, 1), progress=False)
    lcmlora.accelerate(other)
    lcmlora.restore(pipe)
    with pytest.raises(lcmlora.PipelineError, match="another pipe that shares this one's UNet"):
        lcmlora.sweep_steps(pipe, "a", (1,), without=True)
    lcmlora.accelerate(pipe)  # then each waits for the other
    assert len(lcmlora.sweep_steps(pipe, "a", (1,), without={"steps": 1}, **SMALL).images) == 2


def test_a_text_encoder_that_another_unet_s_pipe_relies_on_stays_as_it_is(tmp_path, lcm_file):
    one, other = sd_pipe(), sd_pipe()
    other.text_encoder = one.text_encoder
    ink = tiny_lora(one, tmp_path / "ink.safetensors", text=True)
    for pipe in (one, other):
        lcmlora.accelerate(pipe, lora=lcm_file(pipe), styles={"ink": ink})
    with pytest.raises(lcmlora.PipelineError, match="text_encoder is shared with an accelerated pipe of another UNet"):
        lcmlora.compare(one, "a", base_steps=(1,), lcm_steps=(1,), **SMALL)


def test_ctrl_c_in_a_metric_costs_no_picture(pipe):
    def stopped(image, row, reference):
        raise KeyboardInterrupt

    with pytest.warns(lcmlora.LcmLoraWarning, match="no metrics"):
        assert lcmlora.sweep_steps(pipe, "a", (1,), metrics={"mine": stopped}, **SMALL).images


def test_a_metric_that_fails_costs_no_picture(pipe):
    def fails(image, row, reference):
        raise ZeroDivisionError("oh")

    with pytest.warns(lcmlora.LcmLoraWarning, match="no metrics, as one of them failed: ZeroDivisionError: oh"):
        sheet = lcmlora.sweep_steps(pipe, "a", (1,), metrics={"mine": fails}, **SMALL)
    assert len(sheet.images) == 1
    sheet = lcmlora.sweep_steps(pipe, "a", (1, 2), metrics={"far": distance()}, **SMALL)
    assert [row["far"] > 0 for row in sheet.rows] == [True, False]
    batches = passes(pipe)
    with pytest.raises(lcmlora.CallError, match="metrics: 'far' is 'distance'"):
        lcmlora.sweep_steps(pipe, "a", metrics={"far": "distance"}, **SMALL)
    assert batches == []
