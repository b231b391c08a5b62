"""Many pictures from rows: what is drawn, refused, resumed, and made again."""

from __future__ import annotations

import copy
import csv
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

import lcmlora
from conftest import assert_same, snapshot
from lcmlora import DataError, LcmLoraError, LcmLoraWarning, PipelineError, Style, again, generate, pictures, status
from lcmlora.generating.reading import seeds_of, size_of, styles_of
from lcmlora.pictures import file_digest
from lcmlora.testing import tiny_lora, tiny_pipeline, tiny_vae
from lcmlora.transition.records import pipe_record_of
from tiny_pipelines import build, picture

PROMPTS = ("a fox", "an owl", "a rocket", "狐")


def to_q(name: str) -> bool:
    return name.endswith("to_q")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a tiny pipeline, its LCM-LoRA and two styles."""
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "pipe")
    tiny_lora(pipe, folder / "lcm.safetensors")
    tiny_lora(pipe, folder / "ink.safetensors", only=to_q, text=True, seed=2)
    tiny_lora(pipe, folder / "chalk.safetensors", only=to_q, seed=3)
    return folder


@pytest.fixture(scope="module")
def loaded(model):
    pipe = StableDiffusionPipeline.from_pretrained(model / "pipe")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def plain(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture
def pipe(plain, model):
    return lcmlora.accelerate(plain, lora=model / "lcm.safetensors")


def pixels(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): pictures.load(file)[0].tobytes() for file in folder.rglob("*.png")}


def alone(pipe, prompt: str, seed: int = 0, **call) -> bytes:
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0].tobytes()


# -- what is drawn ----------------------------------------------------------------------------------------------------


def test_each_picture_is_that_of_a_single_call(pipe, tmp_path, model):
    ink = model / "ink.safetensors"
    rows = [
        {"prompt": "a fox", "seed": "1-2"},
        {"prompt": "a fox", "styles": {"ink": 0.7}, "name": "with/ink"},
        "an owl",
        {"prompt": "a fox", "styles": {}, "steps": 2, "guidance": 1.5, "negative": "x", "size": "24x16"},
        {"prompt": "a fox", "seed": 2, "styles": "ink"},
    ]
    made = generate(pipe, rows, tmp_path, styles={"ink": Style(ink, 0.4)})
    names = [file.relative_to(tmp_path).as_posix() for file in made.files]
    assert names == ["0001-1.png", "0001-2.png", "with/ink.png", "0003-0.png", "0004-0.png", "0005-2.png"]
    assert (made.already, made.failed, made.interrupted) == (0, (), False)
    assert status(pipe).styles == {}, "the pipe's own styles come back"
    found = pixels(tmp_path)
    assert len(set(found.values())) == 5, "rows 1 and 5 are one picture twice"
    assert found["0004-0.png"] == alone(
        pipe, "a fox", num_inference_steps=2, guidance_scale=1.5, negative_prompt="x", width=24, height=16
    )
    lcmlora.set_styles(pipe, {"ink": Style(ink, 0.4)})
    assert found["0001-2.png"] == found["0005-2.png"] == alone(pipe, "a fox", 2)
    assert found["0003-0.png"] == alone(pipe, "an owl")
    lcmlora.set_styles(pipe, {"ink": 0.7})
    assert found["with/ink.png"] == alone(pipe, "a fox")
    assert pictures.record_of(tmp_path / "with/ink.png")["status"]["styles"] == {"ink": 0.7}


def test_a_style_set_is_merged_once_and_the_order_of_rows_changes_nothing(pipe, tmp_path, model, monkeypatch):
    styles = {name: model / f"{name}.safetensors" for name in ("ink", "chalk")}
    lcmlora.accelerate(pipe, styles=styles)
    rows = [{"prompt": p, "name": f"{p}-{s}", "styles": s} for p in PROMPTS for s in ("ink:0.5", "chalk:1", "")]
    merges = []
    real = lcmlora.generating.loop.set_styles
    monkeypatch.setattr(lcmlora.generating.loop, "set_styles", lambda *given: merges.append(given) or real(*given))
    rows.append({"prompt": "x", "name": "own"})
    generate(pipe, rows, tmp_path / "a")
    assert len(merges) == 3
    assert pixels(tmp_path / "a")["own.png"] == alone(pipe, "x"), "with the styles that the pipe has"
    assert status(pipe).styles == {"ink": 0.8, "chalk": 0.8}
    generate(pipe, rows[::-1], tmp_path / "b")
    assert pixels(tmp_path / "a") == pixels(tmp_path / "b")


def test_a_plain_pipe_is_drawn_with_as_it_is(plain, tmp_path):
    before = snapshot(plain)
    made = generate(plain, ["a fox"], tmp_path, call={"steps": 3})
    record = pictures.record_of(made.files[0])
    assert record["settings"] == {"num_inference_steps": 3, "guidance_scale": 7.5}
    assert record["accelerated"] is None
    assert pixels(tmp_path)["0001-0.png"] == alone(plain, "a fox", num_inference_steps=3)
    assert_same(before, snapshot(plain))
    with pytest.raises(PipelineError, match="accelerate"):
        generate(plain, ["a fox"], tmp_path, styles={})
    with pytest.warns(LcmLoraWarning, match="accelerate"):
        generate(plain, [{"prompt": "a fox", "styles": {"ink": 1}}], tmp_path)


def test_a_pipeline_without_a_unet_is_drawn_with_too(tmp_path):
    class Plain(DiffusionPipeline):
        def __init__(self):
            super().__init__()

        def __call__(self, prompt, num_inference_steps=3, generator=None):
            pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
            return ImagePipelineOutput([Image.fromarray(pixels)])

    made = generate(Plain(), ["x", "y"], tmp_path, call={"steps": 1})
    assert len(made.files) == 2
    assert generate(Plain(), ["x", "y"], tmp_path, call={"steps": 1}).already == 2
    assert again(made.files[0], Plain()).tobytes() == pictures.load(made.files[0])[0].tobytes()


def test_batches_are_of_equal_settings_and_stay_the_same_when_resumed(pipe, tmp_path):
    rows = [{"prompt": p, "negative": p, "guidance": 1.5} for p in PROMPTS] + [{"prompt": "a fox", "steps": 2}]
    made = generate(pipe, rows, tmp_path / "a", batch_size=3)
    records = [pictures.record_of(file) for file in made.files]
    assert [record["batch"] for record in records] == [3, 3, 3, 1, 1]
    generate(pipe, rows, tmp_path / "b", batch_size=3)
    for name in ("0002-0.png", "0004-0.png"):
        (tmp_path / "b" / name).unlink()
    resumed = generate(pipe, rows, tmp_path / "b", batch_size=3)
    assert resumed.already == 3
    assert pixels(tmp_path / "a") == pixels(tmp_path / "b")
    assert pictures.record_of(tmp_path / "b" / "0002-0.png")["batch"] == 3


def test_pictures_of_rows_are_turned_fitted_and_told_by_their_content(plain, model, tmp_path):
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    lcmlora.accelerate(pipe, lora=model / "lcm.safetensors")
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    upright = picture().resize((32, 16))
    upright.save(tmp_path / "turned.png", exif=exif)
    row = {"prompt": "a fox", "image": "turned.png", "strength": 0.5, "size": "16x24"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    made = generate(pipe, tmp_path / "rows.jsonl", tmp_path / "out")
    image = pictures.load(made.files[0])[0]
    assert image.size == (16, 24)
    assert pictures.record_of(made.files[0])["files"]["image"]["sha256"] == file_digest(tmp_path / "turned.png")
    assert again(made.files[0]).tobytes() == image.tobytes()
    lcmlora.restore(pipe)
    assert again(made.files[0], pipe).tobytes() == image.tobytes()
    upright.save(tmp_path / "turned.png")
    with pytest.raises(DataError, match=r"turned.png is not what it was"):
        again(made.files[0], pipe)
    with pytest.warns(LcmLoraWarning, match="other settings"):
        generate(lcmlora.accelerate(pipe, lora=model / "lcm.safetensors"), tmp_path / "rows.jsonl", tmp_path / "out")


def test_what_json_has_no_tuples_for(tmp_path):
    pipe = tiny_pipeline("sdxl")
    row = {"prompt": "x", "steps": 1, "original_size": [64, 32], "crops_coords_top_left": [8, 0]}
    (made,) = generate(pipe, [row], tmp_path).files
    call = {"num_inference_steps": 1, "original_size": (64, 32), "crops_coords_top_left": (8, 0)}
    assert again(made, pipe).tobytes() == pictures.load(made)[0].tobytes() == alone(pipe, "x", **call)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(pipe, tmp_path):
    rows = [{"prompt": "a fox, red", "seed": "1-2", "steps": 2}, {"prompt": "12", "negative_prompt": ""}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    with (tmp_path / "c.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "seed", "steps", "negative_prompt"], delimiter=";")
        table.writeheader()
        table.writerows(rows)
    found = [pixels(generate(pipe, f, tmp_path / f.suffix[1:]).out) for f in sorted(tmp_path.glob("?.*"))]
    assert len(found[0]) == 3
    assert found[0] == found[1] == found[2]
    (tmp_path / "d.txt").write_text("a fox\n\n 狐 \n", encoding="utf-8")
    assert len(generate(pipe, str(tmp_path / "d.txt"), tmp_path / "txt").files) == 2


BAD = {
    "stpes": ({"stpes": 3}, r"no 'stpes'\. Is steps meant\?"),
    "steps": ({"steps": "4"}, "num_inference_steps='4': a whole number"),
    "too many steps": ({"steps": 99}, "num_inference_steps=99"),
    "twice": ({"steps": 4, "num_inference_steps": 4}, "given twice"),
    "guidance": ({"guidance": float("nan")}, "guidance_scale=nan: a number"),
    "seed": ({"seed": -1}, "seed=-1: a whole number from 0"),
    "seeds": ({"seed": "8-1"}, "no range"),
    "size": ({"size": "17x16"}, "width=17: a whole number, a multiple of 8"),
    "size as text": ({"size": "large"}, "such as '512x768'"),
    "prompt": ({"prompt": ["a", "b"]}, "one text is expected"),
    "half a character": ({"prompt": "\ud800"}, "one text is expected"),
    "no seed": ({"seed": []}, r"seed=\[\]: a whole number"),
    "no prompt": ({"prompt": None}, "no prompt"),
    "generator": ({"generator": 1}, "give seed"),
    "outside": ({"name": "../x"}, "would leave the folder"),
    "absolute": ({"name": "/x"}, "would leave the folder"),
    "jpeg": ({"name": "x.jpg"}, "only PNG files"),
    "long": ({"name": "x" * 300}, "too long"),
    "taken": ({"name": "Good"}, "the file of row 1 already"),
    "style": ({"styles": {"paper": 0.5}}, "no style 'paper'"),
    "style alone": ({"styles": "paper"}, "style 'paper' is not known here"),
    "style file": ({"styles": {"paper": "none.safetensors"}}, "none.safetensors"),
    "picture": ({"image": "none.png"}, "no 'image'"),
    "picture in memory": ({"image": picture()}, "no 'image'.*AutoPipelineForImage2Image"),
    "number as text": ({"styles": {"paper": "0.5"}}, "Is the number 0.5 meant, a weight"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_told_and_does_not_stop_the_rest(what, pipe, tmp_path):
    row, words = BAD[what]
    rows = [{"prompt": "a fox", "name": "good", "steps": 1}, {"prompt": "a fox", "steps": 1, **row}]
    if "prompt" in row or what in ("steps", "twice", "too many steps"):
        rows[1] = {"prompt": "a fox", **row}
    with pytest.warns(LcmLoraWarning, match=words):
        made = generate(pipe, rows, tmp_path / "out")
    assert [one.row for one in made.failed] == [2]
    assert made.files == (tmp_path / "out" / "good.png",)
    assert sorted(tmp_path.rglob("*.png")) == list(made.files)
    with pytest.raises(DataError, match="row 2: "):
        generate(pipe, rows, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_style_that_is_off_wants_a_weight_and_what_status_gives_is_taken(plain, tmp_path, model):
    plain.load_lora_weights(str(model), weight_name="chalk.safetensors", adapter_name="own")
    plain.set_adapters("own", {"unet": {"down": 0.3, "up": 1.0}})
    styles = {"3d": Style(model / "ink.safetensors", 0)}
    pipe = lcmlora.accelerate(plain, lora=model / "lcm.safetensors")
    there = status(pipe).styles
    lcmlora.set_styles(pipe, {**there, **styles})
    with pytest.warns(LcmLoraWarning, match="style '3d' is off here: give its weight, 3d:0.8"):
        made = generate(pipe, [{"prompt": "a fox", "styles": "3d"}], tmp_path / "off")
    assert [one.refused for one in made.failed] == [True]
    rows = [{"prompt": "a fox", "styles": given} for given in (dict(there), "own", "own:0.3", "3d:0.5,own")]
    made = generate(pipe, rows, tmp_path / "rows", styles=there)
    assert [pictures.record_of(file)["status"]["styles"] for file in made.files] == [
        json.loads(json.dumps(one)) for one in (there, there, {"own": 0.3}, {"3d": 0.5, **there})
    ]


def test_lines_and_pictures_that_cannot_be_read_are_bad_rows(plain, tmp_path):
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    (tmp_path / "text.png").write_text("no picture")
    rows = ['{"prompt": "x"', '["x"]', '{"prompt": "x", "image": "text.png"}', '{"prompt": "x", "image": "none.png"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    with pytest.warns(LcmLoraWarning, match="4 pictures of 4 rows"):
        made = generate(pipe, tmp_path / "rows.jsonl", tmp_path / "out")
    for one, words in zip(made.failed, ("line 1 of", "is no row", "can't be read", "no such file"), strict=True):
        assert words in one.reason


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("none.jsonl", "can't be read: No such file"),
        ("rows.xlsx", "a .jsonl, .json, .csv"),
        ({"prompt": "x"}, "dicts or a file of them"),
        (3, "dicts or a file of them"),
    ],
)
def test_rows_that_are_none_are_refused(rows, words, pipe, tmp_path):
    with pytest.raises(DataError, match=words):
        generate(pipe, rows, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't be written to"):
        generate(pipe, ["x"], tmp_path / "file" / "out")
    with pytest.raises(DataError, match="batch_size=0"):
        generate(pipe, ["x"], tmp_path, batch_size=0)


def test_a_run_that_is_refused_leaves_no_folder(pipe, tmp_path):
    with pytest.warns(LcmLoraWarning, match="can't be drawn"):
        generate(pipe, [{"prompt": "x", "steps": 0}], tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="it is a file, and a folder is expected"):
        generate(pipe, ["x"], tmp_path / "file")


def test_tables_and_lines_as_people_have_them(plain, tmp_path):
    pipe = StableDiffusionInpaintPipeline.from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    picture().save(tmp_path / "a.png")
    head = "prompt;negative;image;mask_image;padding_mask_crop;size;steps"
    (tmp_path / "a.csv").write_text(f"{head}\n1\u20282;2;a.png;a.png;4;16x16;2\n;;;;;;\n")
    rows = [json.dumps({"prompt": "1\u2028\x852", "image": "a.png", "mask_image": "a.png"}, ensure_ascii=False)] * 2
    (tmp_path / "b.jsonl").write_text("\n\n".join(rows))
    made = generate(pipe, tmp_path / "a.csv", tmp_path / "a")
    record = pictures.record_of(made.files[0])
    assert (record["prompt"], record["settings"]["negative_prompt"]) == ("1\u20282", "2")
    assert record["settings"]["padding_mask_crop"] == 4
    assert not made.failed
    assert len(generate(pipe, tmp_path / "b.jsonl", tmp_path / "b", call={"steps": 2, "size": "16x16"}).files) == 2
    (tmp_path / "c.csv").write_text("prompt,seed,seed\na,1,2\n")
    (tmp_path / "d.csv").write_text("prompt\n" + "a" * 200_000)
    for name, words in {"c": "several columns of one name: seed", "d": "field larger"}.items():
        with pytest.raises(DataError, match=words):
            generate(pipe, tmp_path / f"{name}.csv", tmp_path / name)


def test_the_shell_s_words(tmp_path):
    (tmp_path / "ink.safetensors").write_text("")
    assert seeds_of("1-3,7") == [1, 2, 3, 7]
    assert size_of(" 512x768") == (512, 768)
    found = styles_of("ink=ink.safetensors:0.5, chalk:1, paper,x=a/b", tmp_path)
    ink = Style(tmp_path / "ink.safetensors", 0.5)
    assert found == {"ink": ink, "chalk": 1.0, "paper": None, "x": Style("a/b")}
    assert styles_of({"ink": {"source": "ink.safetensors", "weight": 0.5}}, tmp_path) == {"ink": ink}
    assert styles_of("none", tmp_path) == styles_of({}, tmp_path) == {}


def test_pipelines_of_films_and_without_a_seed_are_refused(tmp_path):
    with pytest.raises(PipelineError, match="draws films"):
        generate(build(AnimateDiffPipeline, {}), ["x"], tmp_path)
    with pytest.raises(PipelineError, match="has no __call__"):
        generate(object(), ["x"], tmp_path)


# -- failures, stops, resumption --------------------------------------------------------------------------------------


def failing(pipe, word, error):
    """The pipe's text encoder raises at a word of one letter."""

    token = pipe.tokenizer(word).input_ids[1]

    def look(module, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        if token in ids:
            raise error

    return pipe.text_encoder.register_forward_pre_hook(look, with_kwargs=True)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_row_that_fails_in_the_call_does_not_stop_the_rest(batch_size, pipe, tmp_path):
    hook = failing(pipe, "q", ValueError("no owls"))
    with pytest.warns(LcmLoraWarning, match="row 2 was not drawn: ValueError: no owls"):
        made = generate(pipe, ("a fox", "q", "a rocket"), tmp_path, batch_size=batch_size)
    hook.remove()
    assert [one[:2] for one in made.failed] == [(2, "0002-0.png")]
    assert [file.name for file in made.files] == ["0001-0.png", "0003-0.png"]


def test_what_failed_says_its_line_and_whether_another_try_may_help(pipe, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,steps\na fox,1\n,\nq,1\na rocket,0\n")
    hook = failing(pipe, "q", RuntimeError("out of memory"))
    with pytest.warns(LcmLoraWarning) as told:
        made = generate(pipe, tmp_path / "rows.csv", tmp_path / "out")
    hook.remove()
    assert [(one.row, one.line, one.refused) for one in made.failed] == [(2, 4, False), (3, 5, True)]
    assert made.to_dict()["failed"][0]["refused"] is False
    words = [str(one.message) for one in told]
    assert any("Row 3 (line 5): num_inference_steps=0" in one for one in words)
    assert "row 2 (line 4) was not drawn: RuntimeError: out of memory" in words


def test_what_was_made_stands_on_one_sheet(pipe, tmp_path, model):
    lcmlora.accelerate(pipe, styles={"ink": model / "ink.safetensors"})
    call = {"steps": 1, "size": "16x16"}
    rows = [
        {"prompt": "a fox", "seed": "1-2"},
        {"prompt": "an owl", "seed": 1},
        {"prompt": "an owl", "styles": "none"},
    ]
    made = generate(pipe, rows, tmp_path, call=call)
    sheet = made.sheet("Animals")
    assert [line.prompt for line in sheet.lines] == ["a fox", "an owl"]
    assert sheet.columns == ("seed 1, ink 0.8", "seed 2, ink 0.8", "seed 0")
    assert [[cell is not None for cell in line] for line in sheet.cells] == [[True, True, False], [True, False, True]]
    assert [image.tobytes() for image in sheet.images] == [pictures.load(file)[0].tobytes() for file in made.files]
    assert sheet.rows[0]["file"] == str(made.files[0])
    sheet.to_html(tmp_path / "page.html")
    sheet.save(tmp_path / "sheets")


def test_pictures_that_no_record_tells_apart_stand_beside_each_other(pipe, tmp_path):
    rows = [{"prompt": "a fox", "name": name, "steps": 1} for name in ("one", "two")]
    assert generate(pipe, rows, tmp_path).sheet().columns == ("one", "two")
    with pytest.raises(DataError, match="no picture was drawn"):
        generate(pipe, [], tmp_path).sheet()


def test_ctrl_c_keeps_what_is_done_and_gives_the_pipe_back(pipe, tmp_path, model):
    lcmlora.accelerate(pipe, styles={"ink": model / "ink.safetensors"})
    hook = failing(pipe, "q", KeyboardInterrupt())
    rows = [{"prompt": prompt, "styles": "ink:0.3"} for prompt in ("a fox", "q", "a rocket")]
    with pytest.warns(LcmLoraWarning, match="1 of 3 pictures"):
        made = generate(pipe, rows, tmp_path)
    hook.remove()
    assert made.interrupted
    assert "interrupted" in repr(made)
    assert len(made.files) == 1
    assert status(pipe).styles == {"ink": 0.8}
    rest = generate(pipe, rows, tmp_path)
    assert (len(rest.files), rest.already) == (3, 1)


def test_what_is_there_already_costs_no_call_and_no_merge(pipe, tmp_path, model, monkeypatch):
    rows = [{"prompt": p, "styles": {"ink": {"source": str(model / "ink.safetensors"), "weight": 0.5}}} for p in "ab"]
    generate(pipe, rows, tmp_path)
    for name in ("drawn", "set_styles"):
        monkeypatch.setattr(f"lcmlora.generating.loop.{name}", None)
    assert generate(pipe, rows, tmp_path).already == 2
    lcmlora.accelerate(pipe, steps=6)
    rows = [{**row, "steps": 4} for row in rows]
    assert generate(pipe, rows, tmp_path).already == 2, "what ran is the same"


def test_nothing_of_another_origin_is_overwritten_unasked(pipe, tmp_path):
    generate(pipe, ["a fox"], tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "0002-0.png")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.warns(LcmLoraWarning, match="other settings: give another folder or name, or overwrite=True") as told:
        made = generate(pipe, ["an owl", "an owl"], tmp_path)
    assert "was not made by lcmlora" in str(told[0].message)
    assert (len(made.failed), made.files) == (2, ())
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    made = generate(pipe, ["an owl", "an owl"], tmp_path, overwrite=True)
    assert len(made.files) == 2
    assert set(pixels(tmp_path).values()) == {alone(pipe, "an owl")}
    assert generate(pipe, ["an owl"], tmp_path, resume=False).already == 0


@pytest.mark.parametrize("change", ["vae", "other vae", "weights", "callback"])
def test_what_else_draws_a_picture_tells_it(change, plain, tmp_path, model):
    call = {"callback_on_step_end": lambda pipe, step, timestep, given: given} if change == "callback" else {}
    settings = {"vae": tiny_vae()} if change == "other vae" else {}
    if change != "weights":
        lcmlora.accelerate(plain, lora=model / "lcm.safetensors", **settings)
    generate(plain, ["a"], tmp_path, call={"steps": 2, **call})
    if change == "vae":
        plain.vae = tiny_vae()
    elif change == "other vae":
        lcmlora.accelerate(plain, vae=tiny_vae())
    elif change == "weights":  # as where a LoRA is fused in
        plain.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data.mul_(1.3)
    words = "callback_on_step_end was the same" if change == "callback" else "other settings"
    with pytest.warns(LcmLoraWarning, match=words):
        assert generate(plain, ["a"], tmp_path, call={"steps": 2, **call}).files == ()


def test_a_file_that_another_process_is_writing_is_left_alone(pipe, tmp_path):
    ours, theirs, gone = (tmp_path / f".0001-0.png.{pid}-00ff.partial" for pid in (os.getpid(), os.getppid(), 2**31))
    for file in (ours, theirs, gone):
        file.write_text("")
    generate(pipe, ["a"], tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [theirs.name, "0001-0.png"]


def test_a_disk_that_is_full_ends_the_run_in_a_sentence(pipe, tmp_path, monkeypatch):
    generate(pipe, ["a fox"], tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"the disk is full\. What is done is kept"):
        generate(pipe, ["a fox", "an owl"], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["0001-0.png"]


def test_one_bar_and_the_pipe_s_own_setting(pipe, tmp_path, capsys):
    pipe.set_progress_bar_config(disable=False)
    generate(pipe, PROMPTS, tmp_path / "a")
    shown = capsys.readouterr().err
    assert "pictures: 100%" in shown
    assert shown.count("\r") < 8, "a bar each would have more lines"
    pipe("a fox")
    assert "4/4" in capsys.readouterr().err
    generate(pipe, PROMPTS, tmp_path / "b", progress=False)
    pipe.set_progress_bar_config(disable=True)
    generate(pipe, PROMPTS, tmp_path / "c")
    assert capsys.readouterr().err == ""


# -- again ------------------------------------------------------------------------------------------------------------


def test_a_picture_again_from_its_own_png(plain, tmp_path, model):
    plain.scheduler = EulerDiscreteScheduler.from_config(plain.scheduler.config)
    before = generate(plain, [{"prompt": "a fox", "steps": 3}], tmp_path / "plain")
    lcmlora.accelerate(plain, lora=model / "lcm.safetensors", weight=0.9, fuse=False)
    rows = [{"prompt": "狐", "seed": 5, "styles": {"ink": {"source": str(model / "ink.safetensors"), "weight": 0.3}}}]
    rows += [{"prompt": "a fox", "guidance": 1.5, "negative": "x"}]
    made = generate(plain, rows, tmp_path / "fast")
    lcmlora.restore(plain)
    for file in (*before.files, *made.files):
        image = pictures.load(file)[0].tobytes()
        assert again(file).tobytes() == image
        found = snapshot(plain)
        assert again(file, plain).tobytes() == image
        assert_same(found, snapshot(plain))


def test_again_trusts_the_file_of_the_record_whatever_its_name_says(plain, tmp_path, model):
    file = tiny_lora(plain, tmp_path / "acme-lightning-2step.safetensors")
    with pytest.warns(LcmLoraWarning, match="is driven as"):
        lcmlora.accelerate(plain, lora=file)
    made = generate(plain, ["a fox"], tmp_path / "out")
    again(made.files[0], lcmlora.restore(plain))  # warnings are errors here


def test_again_says_what_is_missing(pipe, plain, tmp_path, model):
    own = tiny_lora(pipe, tmp_path / "own.safetensors", only=to_q)
    (made,) = generate(pipe, [{"prompt": "x", "styles": {"own": str(own)}}], tmp_path / "out").files
    with pytest.raises(PipelineError, match="restore"):
        again(made, pipe)
    lcmlora.restore(pipe)
    tiny_lora(pipe, own, only=to_q, seed=9)
    with pytest.raises(DataError, match=r"own.safetensors is not what it was: its SHA-256 began with \w{12}"):
        again(made, pipe)
    own.unlink()
    with pytest.raises(DataError, match=r"own\.safetensors is gone"):
        again(made)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    (made,) = generate(pipe, ["x"], tmp_path / "plain", call={"steps": 1}).files
    with pytest.raises(PipelineError, match="made by a StableDiffusionPipeline"):
        again(made, other)
    latents = torch.zeros(1, 4, 8, 8)
    (made,) = generate(pipe, [{"prompt": "x", "latents": latents, "steps": 1}], tmp_path / "memory").files
    with pytest.raises(DataError, match="latents given in memory"):
        again(made, pipe)
    nowhere = tiny_pipeline()
    (made,) = generate(nowhere, ["x"], tmp_path / "nowhere", call={"steps": 1}).files
    with pytest.raises(DataError, match="does not say which model"):
        again(made)
    assert again(made, nowhere).tobytes() == pictures.load(made)[0].tobytes()
    nowhere.load_lora_weights(str(model / "ink.safetensors"), adapter_name="ink")
    (made,) = generate(nowhere, ["x"], tmp_path / "adapter", call={"steps": 1}).files
    with pytest.raises(DataError, match="came from no file that is known: ink"):
        again(made, nowhere)


def test_another_model_under_the_same_name_is_told(pipe, tmp_path):
    (made,) = generate(pipe, ["x"], tmp_path).files
    pipe.unet.conv_norm_out.bias.data += 1
    with pytest.warns(LcmLoraWarning, match="made with other settings"):
        generate(pipe, ["x"], tmp_path)
    lcmlora.restore(pipe)
    with pytest.raises(PipelineError, match="of other weights"):
        again(made, pipe)


def test_again_tells_of_other_versions_and_batches(pipe, tmp_path, monkeypatch):
    (made, _) = generate(pipe, ["x", "y"], tmp_path, batch_size=2).files
    image, record = pictures.load(made)
    record["versions"]["torch"] = "1.0"
    pictures.save(image, made, record)
    lcmlora.restore(pipe)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again(made, pipe)
    ours = [str(one.message) for one in told if issubclass(one.category, LcmLoraWarning)]
    assert ["torch 1.0 (now" in ours[0], "batch of 2" in ours[1]] == [True, True]
    for change in ({"seed": "1"}, {"dtype": "nonsense"}, {"files": None}):
        pictures.save(image, made, {**record, **change})
        with pytest.raises(DataError, match="is damaged"):
            again(made, pipe)
    pictures.save(image, made, {"prompt": "x"})
    with pytest.raises(DataError, match="was not written by generate"):
        again(made, pipe)


@pytest.mark.parametrize("variant", ["base", "chalk"])
def test_the_embedded_model_is_named_and_found_again(variant, tmp_path):
    pipe = lcmlora.accelerate(lcmlora.load_pocket(variant))
    (made,) = generate(pipe, ["a fox on a teal background"], tmp_path, call={"steps": 1}, progress=False).files
    assert pictures.record_of(made)["model"] == {"base": "pocket", "chalk": "pocket:chalk"}[variant]
    assert again(made).tobytes() == pictures.load(made)[0].tobytes()


def test_a_baked_pipe_again(pipe, tmp_path):
    baked = lcmlora.load_baked(lcmlora.bake(pipe, tmp_path / "baked"))
    (made,) = generate(baked, ["x"], tmp_path / "out", progress=False).files
    assert again(made).tobytes() == again(made, baked).tobytes() == pictures.load(made)[0].tobytes()
    with pytest.raises(PipelineError, match="restore"):
        again(made, pipe)
    with pytest.warns(LcmLoraWarning, match="this pipe was baked: its styles are in its weights"):
        generate(baked, [{"prompt": "x", "styles": {}}], tmp_path / "styled", progress=False)


@pytest.mark.parametrize("enforced", [True, False])
def test_a_picture_of_a_baked_models_other_pipeline_again(enforced, pipe, tmp_path):
    """The model is loaded as text to image: the pipe of its parts has to run the steps that the picture had."""
    redraw = lcmlora.load_baked(lcmlora.bake(pipe, tmp_path / "baked"), kind="img2img")
    lcmlora.accelerate(redraw, enforce_inference_steps=enforced)
    picture().save(tmp_path / "a.png")
    row = {"prompt": "x", "image": tmp_path / "a.png", "strength": 0.5}
    (made,) = generate(redraw, [row], tmp_path / "out", progress=False).files
    assert again(made).tobytes() == pictures.load(made)[0].tobytes()
    lcmlora.accelerate(redraw, enforce_inference_steps=not enforced)
    assert again(made, redraw).tobytes() == pictures.load(made)[0].tobytes()
    assert pipe_record_of(redraw).settings.policy.enforce_inference_steps is not enforced


def test_another_vae_in_its_folder_and_weights_that_are_others_are_told(plain, tmp_path, model):
    tiny_vae().save_pretrained(tmp_path / "vae")
    plain_one = generate(plain, ["a"], tmp_path / "plain", call={"steps": 2}).files[0]
    made = generate(
        lcmlora.accelerate(plain, lora=model / "lcm.safetensors", vae=tmp_path / "vae"), ["a"], tmp_path / "out"
    ).files[0]
    assert again(made).tobytes() == pictures.load(made)[0].tobytes()
    tiny_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(PipelineError, match="which has other weights now"):
        again(made)
    lcmlora.restore(plain).unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data.mul_(1.3)
    with pytest.warns(LcmLoraWarning, match="some weights are others"):
        again(plain_one, plain)


# -- several processes, and one that is killed -----------------------------------------------------------------------


CHILD = """
import os, sys
from pathlib import Path
import lcmlora
from lcmlora.generating import loop

model, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
from diffusers import StableDiffusionPipeline
pipe = lcmlora.accelerate(StableDiffusionPipeline.from_pretrained(model / "pipe"), lora=model / "lcm.safetensors")
rows = [{"prompt": f"a {n}", "styles": f"ink={model / 'ink.safetensors'}:{n % 2}"} for n in range(12)]
if kind == "halting":
    replace, count = Path.replace, []
    def halting(path, target):
        count.append(path)
        if len(count) == 6:
            print("now", flush=True)
            sys.stdin.read()
        return replace(path, target)
    Path.replace = halting
calls, real = [], loop.drawn
loop.drawn = lambda *given: calls.append(given) or real(*given)
made = lcmlora.generate(pipe, rows + [{"prompt": "x", "seed": "?"}] * (kind == "one of two"), out, progress=False)
print(len(calls), [one.row for one in made.failed], len(made.files), made.already)
"""


def child(model: Path, out: Path, kind: str, **environment: str) -> subprocess.Popen[str]:
    """A process that draws twelve pictures: one that stops while it writes the sixth, or one of two."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    source = str(Path(lcmlora.__file__).parent.parent)
    here = {**os.environ, **environment, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(model), str(out), kind], env=here, text=True, **pipes)


def twelve(model: Path) -> list[dict[str, str]]:
    ink = model / "ink.safetensors"
    return [{"prompt": f"a {n}", "styles": f"ink={ink}:{n % 2}"} for n in range(12)]


def test_a_run_killed_in_the_middle_goes_on(pipe, model, tmp_path):
    """kill -9 while a file is being written: afterwards each picture is there once, and whole."""
    with child(model, tmp_path / "out", "halting") as process:
        assert process.stdout.readline() == "now\n", process.stderr.read()
        process.kill()
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(left) == 6
    assert left[0].endswith(".partial")
    done = generate(pipe, twelve(model), tmp_path / "out")
    assert (done.already, len(done.files)) == (5, 12)
    assert sorted((tmp_path / "out").iterdir()) == list(done.files)
    assert len(pixels(tmp_path / "out")) == 12


def test_two_processes_draw_what_one_draws(pipe, model, tmp_path):
    pytest.importorskip("accelerate")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    pair = [child(model, tmp_path / "two", "one of two", **place, RANK=str(n), LOCAL_RANK=str(n)) for n in range(2)]
    said = [process.communicate(timeout=300) for process in pair]
    assert [out for out, _ in said] == ["6 [13] 12 0\n"] * 2
    assert ["LcmLoraWarning" in error for _, error in said] == [True, False], "one process tells of the bad row"
    generate(pipe, twelve(model), tmp_path / "one")
    assert pixels(tmp_path / "one") == pixels(tmp_path / "two")


def test_a_state_that_knows_of_fewer_processes_is_refused(pipe, tmp_path, monkeypatch):
    """Each process would draw everything: PartialState() on a processor, made before, ignores the launcher."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.PartialState()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LcmLoraError, match=r"started 2 processes, .* for 1: PartialState\(cpu=True\) is expected"):
        generate(pipe, ["a fox"], tmp_path / "out")
