"""Out again: an accelerated pipe as an ordinary checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler

import lcmlora
from conftest import PIPES, assert_same, sd_pipe, snapshot, write_lora
from lcmlora import Style


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
