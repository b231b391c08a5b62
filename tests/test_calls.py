"""What an accelerated pipe does with the arguments of a call."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

import lcmlora
from conftest import PIPES, sd_pipe
from lcmlora.calls import steps_at_strength
from lcmlora.transition.records import pipe_record_of


def run(pipe, *args, **kwargs):
    """(UNet passes, batch of the first) of one call."""
    batches: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    try:
        pipe(*args, **{"output_type": "np", "generator": torch.Generator().manual_seed(0), **kwargs})
    finally:
        hook.remove()
    return len(batches), batches[0] if batches else 0


@pytest.fixture
def pipe(lcm_file):
    pipe = sd_pipe()
    return lcmlora.accelerate(pipe, lora=lcm_file(pipe))


@pytest.fixture(params=[StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def image_pipe(request, lcm_file):
    pipe = sd_pipe(cls=request.param)
    return lcmlora.accelerate(pipe, lora=lcm_file(pipe))


def image_arguments(pipe) -> dict:
    picture = Image.new("RGB", (16, 16), "red")
    mask = {"mask_image": Image.new("L", (16, 16), 255)} if isinstance(pipe, StableDiffusionInpaintPipeline) else {}
    return {"prompt": "a fox", "image": picture, **mask}


def test_positional_arguments_count_as_given(pipe):
    assert run(pipe, "a fox", 16, 16, 2, None, None, 1.5) == (2, 2)
    assert run(pipe, "a fox", 16, 16, 2) == (2, 1)
    assert run(pipe, "a fox", height=16, width=16, num_inference_steps=3, guidance_scale=2.0) == (3, 2)


@pytest.mark.parametrize("guidance", [0, 0.0, 0.5, 1, 1.0])
def test_guidance_up_to_one_is_off(pipe, guidance):
    assert run(pipe, "a fox", 16, 16, guidance_scale=guidance) == (4, 1)


def test_guidance_above_two_is_clamped_with_one_warning(pipe):
    seen = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: (seen.append(pipe.guidance_scale), step(*args, **kwargs))[1]
    with pytest.warns(lcmlora.LcmLoraWarning, match=r"guidance_scale=7\.5") as caught:
        run(pipe, "a fox", 16, 16, guidance_scale=7.5)
    assert caught[0].filename == __file__
    assert set(seen) == {2.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(pipe, "a fox", 16, 16, guidance_scale=7.5)


def test_strict_raises_before_any_unet_pass(lcm_file):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), strict=True)
    with pytest.raises(lcmlora.CallError, match="burns"):
        pipe("a fox", guidance_scale=3)


def test_guidance_none_leaves_calls_alone(lcm_file):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), guidance=None)
    assert run(pipe, "a fox", 16, 16) == (4, 2)  # the pipeline's own 7.5
    assert run(pipe, "a fox", 16, 16, guidance_scale=3.0) == (4, 2)


def test_negative_prompt_without_effect_warns_once(pipe):
    with pytest.warns(lcmlora.LcmLoraWarning, match=r"guidance_scale=1\.5"):
        run(pipe, "a fox", 16, 16, negative_prompt="blur")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(pipe, "a fox", 16, 16, negative_prompt="blur")


def test_negative_prompt_with_guidance_is_silent(pipe):
    assert run(pipe, "a fox", 16, 16, negative_prompt="blur", guidance_scale=1.5) == (4, 2)


@pytest.mark.parametrize("steps", [0, -1, 51, 2.5, "4", True])
def test_impossible_steps_are_refused_before_any_unet_pass(pipe, steps):
    with pytest.raises(lcmlora.CallError, match="1 to 50"):
        pipe("a fox", num_inference_steps=steps)


def test_many_steps_draw_a_hint(pipe):
    with pytest.warns(lcmlora.LcmLoraWarning, match="gets worse"):
        assert run(pipe, "a fox", 16, 16, num_inference_steps=12) == (12, 1)


def test_custom_timesteps_are_left_alone(pipe):
    assert run(pipe, "a fox", 16, 16, timesteps=[999, 499, 259]) == (3, 1)


@pytest.mark.parametrize("strength", [0.05, 0.1, 0.2, 0.28, 0.3, 0.55, 0.6, 0.8, 0.95, 0.9999, 1.0, None])
def test_image_to_image_runs_the_steps_asked_for(image_pipe, strength):
    arguments = image_arguments(image_pipe)
    if strength is not None:
        arguments["strength"] = strength
    steps = 2 if strength is not None and strength < 0.1 else 4
    assert run(image_pipe, **arguments, num_inference_steps=steps) == (steps, 1)
    assert pipe_record_of(image_pipe).settings.policy.ran["num_inference_steps"] == steps  # as sheets and PNGs say it


def test_strength_too_small_for_the_steps_runs_what_fits(image_pipe):
    with pytest.warns(lcmlora.LcmLoraWarning, match="pass 2 or less"):
        assert run(image_pipe, **image_arguments(image_pipe), strength=0.05) == (2, 1)


def test_strength_too_small_for_any_step_is_refused(image_pipe):
    with pytest.raises(lcmlora.CallError, match=r"strength=0\.01 changes nothing"):
        run(image_pipe, **image_arguments(image_pipe), strength=0.01)


def test_steps_at_strength_over_the_whole_grid():
    """Every strength of 0.01 to 1.00, 1 to 8 steps: int(asked * strength) is what was asked for, or all that fit."""
    for steps in range(1, 9):
        for percent in range(1, 101):
            strength = percent / 100
            room = int(50 * strength)
            if not room:
                with pytest.raises(lcmlora.CallError):
                    steps_at_strength(steps, strength)
            else:
                asked = steps_at_strength(steps, strength)
                assert asked <= 50
                assert min(int(asked * strength), asked) == min(steps, room), (steps, strength, asked)


def test_bad_calls_raise_what_the_pipeline_itself_would(pipe):
    with pytest.raises(ValueError, match="Provide either `prompt`"):
        pipe()
    with pytest.raises(TypeError, match="positional"):
        pipe(*range(100))


@pytest.mark.parametrize("kind", PIPES)
def test_signature_and_help_stay(kind, lcm_file):
    pipe = PIPES[kind]()
    before = inspect.signature(pipe.__call__), type(pipe).__call__.__doc__
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    assert (inspect.signature(pipe.__call__), type(pipe).__call__.__doc__) == before
