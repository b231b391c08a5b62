"""Out again: an accelerated pipe as an ordinary checkpoint."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import threading

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image

import lcmlora
from conftest import PIPES, assert_same, sd_pipe, snapshot, write_lora
from lcmlora import Style
from lcmlora.distillation.teacher import judge


def call(pipe, **changes):
    arguments = {"height": 16, "width": 16, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipe("a fox", **{**arguments, **changes}).images


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", PIPES)
def test_plain_diffusers_gives_the_same_picture(kind, fuse, lcm_file, tmp_path):
    """Pitfall 13: no key of a LoRA is left in the files, and the text-encoder half of the style is in them."""
    pipe = PIPES[kind]()
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    halves = {f"{text}.lora_A.weight": torch.randn(2, 32), f"{text}.lora_B.weight": torch.randn(32, 2)}
    style = write_lora(
        tmp_path / "s.safetensors", pipe.unet, only=lambda n: "to_q" in n, spelling="diffusers", extra=halves
    )
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), styles={"s": Style(style, 0.7)}, fuse=fuse)
    before, expected = snapshot(pipe), call(pipe)
    before.pop("config")  # diffusers notes class and version there when it saves
    assert lcmlora.bake(pipe, tmp_path / "baked") == tmp_path / "baked"
    after = snapshot(pipe)
    after.pop("config")
    assert_same(before, after)
    plain = DiffusionPipeline.from_pretrained(tmp_path / "baked")
    plain.set_progress_bar_config(disable=True)
    assert isinstance(plain.scheduler, LCMScheduler)
    torch.testing.assert_close(call(plain, num_inference_steps=4, guidance_scale=1.0), expected, atol=1e-4, rtol=1e-4)
    recipe = json.loads((tmp_path / "baked/lcmlora.json").read_text())
    assert recipe["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert recipe["merged"]["styles"] == {"s": 0.7}
    assert recipe["merged"]["lora"] == "lcm.safetensors"  # and no path: the folder may be given away


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_saved_as_it_is(dtype, lcm_file, tmp_path):
    pipe = sd_pipe().to(dtype)
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    lcmlora.bake(pipe, tmp_path / "baked")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "baked", dtype=dtype)
    theirs = plain.unet.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in pipe.unet.state_dict().items())


def test_refusals_write_nothing(lcm_file, tmp_path):
    pipe = sd_pipe()
    with pytest.raises(lcmlora.PipelineError, match="accelerate"):
        lcmlora.bake(pipe, tmp_path / "baked")
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(lcmlora.PipelineError, match="is no checkpoint"):
        lcmlora.bake(pipe, full)
    assert [file.name for file in full.iterdir()] == ["mine.txt"]
    (full / "mine.txt").unlink()
    lcmlora.bake(pipe, full)
    (full / "old.txt").write_text("of the checkpoint that was here")
    lcmlora.bake(pipe, full, overwrite=True)
    assert not (full / "old.txt").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"full", "lcm.safetensors"}


# -- a baked pipe among other code ------------------------------------------------------------------------------------


@pytest.fixture
def folder(lcm_file, tmp_path):
    """A baked model of 3 steps, without styles."""
    pipe = sd_pipe()
    return lcmlora.bake(lcmlora.accelerate(pipe, lora=lcm_file(pipe), steps=3), tmp_path / "baked")


@pytest.fixture
def baked(folder):
    pipe = lcmlora.load_baked(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def passes(pipe, **call):
    """The batch of each pass of a call through the UNet."""
    seen, picture = [], Image.new("RGB", (16, 16))
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    pipe.set_progress_bar_config(disable=True)
    pipe("a fox", **({"image": picture} if "Img2Img" in type(pipe).__name__ else {}), output_type="latent", **call)
    hook.remove()
    return seen


WAYS = {
    "load": lambda folder: lcmlora.load(folder, kind="img2img", device="cpu"),
    "load_baked": lambda folder: lcmlora.load_baked(folder, kind="img2img"),
    "accelerate": lambda folder: lcmlora.accelerate(AutoPipelineForImage2Image.from_pipe(lcmlora.load_baked(folder))),
}


@pytest.mark.parametrize("way", WAYS)
def test_image_to_image_of_a_baked_model_keeps_its_call_defaults(way, folder):
    pipe = WAYS[way](folder)
    assert isinstance(pipe, StableDiffusionImg2ImgPipeline)
    assert passes(pipe, strength=0.6) == [1, 1, 1]


def test_a_pipe_of_a_baked_ones_parts_is_dressed_and_given_back(folder, baked):
    redraw = AutoPipelineForImage2Image.from_pipe(baked)
    shutil.rmtree(folder)  # it is known by the UNet, not by its file
    assert (lcmlora.is_accelerated(redraw), lcmlora.status(redraw).baked, lcmlora.status(redraw).steps) == (
        False,
        True,
        None,
    )
    before = snapshot(redraw)
    with lcmlora.accelerated(redraw, steps=5, guidance=1.5, recipe="lcm", keep=None, local_files_only=True):
        assert redraw.scheduler is not baked.scheduler  # both may be called at once
        assert passes(redraw, strength=0.6) == [2] * 5
        assert passes(baked) == [1] * 3
        lcmlora.accelerate(redraw, enforce_inference_steps=False)
        assert passes(redraw, strength=0.6) == [2] * 3
    assert_same(before, snapshot(redraw))
    redraw.scheduler = DDIMScheduler.from_config(redraw.scheduler.config)
    lcmlora.accelerate(redraw)
    assert isinstance(redraw.scheduler, LCMScheduler)
    lcmlora.restore(redraw)
    assert isinstance(redraw.scheduler, DDIMScheduler)
    with pytest.raises(lcmlora.PipelineError, match="nothing to restore"):
        lcmlora.restore(baked)


def test_a_baked_pipe_whose_scheduler_was_replaced_gets_it_back(baked):
    own = baked.scheduler
    baked.scheduler = DDIMScheduler.from_config(own.config)
    with pytest.warns(lcmlora.LcmLoraWarning, match=r"lcmlora\.accelerate\(pipe\) puts it back"):
        passes(baked)
    assert lcmlora.accelerate(baked).scheduler is own


@pytest.mark.parametrize(
    "said", [{"recipe": "tcd"}, {"styles": {"ink": 0.5}}, {"weight": 0.5}, {"fuse": False}, {"vae": "tiny"}]
)
def test_what_a_baked_model_cant_be_is_refused(said, baked):
    for pipe in (baked, AutoPipelineForImage2Image.from_pipe(baked)):
        before = snapshot(pipe)
        with pytest.raises(lcmlora.PipelineError, match=rf"merged into this pipe already.*but not {next(iter(said))}"):
            lcmlora.accelerate(pipe, **said)
        assert_same(before, snapshot(pipe))


def test_styled_is_a_baked_pipes_lock(baked):
    """A call of another thread waits, on the pipe and on one of its parts; two calls at once are told of `styled`."""
    redraw, twin = lcmlora.accelerate(AutoPipelineForImage2Image.from_pipe(baked)), copy.copy(baked)
    order: list[str] = []
    threads = [threading.Thread(target=lambda p=p: (passes(p), order.append("call"))) for p in (baked, redraw, twin)]
    with lcmlora.styled(baked, {}) as pipe:
        for thread in threads:
            thread.start()
        lcmlora.accelerate(pipe, steps=2)
        assert passes(pipe) == [1, 1]
        order.append("block")
    for thread in threads:
        thread.join()
    assert order == ["block", *["call"] * 3]
    assert lcmlora.status(baked).steps == 3

    def refused():
        with pytest.raises(lcmlora.CallError, match=r"`with lcmlora\.styled\(pipe, \{\}\)`"):
            passes(baked)
        order.append("refused")

    def at_the_first_step(pipe, step, timestep, values):
        other = threading.Thread(target=refused)
        other.start()
        other.join()
        return values

    passes(baked, num_inference_steps=1, callback_on_step_end=at_the_first_step)
    assert order[-1] == "refused"


def test_a_baked_pipes_styles_are_those_it_was_baked_with(lcm_file, tmp_path):
    pipe = sd_pipe()
    ink = write_lora(tmp_path / "ink.safetensors", pipe.unet, only=lambda name: "to_q" in name)
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), styles={"ink": ink})
    baked = lcmlora.load_baked(lcmlora.bake(pipe, tmp_path / "baked"))
    for styles in ({}, lcmlora.status(baked).styles):
        with lcmlora.styled(baked, styles):
            pass
    for styles in ({"ink": 0.5}, {"new": ink}, None):
        with (
            pytest.raises(lcmlora.PipelineError, match=r"baked with styles.*no other can be set"),
            lcmlora.styled(baked, styles),
        ):
            pass
    with pytest.raises(lcmlora.PipelineError, match="baked with styles"):
        lcmlora.set_styles(baked, {})  # they can't be turned off


def test_a_baked_pipe_is_baked_again_with_its_record(folder, baked, tmp_path):
    again = lcmlora.load_baked(lcmlora.bake(lcmlora.accelerate(baked, steps=5), tmp_path / "again"))
    first, second = (json.loads((path / "lcmlora.json").read_text()) for path in (folder, tmp_path / "again"))
    assert second == {**first, "call": {**first["call"], "num_inference_steps": 5}}
    assert lcmlora.status(again) == lcmlora.status(baked)
    with pytest.raises(lcmlora.PipelineError, match=r"pickled.*: lcmlora\.bake"):
        pickle.dumps(baked)


def test_a_baked_pipe_has_no_base(folder, baked):
    sibling = AutoPipelineForImage2Image.from_pipe(baked)
    for what in (baked, sibling, str(folder)):
        with pytest.raises(lcmlora.PipelineError, match=r"was baked: there is no base.*lcmlora\.sweep"):
            lcmlora.benchmark(what)
    for what in (baked, sibling):
        with pytest.raises(lcmlora.PipelineError, match="was baked: there is no base"):
            lcmlora.compare(what, "a fox")
        with pytest.raises(lcmlora.PipelineError, match="the teacher was baked"):
            judge(what, lcmlora.DistillConfig())
    sheet = lcmlora.sweep(baked, "a fox", x={"steps": (1, 2)})
    assert len(sheet.rows) == 2


def test_what_accelerate_of_a_pipe_with_a_baked_unet_says(lcm_file, baked):
    pipe = sd_pipe(seed=1)
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    pipe.unet = baked.unet
    with pytest.raises(lcmlora.PipelineError, match=r"another UNet than this baked one: lcmlora\.restore"):
        lcmlora.accelerate(pipe)
    with pytest.warns(lcmlora.LcmLoraWarning, match=r"pipe\.unet was replaced"):
        lcmlora.restore(pipe)
    lcmlora.accelerate(pipe)
    assert passes(pipe) == [1] * 3


def test_a_baked_pipe_with_another_unet_is_none(baked, tmp_path):
    twin, own = copy.copy(baked), baked.unet
    baked.unet = twin.unet = sd_pipe(seed=1).unet
    assert [lcmlora.status(pipe).baked for pipe in (baked, twin)] == [False, False]
    with pytest.warns(lcmlora.LcmLoraWarning, match=r"pipe\.unet is not the one that was baked"):
        passes(baked)
    with pytest.raises(lcmlora.PipelineError, match=r"without the LCM-LoRA: pipe\.unet is not the one"):
        lcmlora.bake(baked, tmp_path / "again")
    baked.unet = own
    assert lcmlora.status(baked).baked
    assert passes(baked) == [1] * 3


def test_status_says_whether_a_pipe_was_baked(folder, baked, lcm_file):
    pipe = sd_pipe()
    assert [lcmlora.status(p).baked for p in (pipe, baked, copy.copy(baked), copy.deepcopy(baked))] == [
        False,
        True,
        True,
        True,
    ]
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    assert lcmlora.status(pipe).to_dict()["baked"] is False


def test_a_recipe_in_use_may_be_unregistered(lcm_file, tmp_path):
    pipe = sd_pipe()
    lcm = lcm_file(pipe, "acme.safetensors")
    ink = write_lora(tmp_path / "ink.safetensors", pipe.unet, only=lambda name: "to_q" in name)
    shape = {"cross_attention_dim": 32, "block_out_channels": tuple(pipe.unet.config.block_out_channels)}
    lcmlora.register(lcmlora.Base("acme", "Acme's", **shape, layers=None, lora=str(lcm)))
    lcmlora.register(lcmlora.Recipe("acme-fast", "an Acme LoRA", steps=6))
    try:
        lcmlora.accelerate(pipe, recipe="acme-fast", lora=lcm, styles={"ink": ink})
        folder = lcmlora.bake(pipe, tmp_path / "baked")
    finally:
        for name in ("acme-fast", "acme"):
            lcmlora.unregister(name)
    lcmlora.set_styles(pipe, {"ink": 0.3})
    with lcmlora.styled(pipe, {}):
        lcmlora.accelerate(pipe, weight=0.9, strict=True)
    now = lcmlora.status(pipe)
    assert (now.base, now.recipe, now.steps, now.styles) == ("acme", "acme-fast", 6, {"ink": 0.3})
    with pytest.raises(lcmlora.PipelineError, match=r"recipe 'acme-fast' was unregistered.*register it again"):
        lcmlora.bake(pipe, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(lcmlora.BaseModelError, match=r"type lcmlora\.register\(lcmlora\.Recipe\('acme-fast', "):
        lcmlora.load_baked(folder)
