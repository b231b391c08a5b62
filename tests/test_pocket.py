"""The embedded model: it loads without a hub, and the package does with it what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

import lcmlora
from conftest import assert_same, snapshot
from lcmlora import demo, pocket


@pytest.fixture(scope="module")
def pipe():
    pipe = lcmlora.load_pocket()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe, **call) -> np.ndarray:
    generators = [torch.Generator().manual_seed(i) for i in range(len(demo.PROMPTS))]
    return np.stack(pipe(list(demo.PROMPTS), generator=generators, output_type="np", **call).images)


def test_it_is_small_and_carries_its_licences():
    size = sum(file.stat().st_size for file in pocket.MODEL.rglob("*") if file.is_file())
    assert size <= 26e6
    names = {file.name for file in (pocket.MODEL / "licenses").iterdir()}
    assert names == {"NOTO-EMOJI-APACHE-2.0.txt", "FLUENT-EMOJI-MIT.txt"}
    assert "Noto Emoji" in (pocket.MODEL / "README.md").read_text(encoding="utf-8")


def test_its_lora_was_made_by_this_package_and_is_found_by_structure(pipe):
    assert lcmlora.detect_base(pipe).name == "pocket"
    info = lcmlora.inspect_lora(pocket.LCM_LORA)
    assert (len(info.modules), info.ranks) == (129, (8,))


def test_four_steps_are_near_fifty_with_the_lora_and_far_without(pipe):
    """Mean squared distance of the pictures to the base's own at 50 steps, same prompts and seeds."""
    before = snapshot(pipe)
    fifty = pictures(pipe, num_inference_steps=50, guidance_scale=pocket.GUIDANCE)
    without = pictures(pipe, num_inference_steps=4, guidance_scale=pocket.GUIDANCE)
    with lcmlora.accelerated(pipe):
        accelerated = pictures(pipe)
    assert_same(before, snapshot(pipe))
    assert ((accelerated - fifty) ** 2).mean() < 0.7 * ((without - fifty) ** 2).mean()


@pytest.mark.parametrize("variant", ["base", "chalk"])
def test_the_lora_of_the_base_serves_the_fine_tune_and_the_style(variant):
    pipe = lcmlora.load_pocket(variant)
    pipe.set_progress_bar_config(disable=True)
    lcmlora.accelerate(pipe, styles={"3d": pocket.STYLE})
    assert lcmlora.status(pipe).styles == {"3d": 0.8}
    assert np.isfinite(pictures(pipe, num_inference_steps=1)).all()


def test_its_tiny_vae_draws_nearly_the_same_for_a_fraction_of_the_work(pipe):
    """Work: multiplications in the convolutions of one decoding."""
    with lcmlora.accelerated(pipe):
        whole, work = pictures(pipe), decoding_work(pipe)
    before = snapshot(pipe)
    with lcmlora.accelerated(pipe, vae="tiny"):
        assert decoding_work(pipe) < 0.5 * work
        assert ((pictures(pipe) - whole) ** 2).mean() < 0.005
    assert_same(before, snapshot(pipe))


def decoding_work(pipe) -> int:
    counted = 0

    def count(layer, args, output):
        nonlocal counted
        counted += output[0].numel() * layer.weight[0].numel()

    layers = [layer for layer in pipe.vae.modules() if isinstance(layer, torch.nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    pictures(pipe, num_inference_steps=1)
    for hook in hooks:
        hook.remove()
    return counted


def test_under_tcd_its_lora_is_nearer_to_fifty_steps(pipe):
    """From the same noise: without noise between the steps the scheduler goes the base's own way."""
    fifty = pictures(pipe, num_inference_steps=50, guidance_scale=pocket.GUIDANCE)
    far = {}
    for recipe, call in (("lcm", {}), ("tcd", {"eta": 0.0})):
        with lcmlora.accelerated(pipe, recipe=recipe):
            far[recipe] = ((pictures(pipe, **call) - fifty) ** 2).mean()
    assert far["tcd"] < 0.8 * far["lcm"]


def test_prompts_of_the_demo_are_made_of_words_it_knows():
    words = pocket.words()
    for prompt in demo.PROMPTS:
        assert any(thing in prompt for thing in words["things"]), prompt
        assert any(f"{colour} background" in prompt for colour in words["backgrounds"]), prompt


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="'base' or 'chalk'"):
        lcmlora.load_pocket("watercolour")


def test_every_release_of_transformers_reads_its_text_encoder():
    """Older ones know these names alone, and take random weights in the place of others."""
    with safe_open(pocket.MODEL / "pipeline/text_encoder/model.safetensors", "pt") as file:
        assert {key.partition(".")[0] for key in file.keys()} == {"text_model"}  # noqa: SIM118
