"""Field cases B1 to B10: other code touches an accelerated pipe."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import threading
import warnings

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.hooks import apply_group_offloading
from test_field_before import embedded, passed, text_style
from torch import nn

import lcmlora
from conftest import assert_same, sd_pipe, snapshot, tiny_unet, write_lora
from lcmlora import CallError, LcmLoraWarning, PipelineError, Style


@pytest.fixture
def lcm(tmp_path):
    return write_lora(tmp_path / "lcm.safetensors", sd_pipe().unet)


@pytest.fixture
def ink(tmp_path):
    """A style of attention layers and the text encoder."""
    return text_style(tmp_path / "ink.safetensors", sd_pipe())


def load(pipe, file, name, **more):
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name, **more)


def draw(pipe, **changes):
    arguments = {"height": 16, "width": 16, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipe("a fox", **{**arguments, **changes}).images


# -- B1, B5: somebody writes into the weights -------------------------------------------------------------------------


def fuse_all(pipe, files):
    pipe.fuse_lora()


def fuse_ours(pipe, files):
    pipe.fuse_lora(components=["unet"], adapter_names=["lcmlora_lcm"])


def fuse_and_unload(pipe, files):
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def fuse_a_late_one(pipe, files):
    load(pipe, files["ink"], "late")
    pipe.fuse_lora(adapter_names=["late"])


def add_to_all(pipe, files):
    for p in pipe.unet.parameters():
        p.data += 0.125


def add_to_one(pipe, files):
    pipe.unet.mid_block.attentions[0].proj_in.weight.data += 0.125


def load_others(pipe, files):
    pipe.unet.load_state_dict(tiny_unet(7).state_dict(), strict=False)


def scale_in_place(pipe, files):
    with torch.no_grad():
        for p in pipe.unet.down_blocks.parameters():
            p.mul_(0.5)


@pytest.mark.parametrize("touch", [fuse_all, fuse_ours, fuse_and_unload, add_to_one, add_to_all, scale_in_place])
def test_B1_without_originals_a_change_is_refused_and_force_says_what_is_left(touch, lcm, ink):
    pipe = sd_pipe()
    before = passed(pipe)
    lcmlora.accelerate(pipe, lora=lcm, fuse=False)
    touch(pipe, {"ink": ink})
    with pytest.raises(PipelineError, match=r"can't restore the weights exactly: .*restore\(pipe, force=True\)"):
        lcmlora.restore(pipe)
    assert lcmlora.is_accelerated(pipe)
    with pytest.warns(LcmLoraWarning, match=r"restore\(force=True\) gave back what it could"):
        lcmlora.restore(pipe, force=True)
    assert not lcmlora.is_accelerated(pipe)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert not torch.equal(passed(pipe), before)


def test_B1_after_unfusing_the_way_back_is_exact_or_refused(lcm):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm, fuse=False)
    pipe.fuse_lora()
    with pytest.raises(PipelineError, match=r"Call pipe\.unfuse_lora\(\) first"):
        lcmlora.restore(pipe)
    pipe.unfuse_lora()
    with pytest.raises(PipelineError, match="exactly"):  # its arithmetic leaves rounding errors
        lcmlora.restore(pipe)
    with pytest.warns(LcmLoraWarning):
        lcmlora.restore(pipe, force=True)
    torch.testing.assert_close(passed(pipe), passed(sd_pipe()), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:restore removes:lcmlora.errors.LcmLoraWarning")
@pytest.mark.parametrize("touch", [add_to_one, fuse_a_late_one])
@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_B5_what_was_baked_into_merged_weights_is_undone_with_a_word(keep, touch, lcm, ink, tmp_path):
    pipe = sd_pipe()
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, keep=keep)
    only_unet = write_lora(tmp_path / "u.safetensors", pipe.unet, only=lambda n: "to_q" in n, seed=5)
    touch(pipe, {"ink": only_unet})
    with pytest.warns(LcmLoraWarning, match="were changed while the pipe was accelerated"):
        lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("touch", [add_to_all, load_others, scale_in_place])
def test_B5_what_was_baked_into_others_too_is_refused_and_nothing_is_lost(touch, lcm, ink):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm)
    touch(pipe, {})
    state = snapshot(pipe)
    for act in (
        lcmlora.restore,
        lambda p: lcmlora.set_styles(p, {"ink": ink}),
        lambda p: lcmlora.accelerate(p, weight=0.5),
    ):
        with pytest.raises(PipelineError, match=r"changed or replaced since accelerate"):
            act(pipe)
        assert_same(state, snapshot(pipe))
    merged_layers = lcmlora.layers.lcm_layers(pipe.unet)
    plain = lcmlora.layers.lcm_layers(sd_pipe().unet)
    with pytest.warns(LcmLoraWarning):
        lcmlora.restore(pipe, force=True)
    assert all(torch.equal(layer.weight, plain[name].weight) for name, layer in merged_layers.items())


@pytest.mark.parametrize("touch", [add_to_all, load_others])
def test_B5_a_call_notices_too_and_says_so_once(touch, lcm):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm)
    touch(pipe, {})
    with pytest.warns(LcmLoraWarning, match="weights were changed since accelerate"):
        draw(pipe)
    draw(pipe)


@pytest.mark.parametrize(
    "cast", [lambda p: p.to(torch.float16), lambda p: p.unet.to(torch.bfloat16), lambda p: p.to(torch.float64)]
)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_B5_a_cast_of_the_whole_model_is_no_change(fuse, cast, lcm):
    pipe, plain = sd_pipe(), sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
    cast(pipe)
    cast(plain)
    lcmlora.restore(pipe)
    assert all(torch.equal(p, q) for p, q in zip(pipe.unet.parameters(), plain.unet.parameters(), strict=True))


def test_B5_another_memory_layout_is_no_change(lcm):
    pipe = sd_pipe()
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm)
    pipe.unet.to(memory_format=torch.channels_last)
    lcmlora.set_styles(pipe, {"s": Style(lcm, 0.2)})
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


# -- B2: joint projections --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["pipe", "unet"])
def test_B2_joint_projections_follow_every_merge_and_the_restore(way, lcm, ink):
    pipe, plain = sd_pipe(), sd_pipe()
    original = passed(pipe)
    lcmlora.accelerate(pipe, lora=lcm)
    lcmlora.accelerate(plain, lora=lcm)
    (pipe if way == "pipe" else pipe.unet).fuse_qkv_projections()
    torch.testing.assert_close(passed(pipe), passed(plain), atol=1e-5, rtol=1e-4)
    for styles in ({"ink": Style(ink, 0.9)}, {}):
        lcmlora.set_styles(pipe, styles)
        lcmlora.set_styles(plain, styles)
        torch.testing.assert_close(passed(pipe), passed(plain), atol=1e-5, rtol=1e-4)
    lcmlora.restore(pipe)
    torch.testing.assert_close(passed(pipe), original, atol=1e-5, rtol=1e-4)
    pipe.unet.unfuse_qkv_projections()
    assert torch.equal(passed(pipe), original)
    lcmlora.accelerate(pipe, lora=lcm)  # un-fused projections refuse nothing
    lcmlora.restore(pipe)


def test_B2_joint_projections_that_go_past_adapters_are_told(lcm):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm, fuse=False)
    pipe.fuse_qkv_projections()
    with pytest.warns(LcmLoraWarning, match=r"fuse_qkv_projections\(\) goes past PEFT adapters"):
        draw(pipe)


# -- B3: other Parameters ---------------------------------------------------------------------------------------------


def assign_same(pipe):
    pipe.unet.load_state_dict({k: v.clone() for k, v in pipe.unet.state_dict().items()}, assign=True)


def off_load_and_back(pipe):
    from accelerate.hooks import remove_hook_from_module

    cpu_offload(pipe.unet, torch.device("cpu"))
    remove_hook_from_module(pipe.unet, recurse=True)


def new_parameters(pipe):
    for module in pipe.unet.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)


@pytest.mark.parametrize("touch", [assign_same, off_load_and_back, new_parameters])
def test_B3_other_parameters_with_the_same_values_get_their_originals(touch, lcm, ink):
    pipe, plain = sd_pipe(), sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm)
    touch(pipe)
    with pytest.warns(LcmLoraWarning, match="other Parameter objects"):
        lcmlora.set_styles(pipe, {"ink": Style(ink, 0.4)})
    fresh = lcmlora.accelerate(sd_pipe(), lora=lcm, styles={"ink": Style(ink, 0.4)})
    assert torch.equal(passed(pipe), passed(fresh))
    lcmlora.restore(pipe)
    assert all(torch.equal(p, q) for p, q in zip(pipe.unet.parameters(), plain.unet.parameters(), strict=True))


def off_load(pipe, tmp_path):
    cpu_offload(pipe.unet, torch.device("cpu"))


def off_load_to_disk(pipe, tmp_path):
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.unet, cpu, cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "off"))


@pytest.mark.parametrize("touch", [off_load, off_load_to_disk])
def test_B3_off_loaded_since_is_refused_with_what_to_call(touch, lcm, ink, tmp_path):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm)
    expected = draw(pipe)
    touch(pipe, tmp_path)
    for act in (lcmlora.restore, lambda p: lcmlora.set_styles(p, {"ink": ink})):
        with pytest.raises(PipelineError, match=r"off-loaded since .*call pipe\.remove_all_hooks\(\)"):
            act(pipe)
    lcmlora.accelerate(pipe, steps=4, guidance=1.2)  # needs no weights
    lcmlora.accelerate(pipe, guidance=1.0)
    assert (draw(pipe) == expected).all()


def test_B3_sequential_off_loading_and_back(lcm):
    pipe, plain = sd_pipe(), sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm)
    cpu_offload(pipe.unet, torch.device("cpu"))
    with pytest.raises(PipelineError, match="remove_all_hooks"):
        lcmlora.restore(pipe)
    pipe.remove_all_hooks()
    with pytest.warns(LcmLoraWarning, match="other Parameter objects"):
        lcmlora.restore(pipe)
    assert all(torch.equal(p, q) for p, q in zip(pipe.unet.parameters(), plain.unet.parameters(), strict=True))


def assign_others(pipe):
    pipe.unet.load_state_dict(tiny_unet(7).state_dict(), assign=True)


def quantise(pipe):
    class Foreign(nn.Parameter):
        pass

    for module in pipe.unet.modules():
        if isinstance(module, nn.Linear):
            module.weight = Foreign(module.weight.detach().clone())


def replace_layers(pipe):
    pipe.unet.mid_block.attentions[0].proj_in = nn.Conv2d(16, 16, 3)


@pytest.mark.parametrize("touch", [assign_others, quantise, replace_layers])
def test_B3_replaced_weights_are_refused_and_forced_back_where_possible(touch, lcm, ink):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm)
    touch(pipe)
    there = [p.detach().clone() for p in pipe.unet.parameters()]
    for act in (lcmlora.restore, lambda p: lcmlora.set_styles(p, {"ink": ink})):
        with pytest.raises(PipelineError, match="changed or replaced since accelerate"):
            act(pipe)
        assert all(torch.equal(p, q) for p, q in zip(pipe.unet.parameters(), there, strict=True))
    with pytest.warns(LcmLoraWarning, match="gave back what it could"):
        lcmlora.restore(pipe, force=True)
    assert not lcmlora.is_accelerated(pipe)


# -- B4: the user's adapters ------------------------------------------------------------------------------------------


def delete_own(pipe, files):
    pipe.delete_adapters("own")


def replace_own(pipe, files):
    pipe.delete_adapters("own")
    load(pipe, files["other"], "own")


def unload_all(pipe, files):
    pipe.unload_lora_weights()


def load_late(pipe, files):
    load(pipe, files["other"], "late")


def load_late_with_text(pipe, files):
    load(pipe, files["ink"], "late")


def set_others(pipe, files):
    pipe.set_adapters(["own"], [0.1])


def disable(pipe, files):
    pipe.disable_lora()


TOUCHES = [delete_own, replace_own, unload_all, load_late, load_late_with_text, set_others, disable]


@pytest.mark.filterwarnings("ignore::lcmlora.errors.LcmLoraWarning")
@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_B4_whatever_becomes_of_the_users_adapters_restore_gives_back_what_was_found(fuse, touch, lcm, ink, tmp_path):
    other = write_lora(tmp_path / "other.safetensors", sd_pipe().unet, only=lambda n: "to_v" in n, seed=9)
    pipe = sd_pipe()
    load(pipe, ink, "own")
    pipe.set_adapters(["own"], [0.6])
    before, drawn, listed = snapshot(pipe), passed(pipe), pipe.get_list_adapters()
    lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
    try:
        touch(pipe, {"ink": ink, "other": other})
    except ValueError:  # diffusers' own words: merged LoRAs are no adapters
        assert fuse
    lcmlora.status(pipe)
    lcmlora.accelerate(pipe, steps=6)
    if touch is replace_own and fuse:  # two of one name
        with pytest.raises(PipelineError, match=r"pipe\.delete_adapters\('own'\)"):
            lcmlora.accelerate(pipe, weight=0.9)
        pipe.delete_adapters("own")
    lcmlora.accelerate(pipe, weight=0.9)
    lcmlora.set_styles(pipe, {"own": 0.2})
    fresh = lcmlora.accelerate(sd_pipe(), lora=lcm, weight=0.9, styles={"own": Style(ink, 0.2)})
    if touch is not replace_own or fuse:
        torch.testing.assert_close(passed(pipe), passed(fresh), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(embedded(pipe), embedded(fresh), atol=1e-5, rtol=1e-4)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))
    assert torch.equal(passed(pipe), drawn)
    assert pipe.get_list_adapters() == listed


@pytest.mark.parametrize("touch", [load_late, load_late_with_text, unload_all, disable])
def test_B4_a_call_that_finds_the_lcm_lora_inactive_says_so_once(touch, lcm, ink):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm, fuse=False)
    expected = draw(pipe)
    touch(pipe, {"ink": ink, "other": ink})
    with pytest.warns(LcmLoraWarning, match="the LCM-LoRA is not active") as told:
        draw(pipe)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe)
    lcmlora.accelerate(pipe, styles={})  # as the warning says
    assert (draw(pipe) == expected).all()


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_B4_a_late_lora_becomes_a_style_that_has_a_weight(fuse, lcm, ink):
    pipe = sd_pipe()
    pipe.text_encoder.eval()  # as transformers' own loader leaves it
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
    load(pipe, ink, "late")
    lcmlora.set_styles(pipe, {"late": 0.3})
    fresh = lcmlora.accelerate(sd_pipe(), lora=lcm, styles={"late": Style(ink, 0.3)}, fuse=fuse)
    torch.testing.assert_close(passed(pipe), passed(fresh), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embedded(pipe), embedded(fresh), atol=1e-5, rtol=1e-4)
    lcmlora.set_styles(pipe, {})
    bare = lcmlora.accelerate(sd_pipe(), lora=lcm, fuse=fuse)
    torch.testing.assert_close(passed(pipe), passed(bare), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embedded(pipe), embedded(bare), atol=1e-5, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LcmLoraWarning)
        lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


# -- B6: parts of the pipe are replaced, copied, lost -----------------------------------------------------------------


def test_B6_a_replaced_unet_comes_back_and_the_new_one_stays(lcm):
    pipe, plain = sd_pipe(), sd_pipe()
    old, new = pipe.unet, tiny_unet(3)
    lcmlora.accelerate(pipe, lora=lcm)
    pipe.unet = new
    with pytest.warns(LcmLoraWarning, match=r"pipe\.unet is not the one that was accelerated"):
        draw(pipe)
    with pytest.warns(LcmLoraWarning, match=r"pipe\.unet was replaced"):
        lcmlora.restore(pipe)
    assert pipe.unet is new
    assert all(torch.equal(p, q) for p, q in zip(old.parameters(), plain.unet.parameters(), strict=True))
    assert not lcmlora.is_accelerated(pipe)
    lcmlora.restore(lcmlora.accelerate(pipe, lora=lcm))


def test_B6_a_replaced_unet_is_accelerated_by_saying_so_again(lcm):
    pipe, plain = sd_pipe(), sd_pipe()
    old, scheduler = pipe.unet, pipe.scheduler
    lcmlora.accelerate(pipe, lora=lcm)
    pipe.unet = tiny_unet(3)
    other = passed(pipe)
    lcmlora.accelerate(pipe, lora=lcm)
    assert all(torch.equal(p, q) for p, q in zip(old.parameters(), plain.unet.parameters(), strict=True))
    assert not torch.equal(passed(pipe), other)
    lcmlora.restore(pipe)
    assert torch.equal(passed(pipe), other)
    assert pipe.scheduler is scheduler


def shallow(pipe):
    return copy.copy(pipe)


def from_parts(pipe):
    return StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)


def same_class(pipe):
    return type(pipe)(**pipe.components, requires_safety_checker=False)


def sibling(pipe):
    return StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)


@pytest.mark.parametrize("first", ["original", "copy"])
def test_B6_a_shallow_copy_has_a_shell_of_its_own(first, lcm):
    pipe = sd_pipe()
    before, scheduler = snapshot(pipe), pipe.scheduler
    lcmlora.accelerate(pipe, lora=lcm)
    twin = copy.copy(pipe)
    assert (draw(twin) == draw(pipe)).all()
    assert twin.scheduler is not pipe.scheduler
    one, other = (pipe, twin) if first == "original" else (twin, pipe)
    lcmlora.restore(one)
    assert lcmlora.is_accelerated(other)
    assert not lcmlora.is_accelerated(one)
    assert isinstance(other.scheduler, LCMScheduler)
    draw(other)
    lcmlora.restore(other)
    assert_same(before, snapshot(pipe))
    assert twin.scheduler is scheduler
    assert type(twin) is type(pipe) is StableDiffusionPipeline


def test_B6_a_copy_that_nobody_asked_is_told_when_its_original_was_restored(lcm):
    pipe = sd_pipe()
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm)
    twin = copy.copy(pipe)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))
    with pytest.warns(LcmLoraWarning, match="the unet was restored through another pipe"):
        draw(twin)
    lcmlora.restore(twin)
    assert type(twin) is StableDiffusionPipeline
    assert twin.scheduler is pipe.scheduler


@pytest.mark.parametrize("make", [from_parts, same_class, sibling])
def test_B6_a_lost_shell_does_not_lock_the_unet(make, lcm, ink):
    keeper = sd_pipe()
    before = snapshot(keeper)
    shell = make(keeper)
    lcmlora.accelerate(shell, lora=lcm)
    del shell
    gc.collect()
    assert not lcmlora.is_accelerated(keeper)
    lcmlora.accelerate(keeper, styles={"ink": ink})  # other settings are none of a lock's business
    lcmlora.restore(keeper)
    assert_same(before, snapshot(keeper))


def test_B6_what_a_lost_shell_left_can_be_restored(lcm):
    keeper = sd_pipe()
    before = snapshot(keeper)
    shell = from_parts(keeper)
    lcmlora.accelerate(shell, lora=lcm)
    with pytest.raises(PipelineError, match="Its UNet is, through another pipe"):
        lcmlora.restore(keeper)
    del shell
    gc.collect()
    lcmlora.restore(keeper)
    assert_same(before, snapshot(keeper))


@pytest.mark.parametrize("make", [from_parts, same_class, sibling])
def test_B6_a_pipe_made_of_an_accelerated_ones_parts(make, lcm):
    pipe = sd_pipe()
    before, scheduler = snapshot(pipe), pipe.scheduler
    lcmlora.accelerate(pipe, lora=lcm)
    other = make(pipe)
    assert not lcmlora.is_accelerated(other)
    lcmlora.accelerate(other)
    lcmlora.restore(pipe)
    assert lcmlora.status(other).fused
    lcmlora.restore(other)
    assert other.scheduler is scheduler
    assert type(other) in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, DDIMScheduler])
def test_B6_a_replaced_scheduler_is_told_and_the_found_one_comes_back(cls, lcm):
    pipe = sd_pipe()
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm)
    pipe.scheduler = cls.from_config(before["scheduler"].config)
    with pytest.warns(LcmLoraWarning, match=rf"pipe\.scheduler is {cls.__name__}, not LCMScheduler"):
        draw(pipe)
    lcmlora.accelerate(pipe)
    assert isinstance(pipe.scheduler, LCMScheduler)
    pipe.scheduler = cls.from_config(before["scheduler"].config)
    with pytest.warns(LcmLoraWarning, match=f"restore takes the {cls.__name__} out"):
        lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_B6_another_lcm_scheduler_is_as_good(lcm):
    pipe = sd_pipe()
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm)
    expected = draw(pipe)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    assert (draw(pipe) == expected).all()
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


# -- B7: shared text encoders -----------------------------------------------------------------------------------------


def two_pipes():
    one, other = sd_pipe(), sd_pipe(unet=tiny_unet(4))
    other.text_encoder, other.tokenizer = one.text_encoder, one.tokenizer
    return one, other


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("first", [0, 1])
def test_B7_a_style_goes_into_a_shared_text_encoder_once(first, fuse, lcm, ink):
    pipes = two_pipes()
    before, text = [snapshot(pipe) for pipe in pipes], embedded(pipes[0])
    alone = lcmlora.accelerate(sd_pipe(), lora=lcm, styles={"ink": Style(ink, 0.7)}, fuse=fuse)
    for pipe in pipes:
        lcmlora.accelerate(pipe, lora=lcm, styles={"ink": Style(ink, 0.7)}, fuse=fuse)
    assert torch.equal(embedded(pipes[0]), embedded(alone))
    lcmlora.restore(pipes[first])
    assert torch.equal(embedded(pipes[0]), embedded(alone))
    lcmlora.restore(pipes[1 - first])
    assert torch.equal(embedded(pipes[0]), text)
    for pipe, state in zip(pipes, before, strict=True):
        assert_same(state, snapshot(pipe))


def test_B7_other_styles_in_a_shared_text_encoder_are_refused(lcm, ink):
    one, other = two_pipes()
    lcmlora.accelerate(one, lora=lcm, styles={"ink": Style(ink, 0.7)})
    before = snapshot(other)
    with pytest.raises(PipelineError, match=r"pipe\.text_encoder is shared .*copy\.deepcopy"):
        lcmlora.accelerate(other, lora=lcm, styles={"ink": Style(ink, 0.2)})
    assert_same(before, snapshot(other))
    with pytest.warns(LcmLoraWarning, match="they count in this pipe too"):
        lcmlora.accelerate(other, lora=lcm)
    with pytest.raises(PipelineError, match="is shared"):
        lcmlora.set_styles(one, {})
    lcmlora.restore(one)
    lcmlora.restore(other)


# -- B9: pickling -----------------------------------------------------------------------------------------------------


def save(thing):
    torch.save(thing, io.BytesIO())


def spawn(thing):
    process = multiprocessing.get_context("spawn").Process(target=print, args=(thing,))
    process.start()


@pytest.mark.parametrize("way", [pickle.dumps, save, spawn])
@pytest.mark.parametrize("part", ["pipe", "unet"])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_B9_pickling_says_restore_or_bake_first(fuse, part, way, lcm):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
    with pytest.raises(PipelineError, match=r"lcmlora\.restore\(pipe\) first, or lcmlora\.bake\(pipe, folder\)"):
        way(pipe if part == "pipe" else pipe.unet)
    lcmlora.restore(pipe)
    pickle.dumps(pipe.unet)


# -- B10: threads -----------------------------------------------------------------------------------------------------


def in_threads(*works):
    """Run each in a thread of its own; what they raised."""
    raised = []

    def run(work):
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return raised


def test_B10_a_call_that_overlaps_another_is_refused(lcm):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm)
    expected, inside, told = draw(pipe), threading.Event(), threading.Event()
    drawn = []

    def wait(pipe, step, timestep, values):
        inside.set()
        told.wait(30)
        return values

    def second():
        inside.wait(30)
        try:
            with pytest.raises(CallError, match=r"another call of this pipe is running.*copy\.copy\(pipe\)"):
                draw(pipe)
        finally:
            told.set()

    assert not in_threads(lambda: drawn.append(draw(pipe, callback_on_step_end=wait)), second)
    assert (drawn[0] == expected).all()
    assert (draw(pipe) == expected).all()


def test_B10_four_threads_two_shells_four_hundred_pictures(lcm, ink):
    """A server: each request has its own style; the shells share UNet, text encoder and tokenizer."""
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm, styles={"ink": Style(ink, 0.0)}, cache_prompts=3)
    shells = [
        pipe,
        lcmlora.accelerate(StableDiffusionPipeline.from_pipe(pipe, torch_dtype=torch.float32), cache_prompts=3),
    ]
    [shell.set_progress_bar_config(disable=True) for shell in shells]
    prompts = ["a fox", "a cat and a dog in the snow", "x", "a b c d e f"]
    small = {"height": 8, "width": 8, "num_inference_steps": 1, "output_type": "np"}

    def picture(shell, prompt, seed):
        return shell(prompt, generator=torch.Generator().manual_seed(seed), **small).images

    expected = {}
    for weight in (0.0, 0.5):
        lcmlora.set_styles(pipe, {"ink": weight})
        expected |= {(p, weight): picture(pipe, p, 0) for p in prompts}
    lcmlora.set_styles(pipe, {"ink": 0.0})
    right = []

    def work(number):
        for i in range(100):
            prompt, weight = prompts[(i * 7 + number) % 4], 0.5 * (i // 10 % 2)
            with lcmlora.styled(shells[number % 2], {"ink": weight}) as shell:
                right.append((picture(shell, prompt, 0) == expected[prompt, weight]).all())

    assert not in_threads(*[lambda n=n: work(n) for n in range(4)])
    assert sum(right) == len(right) == 400
    assert lcmlora.status(pipe).styles == {}


def test_B10_shells_in_threads_share_a_tokenizer(lcm):
    """No `styled`: calls of two shells run side by side, their prompts are encoded one at a time."""
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm)
    shells = [pipe, lcmlora.accelerate(from_parts(pipe))]
    shells[1].set_progress_bar_config(disable=True)
    small = {"height": 8, "width": 8, "num_inference_steps": 1, "output_type": "np", "guidance_scale": 1.5}
    prompts = ["a", "a longer prompt of several words that is cut", "b c"]

    def picture(shell, prompt):
        return shell(prompt, generator=torch.Generator().manual_seed(0), **small).images

    expected = {p: picture(pipe, p) for p in prompts}
    right = []

    def work(shell):
        for i in range(60):
            right.append((picture(shell, prompts[i % 3]) == expected[prompts[i % 3]]).all())

    assert not in_threads(*[lambda s=s: work(s) for s in shells])
    assert sum(right) == 120


def test_B10_changes_wait_for_calls_and_a_callback_may_change_styles(lcm, ink):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm)
    expected = draw(pipe)
    inside, seen = threading.Event(), []

    def first():
        def slow(pipe, step, timestep, values):
            inside.set()
            seen.append(("step", lcmlora.status(pipe).styles))
            return values

        seen.append(("drawn", (draw(pipe, callback_on_step_end=slow) == expected).all()))

    def second():
        inside.wait(30)
        lcmlora.set_styles(pipe, {"ink": ink})
        seen.append(("changed", None))

    assert not in_threads(first, second)
    assert [kind for kind, _ in seen][-2:] == ["drawn", "changed"]
    assert all(not styles for kind, styles in seen if kind == "step")

    def change(pipe, step, timestep, values):
        lcmlora.set_styles(pipe, {"ink": 0.5 if step == 0 else 0.0})
        return values

    draw(pipe, callback_on_step_end=change)


def test_B10_styled_gives_back_the_styles_also_when_the_block_raises(lcm, ink):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm, styles={"ink": Style(ink, 0.3)})
    expected = passed(pipe)
    with pytest.raises(ZeroDivisionError), lcmlora.styled(pipe, {"ink": 0.9, "b": Style(ink, 0.1)}) as same:
        assert same is pipe
        assert lcmlora.status(pipe).styles == pytest.approx({"ink": 0.9, "b": 0.1})
        raise ZeroDivisionError
    assert torch.equal(passed(pipe), expected)
    with lcmlora.styled(pipe, {"ink": 0.9}):
        lcmlora.accelerate(pipe, steps=6, weight=0.5, styles={"b": Style(ink, 0.1)})
    assert torch.equal(passed(pipe), expected)
    assert lcmlora.status(pipe).steps == 4
    with lcmlora.styled(pipe, {"ink": 0.9}):
        lcmlora.compare(pipe, "a fox", base_steps=(1,), lcm_steps=(1,))  # restores, and accelerates again
    assert torch.equal(passed(pipe), expected)
    with pytest.raises(PipelineError, match="accelerate"), lcmlora.styled(sd_pipe(), {}):
        pass
