"""lcmlora.testing: what other projects' tests are built from, and these."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from safetensors import safe_open

import lcmlora
from conftest import assert_same, snapshot
from lcmlora import testing
from lcmlora.testing import tiny_lora, tiny_pipeline


def test_the_examples_in_the_docstrings_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(testing)
    assert tried >= 9
    assert failed == 0


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("spelling", ["kohya", "diffusers", "peft"])
def test_a_tiny_pipeline_takes_a_tiny_lora_and_comes_back(kind, spelling, tmp_path):
    pipe = tiny_pipeline(kind)
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=tiny_lora(pipe, tmp_path / "lcm.safetensors", spelling=spelling))
    assert pipe("a fox").images[0].size == (16, 16)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.filterwarnings("error")
def test_a_tiny_pipeline_brings_no_warning():
    for kind in ("sd", "sdxl"):
        tiny_pipeline(kind)


def test_weights_depend_on_the_seed_and_leave_the_callers_generator_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = (tiny_pipeline("sdxl", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), wanted)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        weights = [next(iter(getattr(pipe, part).parameters())) for pipe in (one, two, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])


def test_another_class_and_another_unet():
    pipe = tiny_pipeline("sd", cls=StableDiffusionInpaintPipeline, in_channels=9)
    assert type(pipe) is StableDiffusionInpaintPipeline
    assert pipe.unet.conv_in.in_channels == 9


def test_a_lora_with_text_keys_is_a_style_for_both_text_encoders(tmp_path):
    pipe = tiny_pipeline("sdxl")
    for spelling in ("kohya", "diffusers"):
        file = tiny_lora(pipe, tmp_path / "s.safetensors", spelling=spelling, text=True, only=lambda n: "to_q" in n)
        info = lcmlora.inspect_lora(file)
        assert {part: len(modules) for part, modules in info.text_modules.items()} == {
            "text_encoder": 8,
            "text_encoder_2": 8,
        }
        with pytest.raises(lcmlora.LoraMismatchError, match="is it a style"):
            lcmlora.accelerate(pipe, lora=file)


def test_rank_alpha_and_further_tensors_are_in_the_file(tmp_path):
    pipe = tiny_pipeline()
    file = tiny_lora(pipe, tmp_path / "l.safetensors", rank=2, alpha=1.0, extra={"mine": torch.ones(1)})
    with safe_open(file, "pt") as opened:
        assert "mine" in opened.keys()  # noqa: SIM118
    info = lcmlora.inspect_lora(tiny_lora(pipe, tmp_path / "l.safetensors", rank=2, alpha=1.0))
    assert (info.ranks, info.alphas) == ((2,), (1.0,))


def test_import_lcmlora_leaves_it_out():
    code = "import sys, lcmlora; print('lcmlora.testing' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
