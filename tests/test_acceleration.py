"""accelerate, restore and what lies between, on real pipelines with tiny random weights."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import lcmlora
from conftest import PIPES, assert_same, sd_pipe, sdxl_pipe, snapshot, tiny_unet, write_lora
from lcmlora.meanwhile import plainly
from lcmlora.transition import transaction
from lcmlora.transition.snapshot import Component

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def call(pipe, **changes):
    arguments = {"height": 16, "width": 16, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipe("a fox", **{**arguments, **changes}).images


def unet_calls(pipe) -> list[int]:
    """Batch size of each UNet pass from now on."""
    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    return batches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", PIPES)
def test_restore_is_bit_identical(kind, fuse, dtype, lcm_file):
    pipe = PIPES[kind]().to(DTYPES[dtype])
    file = lcm_file(pipe)
    before = snapshot(pipe)
    assert lcmlora.accelerate(pipe, lora=file, fuse=fuse) is pipe
    changed = {k: v for k, v in snapshot(pipe).items() if k.startswith("unet.")} if fuse else {}
    assert all(not torch.equal(before[k][1], v[1]) for k, v in changed.items() if k.endswith("to_q.weight")), (
        "nothing was merged"
    )
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("kind", PIPES)
def test_users_own_adapters_stay_active_and_come_back(kind, fuse, lcm_file, tmp_path):
    pipe = PIPES[kind]()
    attention = write_lora(
        tmp_path / "s.safetensors", pipe.unet, only=lambda n: "attn" in n, seed=5, spelling="diffusers"
    )
    pipe.load_lora_weights(tmp_path, weight_name=attention.name, adapter_name="toy")
    pipe.set_adapters(["toy"], [0.6])
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), fuse=fuse)
    status = lcmlora.status(pipe)
    assert status.styles == pytest.approx({"toy": 0.6})
    assert status.fused is fuse
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))
    assert pipe.get_active_adapters() == ["toy"]


@pytest.mark.parametrize("kind", PIPES)
def test_fused_equals_unfused_equals_plain_diffusers(kind, lcm_file, tmp_path):
    """The three ways give one picture; "plain" is the published recipe, typed by hand."""
    lora, style = lcm_file(PIPES[kind]()), tmp_path / "s.safetensors"
    write_lora(style, PIPES[kind]().unet, only=lambda n: "attn" in n, seed=5, alpha=8.0)
    plain = PIPES[kind]()
    plain.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="lcm")
    plain.load_lora_weights(str(style.parent), weight_name=style.name, adapter_name="style")
    plain.set_adapters(["lcm", "style"], [1.0, 0.8])
    plain.scheduler = LCMScheduler.from_config(plain.scheduler.config, clip_sample=False)
    expected = call(plain, num_inference_steps=4, guidance_scale=1.0)
    for fuse in (True, False):
        pipe = lcmlora.accelerate(PIPES[kind](), lora=lora, styles={"s": style}, fuse=fuse)
        torch.testing.assert_close(torch.from_numpy(call(pipe)), torch.from_numpy(expected), atol=2e-3, rtol=0)
    bare = PIPES[kind]()
    assert abs(call(bare, num_inference_steps=4) - expected).max() > 0.01, "the LoRA makes no difference: a vain test"


def test_calls_get_four_steps_and_one_pass_each(lcm_file):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    batches = unet_calls(pipe)
    call(pipe)
    assert batches == [1, 1, 1, 1]
    batches.clear()
    call(pipe, num_inference_steps=2, guidance_scale=1.5)
    assert batches == [2, 2]


def test_restored_pipe_has_its_old_defaults(lcm_file):
    pipe = sd_pipe()
    expected = call(pipe, num_inference_steps=3)
    lcmlora.restore(lcmlora.accelerate(pipe, lora=lcm_file(pipe)))
    assert (call(pipe, num_inference_steps=3) == expected).all()
    batches = unet_calls(pipe)
    call(pipe)
    assert batches == [2] * 50


def test_scheduler_drops_what_harms(lcm_file):
    pipe = sd_pipe()
    pipe.scheduler.register_to_config(rescale_betas_zero_snr=True, clip_sample=True)
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    config = pipe.scheduler.config
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert (config.clip_sample, config.rescale_betas_zero_snr, config.beta_end) == (False, False, 0.012)


def test_same_call_twice_is_nothing(lcm_file):
    pipe = sd_pipe()
    file = lcm_file(pipe)
    lcmlora.accelerate(pipe, lora=file)
    state = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=file)
    assert_same(state, snapshot(pipe))


def test_context_manager_restores_when_the_body_raises(lcm_file):
    pipe = sd_pipe()
    before = snapshot(pipe)
    with pytest.raises(ZeroDivisionError), lcmlora.accelerated(pipe, lora=lcm_file(pipe)) as same:
        assert same is pipe
        assert lcmlora.is_accelerated(pipe)
        raise ZeroDivisionError
    assert not lcmlora.is_accelerated(pipe)
    assert_same(before, snapshot(pipe))


def test_restore_of_an_untouched_pipe_says_so():
    with pytest.raises(lcmlora.PipelineError, match="not accelerated"):
        lcmlora.restore(sd_pipe())


def test_keep_nothing_refuses_to_restore(lcm_file):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm_file(sd_pipe()), keep=None)
    assert lcmlora.status(pipe).kept_bytes == 0
    with pytest.raises(lcmlora.PipelineError, match="keep='memory'"):
        lcmlora.restore(pipe)
    assert lcmlora.is_accelerated(pipe)


@pytest.mark.parametrize("block", ["accelerated", "styled", "plainly"])
def test_ctrl_c_on_a_blocks_way_back_waits_for_its_end(block, lcm_file, monkeypatch):
    pipe = sd_pipe()
    settings = {"lora": lcm_file(pipe), "styles": {"ink": lcm_file(pipe, "ink.safetensors")}}
    if block != "accelerated":
        lcmlora.accelerate(pipe, **settings)
    before = lcmlora.status(pipe)
    back = (transaction, "merge") if block == "plainly" else (Component, "of")
    real, left = getattr(*back), [KeyboardInterrupt()]

    def stopped_once(*given):
        if left:
            raise left.pop()
        return real(*given)

    def run():
        blocks = {"accelerated": lcmlora.accelerated, "styled": lcmlora.styled, "plainly": plainly}
        more = {"accelerated": settings, "styled": {"styles": {}}, "plainly": {}}
        with blocks[block](pipe, **more[block]):
            assert lcmlora.status(pipe) != before
            monkeypatch.setattr(*back, stopped_once if block == "plainly" else staticmethod(stopped_once))

    with pytest.raises(KeyboardInterrupt):
        run()
    assert lcmlora.status(pipe) == before


def test_of_two_threads_one_is_let_into_the_block(lcm_file):
    pipe = sd_pipe()
    file, entered, left, found = lcm_file(pipe), Barrier(2), Event(), []

    def enter():
        entered.wait()
        try:
            with lcmlora.accelerated(pipe, lora=file):
                left.wait(60)
                found.append(lcmlora.is_accelerated(pipe))
        except lcmlora.PipelineError as error:
            found.append(str(error))
            left.set()

    before = snapshot(pipe)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: enter(), range(2)))
    refused = [one for one in found if one is not True]
    assert len(found) == 2
    assert ["accelerated already" in one for one in refused] == [True]
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("step", ["load", "scheduler", "install"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_fails_is_rolled_back(step, error, fuse, lcm_file, monkeypatch):
    pipe = sd_pipe()
    file = lcm_file(pipe)
    before = snapshot(pipe)
    seen = 0

    def fail(*args, **kwargs):
        nonlocal seen
        seen += 1
        if step != "load" or seen > 5:  # in the middle of the layers
            raise error("on purpose")
        return real(*args, **kwargs)

    if step == "load":
        real = lcmlora.lora.merge.load
        monkeypatch.setattr("lcmlora.lora.merge.load", fail)
    elif step == "scheduler":
        monkeypatch.setattr(StableDiffusionPipeline, "__setattr__", fail)
    else:
        monkeypatch.setattr("lcmlora.calls.governed", fail)
    with pytest.raises(error):
        try:
            lcmlora.accelerate(pipe, lora=file, fuse=fuse)
        finally:
            monkeypatch.undo()
    assert_same(before, snapshot(pipe))
    assert not lcmlora.is_accelerated(pipe)
    lcmlora.restore(lcmlora.accelerate(pipe, lora=file, fuse=fuse))


def test_siblings_share_the_unet_and_keep_their_own_shell(lcm_file):
    pipe = sd_pipe()
    before = snapshot(pipe)
    sibling = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    file = lcm_file(pipe)
    lcmlora.accelerate(pipe, lora=file)
    assert not lcmlora.is_accelerated(sibling)
    lcmlora.accelerate(sibling, lora=file)
    lcmlora.restore(pipe)
    assert lcmlora.status(sibling).fused
    lcmlora.restore(sibling)
    assert_same(before, snapshot(pipe))


def test_a_deep_copy_is_accelerated_and_restores_itself_alone(lcm_file):
    pipe = sd_pipe()
    original = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    merged = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    twin = copy.deepcopy(pipe)
    lcmlora.restore(twin)
    assert all(torch.equal(p, original[name]) for name, p in twin.unet.named_parameters())
    assert all(torch.equal(p, merged[name]) for name, p in pipe.unet.named_parameters())
    assert lcmlora.is_accelerated(pipe)
    assert isinstance(pipe.scheduler, LCMScheduler)


def test_an_accelerated_pipe_is_still_its_class(lcm_file, tmp_path):
    pipe = sd_pipe()
    plain = type(pipe)
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    assert isinstance(pipe, StableDiffusionPipeline)
    assert (type(pipe).__name__, type(pipe).__qualname__, type(pipe).__module__) == (
        plain.__name__,
        plain.__qualname__,
        plain.__module__,
    )
    assert type(sd_pipe()) is plain
    with pytest.warns(lcmlora.LcmLoraWarning, match="with the LCM-LoRA in it, and nothing that says so"):
        pipe.save_pretrained(tmp_path / "saved")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, LCMScheduler)
    torch.testing.assert_close(call(again, num_inference_steps=4, guidance_scale=1.0), call(pipe))


def test_saving_an_accelerated_pipe_says_what_is_written(lcm_file, tmp_path):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), fuse=False)
    with pytest.warns(lcmlora.LcmLoraWarning, match="with PEFT's names.*lcmlora.bake.*lcmlora.restore"):
        pipe.save_pretrained(tmp_path / "saved")
    lcmlora.bake(pipe, tmp_path / "baked")  # says nothing
    with pytest.warns(lcmlora.LcmLoraWarning, match=r"with the LCM-LoRA in it.*lcmlora\.bake.*is called\.$"):
        lcmlora.load_baked(tmp_path / "baked").save_pretrained(tmp_path / "again")
    lcmlora.restore(pipe).save_pretrained(tmp_path / "plain")


def test_status_tells_what_is_active(lcm_file):
    pipe = sd_pipe()
    assert lcmlora.status(pipe).to_dict()["accelerated"] is False
    file = lcm_file(pipe)
    lcmlora.accelerate(pipe, lora=file, steps=6, guidance=1.2)
    status = lcmlora.status(pipe)
    assert (status.base, status.lora, status.steps, status.guidance) == ("custom", str(file), 6, 1.2)
    assert status.scheduler == "LCMScheduler"
    merged = sum(layer.weight.nbytes for layer in lcmlora.layers.lcm_layers(pipe.unet).values())
    assert status.kept_bytes == merged


def test_styles_reach_the_text_encoder_and_leave_it_again(tmp_path, lcm_file):
    pipe = sd_pipe()
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    halves = {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(32, 2)}
    style = write_lora(
        tmp_path / "s.safetensors", pipe.unet, only=lambda n: "attn1.to_q" in n, spelling="diffusers", extra=halves
    )
    before = snapshot(pipe)
    embedding = pipe.encode_prompt("a fox", "cpu", 1, False)[0]
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), styles={"s": lcmlora.Style(style, 0.5)})
    assert lcmlora.status(pipe).styles == {"s": 0.5}
    assert not torch.allclose(pipe.encode_prompt("a fox", "cpu", 1, False)[0], embedding)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))
    assert torch.equal(pipe.encode_prompt("a fox", "cpu", 1, False)[0], embedding)


def test_refusals_touch_nothing(lcm_file, tmp_path):
    pipe, file = sd_pipe(), lcm_file(sd_pipe())
    wrong = {
        "unknown unet": (dict(), lcmlora.BaseModelError, "no known base"),
        "unknown name": (dict(base="sd9"), lcmlora.BaseModelError, "'sd15'"),
        "another base": (dict(base="sdxl", lora=file), lcmlora.BaseModelError, "Stable Diffusion XL"),
        "no such file": (dict(lora="nowhere at all"), lcmlora.LoraFileError, "no file, no folder"),
        "not cached": (dict(lora="owner/name"), lcmlora.LoraFileError, "hf download owner/name"),
        "fuse": (dict(lora=file, fuse="yes"), lcmlora.PipelineError, "fuse='yes'"),
        "keep": (dict(lora=file, keep="ram"), lcmlora.PipelineError, "keep='ram'"),
        "steps": (dict(lora=file, steps=0), lcmlora.CallError, "1 to 50"),
        "guidance": (dict(lora=file, guidance=7.5), lcmlora.CallError, "1 to 2"),
        "weight": (dict(lora=file, weight=float("nan")), lcmlora.CallError, "no number between"),
        "style name": (dict(lora=file, styles={"a.b": file}), lcmlora.PipelineError, "dot"),
    }
    before = snapshot(pipe)
    for case, (arguments, error, words) in wrong.items():
        with pytest.raises(error, match=words):
            lcmlora.accelerate(pipe, **arguments)
        assert_same(before, snapshot(pipe)), case


def test_wrong_pipelines_are_refused(lcm_file):
    full = sd_pipe(unet=tiny_unet(time_cond_proj_dim=8))
    with pytest.raises(lcmlora.PipelineError, match="full latent consistency model"):
        lcmlora.accelerate(full, lora=lcm_file(full))
    pipe = sd_pipe()
    with pytest.raises(lcmlora.PipelineError, match="pipeline"):
        lcmlora.accelerate(pipe.unet, lora=lcm_file(pipe))
    with pytest.raises(lcmlora.PipelineError, match="diffusers pipeline"):
        lcmlora.accelerate(object())
    pipe.fuse_qkv_projections()
    with pytest.raises(lcmlora.PipelineError, match="unfuse_qkv_projections"):
        lcmlora.accelerate(pipe, lora=lcm_file(sd_pipe()))


def test_lora_fused_by_hand_is_refused(lcm_file, tmp_path):
    pipe = sd_pipe()
    style = write_lora(tmp_path / "s.safetensors", pipe.unet)
    pipe.load_lora_weights(str(tmp_path), weight_name=style.name, adapter_name="toy")
    pipe.fuse_lora()
    with pytest.raises(lcmlora.PipelineError, match="unfuse_lora"):
        lcmlora.accelerate(pipe, lora=lcm_file(sd_pipe()))


def test_v_prediction_warns(lcm_file):
    pipe = sd_pipe()
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.warns(lcmlora.LcmLoraWarning, match="v_prediction"):
        lcmlora.accelerate(pipe, lora=lcm_file(pipe))


def test_sdxl_is_one_pass_a_step_too(lcm_file):
    pipe = sdxl_pipe()
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    batches = unet_calls(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lcmlora.LcmLoraWarning)
        call(pipe)
    assert batches == [1, 1, 1, 1]
