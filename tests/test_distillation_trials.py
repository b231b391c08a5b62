"""Distillation where users take it: odd teachers, torch in other states, folders with a past, odd data."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny, DDIMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lcmlora
from conftest import assert_same, sd_pipe, snapshot, tiny_unet
from distilling import CONFIG, PROMPTS
from lcmlora.distillation import DistillConfig, distill, loop
from lcmlora.distillation.batches import Batches
from lcmlora.distillation.data import Example, Pictures, ResumableBatchSampler, read
from lcmlora.distillation.teacher import Teacher
from lcmlora.writing import whole


@pytest.fixture(autouse=True)
def unrehearsed(monkeypatch):
    """Half of a tiny run is its rehearsal, which has tests of its own."""
    monkeypatch.setattr(loop._Run, "rehearse", lambda self: None)


def run(output, pipe=None, data=PROMPTS, **settings):
    return distill(
        pipe or sd_pipe(), data, output, DistillConfig(**{**CONFIG, "steps": 2, **settings}), progress=False
    )


def assert_equal_files(one, other):
    one, other = load_file(one), load_file(other)
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What a run makes where nothing is special."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "rehearse", lambda self: None)
        return run(tmp_path_factory.mktemp("plain"), merged="off")


# -- teachers ---------------------------------------------------------------------------------------------------------


def without(part):
    pipe = sd_pipe()
    setattr(pipe, part, None)
    return pipe


def wrapped():
    pipe = sd_pipe()
    pipe.unet = torch.compile(pipe.unet)
    return pipe


def scheduled(**settings):
    pipe = sd_pipe()
    pipe.scheduler = DDIMScheduler(beta_schedule="scaled_linear", **settings)
    return pipe


def offloaded():
    pipe = sd_pipe()
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe


def inferring():
    with torch.inference_mode():
        return sd_pipe()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: without("vae"), "as it has no vae"),
        (lambda: without("tokenizer"), "no prediction for a prompt alone"),
        (lambda: sd_pipe(unet=tiny_unet(class_embed_type="timestep")), "a prompt alone: class_labels"),
        (lambda: scheduled(num_train_timesteps=500), "has 500 timesteps; 1000 are expected"),
        (lambda: scheduled(rescale_betas_zero_snr=True), "ends in pure noise"),
        (wrapped, "_orig_mod"),
        (offloaded, "remove_all_hooks"),
        (inferring, "load it outside"),
        (lambda: sd_pipe().to(dtype=torch.float16), r"mixed_precision='bf16', but the teacher is torch\.float16"),
    ],
)  # fmt: skip
def test_teachers_that_give_nothing_to_learn_are_refused_in_a_sentence(make, words, tmp_path):
    with pytest.raises(lcmlora.PipelineError, match=words) as refused:
        run(tmp_path / "out", make(), mixed_precision="bf16")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_compiled_blocks_and_checkpointing_are_set_aside_and_given_back(plain, tmp_path):
    """Compiled blocks are called past the hooks of the student, and merged weights past the recomputation."""
    pipe = sd_pipe()
    pipe.unet.enable_gradient_checkpointing()
    blocks = [m for m in pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    for block in blocks:
        block.compile(backend="eager")
        block(torch.zeros(1, 2, 16), encoder_hidden_states=torch.zeros(1, 2, 32))
    before = [dict(vars(m)) for m in pipe.unet.modules()]
    assert_equal_files(plain, run(tmp_path / "off", pipe, merged="off"))
    run(tmp_path / "on", pipe, merged="on")
    after = [dict(vars(m)) for m in pipe.unet.modules()]
    for name in ("_compiled_call_impl", "gradient_checkpointing", "_gradient_checkpointing_func"):
        assert [own.get(name) for own in before] == [own.get(name) for own in after]


def test_a_tiny_vae_encodes_pictures(pictures, tmp_path):
    pipe = sd_pipe()
    small = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    pipe.register_modules(vae=AutoencoderTiny(**small, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)))
    assert run(tmp_path, pipe, pictures).is_file()


# -- the process ------------------------------------------------------------------------------------------------------


def test_what_the_thread_has_set_in_torch_does_not_matter(plain, tmp_path):
    pipe = sd_pipe()
    before = snapshot(pipe)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    try:
        with torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            file = run(tmp_path, pipe, merged="off")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert_same(before, snapshot(pipe))
    assert_equal_files(plain, file)


@pytest.mark.parametrize("shared", [True, False])
def test_runs_in_two_threads_take_turns(shared, plain, tmp_path):
    pipe, failed = sd_pipe(), []
    pipes = [pipe, pipe if shared else sd_pipe()]
    before = snapshot(pipe)

    def go(name, pipe):
        try:
            run(tmp_path / name, pipe, merged="off", cache_dir=str(tmp_path / "cache"))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=go, args=pair) for pair in zip("ab", pipes, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert_same(before, snapshot(pipe))
    for name in "ab":
        assert_equal_files(plain, tmp_path / name / plain.name)


def test_somebody_elses_accelerator_is_left_alone(tmp_path):
    other = Accelerator(gradient_accumulation_steps=4, mixed_precision="bf16")
    run(tmp_path)
    assert (other.gradient_accumulation_steps, other.mixed_precision) == (4, "bf16")


# -- folders with a past ----------------------------------------------------------------------------------------------


def test_a_checkpoint_knows_its_own_settings(pictures, tmp_path):
    run(tmp_path / "out", data=pictures)
    (tmp_path / "out/settings.json").unlink()
    with pytest.raises(lcmlora.DataError, match="rank was 4 and is 8"):
        run(tmp_path / "out", data=pictures, rank=8)
    with pytest.raises(lcmlora.DataError, match="has 2 steps already, more than steps=1"):
        run(tmp_path / "out", data=pictures, steps=1)
    Image.new("RGB", (24, 24)).save(pictures / "3.png")
    with pytest.raises(lcmlora.DataError, match="data was"):
        run(tmp_path / "out", data=pictures, steps=4)


def test_what_a_run_without_a_checkpoint_left_is_no_part_of_the_next(tmp_path):
    run(tmp_path, checkpoint_every=0, validate_every=1, log_every=1)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "lo')
    (tmp_path / ".rehearsal-x").mkdir()
    (tmp_path / "best/.x.1-2.partial").touch()
    run(tmp_path, checkpoint_every=0, steps=1)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1]
    assert not list((tmp_path / "validation").iterdir())
    assert not list((tmp_path / "best").iterdir())
    assert not list(tmp_path.glob(".*"))


def test_paths_of_this_machine_stay_on_it(tmp_path):
    file = run(tmp_path / "out", cache_dir=str(tmp_path / "cache"))
    with safe_open(file, "pt") as opened:
        assert str(tmp_path) not in str(opened.metadata())
    assert str(tmp_path) not in (tmp_path / "out/README.md").read_text()


def test_a_cache_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(lcmlora.DataError, match="file can't be written to"):
        run(tmp_path / "out", cache_dir=str(tmp_path / "file"))


def test_two_writers_of_one_file_do_not_meet_and_others_may_read_it(tmp_path):
    """Processes in two containers may have one number."""
    with whole(tmp_path / "x") as one, whole(tmp_path / "x") as other:
        assert one != other
        for place, value in ((one, 1), (other, 2)):
            save_file({"x": torch.tensor(value)}, place)
    (tmp_path / "usual").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "usual").stat().st_mode


# -- data -------------------------------------------------------------------------------------------------------------


def test_what_read_gives_is_data(tmp_path):
    found = read([{"picture": Image.new("RGB", (9, 9)), "title": "a fox"}], text_column="title")
    assert read(found) is found
    run(tmp_path, data=found)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (["a \ud800 fox"], "half a character"),
        ([(np.zeros((9, 9, 3)), "x")], "a path or a PIL image is expected"),
        ([(Image.new("F", (9, 9)), "x")], "floating-point"),
    ],
)
def test_odd_data_is_refused_in_a_sentence(data, words):
    with pytest.raises(lcmlora.DataError, match=words):
        read(data)


def test_prompts_of_sheets_are_read_as_data_is(tmp_path):
    with pytest.raises(lcmlora.DataError, match="a prompt is expected, got 1"):
        distill(sd_pipe(), PROMPTS, tmp_path, validation_prompts=[1], progress=False)


def test_wide_pixels_with_small_values_are_not_black():
    few = Image.fromarray(np.full((4, 4), 200, dtype=np.int32))
    assert Example("x", few).open().getpixel((0, 0)) == (200, 200, 200)


def test_of_a_long_picture_only_what_is_seen_is_scaled(monkeypatch):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 90, 3), dtype=np.uint8))
    row = Pictures([Example("x", picture)], 32, False, 5)[(0, 0)]
    top, left = row["crop_top_left"]
    expected = picture.resize((480, 32), Image.Resampling.LANCZOS).crop((left, top, left + 32, top + 32))
    found = row["pixels"].add(1).mul(127.5).permute(1, 2, 0).numpy()
    assert np.abs(found - np.asarray(expected)).max() <= 1
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *more: sizes.append(size) or resize(self, size, *more)
    )
    Pictures([Example("x", Image.new("RGB", (9000, 1)))], 32, False, 0)[(0, 0)]
    assert sizes == [(32, 32)]


def test_pictures_are_told_apart_by_what_they_show():
    red, blue = Image.new("P", (4, 4)), Image.new("P", (4, 4))
    red.putpalette([255, 0, 0] * 256)
    blue.putpalette([0, 0, 255] * 256)
    wide, high = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert len({Example("x", picture).content for picture in (red, blue, wide, high)}) == 4
    assert Example("x").content is None


def test_a_textual_inversion_makes_other_texts(tmp_path):
    """Two that add a token of the same name differ in one row of a large table."""

    def store(value):
        pipe, config = sd_pipe(), DistillConfig(**CONFIG)
        pipe.load_textual_inversion({"<fox>": torch.full((1, 32), value)})
        teacher = Teacher(pipe, config, torch.device("cpu"))
        return Batches(teacher, read(PROMPTS), config, tmp_path, None, False)._texts.folder

    assert store(1.0) == store(1.0) != store(2.0)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_refused_by_the_name_they_have():
    with pytest.raises(lcmlora.DataError, match=r"^alpha=-1\.0: a number above 0"):
        DistillConfig(alpha=-1.0)


@pytest.mark.parametrize(("steps", "second"), [(1000, 250), (2000, 500), (50, 12)])
def test_a_second_stage_keeps_its_share(steps, second):
    assert DistillConfig.preset("paths-lcm", steps=steps).then_steps == second
    assert DistillConfig.preset("paths-lcm", steps=steps, then_steps=7).then_steps == 7


def test_a_seed_may_be_any_number():
    assert len(next(iter(ResumableBatchSampler(5, 2, 2**70, 0, 1)))) == 2
