"""What a trial from outside found beside the field's rows: other instances of their kinds."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.hooks import apply_group_offloading
from PIL import Image
from test_field_before import embedded, passed, text_style
from test_field_meanwhile import draw, load

import lcmlora
from conftest import assert_same, sd_pipe, sdxl_pipe, snapshot, tiny_unet, tiny_vae, write_lora
from lcmlora import LcmLoraWarning, PipelineError, Style
from test_surroundings import ip_adapter
from tiny_pipelines import MOTION


@pytest.fixture
def lcm(tmp_path):
    return write_lora(tmp_path / "lcm.safetensors", sd_pipe().unet)


@pytest.fixture
def ink(tmp_path):
    return write_lora(tmp_path / "ink.safetensors", sd_pipe().unet, only=lambda n: "attn" in n, seed=7)


@pytest.fixture
def other(tmp_path):
    return write_lora(tmp_path / "other.safetensors", sd_pipe().unet, only=lambda n: "attn" in n, seed=8)


@pytest.fixture
def text(tmp_path):
    return text_style(tmp_path / "text.safetensors", sd_pipe())


# -- bake -------------------------------------------------------------------------------------------------------------


def test_E4_bake_into_the_working_folder_replaces_it_whole(lcm, tmp_path, monkeypatch):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm)
    sd_pipe().save_pretrained(tmp_path / "ck")
    monkeypatch.chdir(tmp_path / "ck")
    folder = lcmlora.bake(pipe, ".", overwrite=True)
    assert (folder / "lcmlora.json").is_file()
    os.chdir(tmp_path)


@pytest.mark.parametrize("folder", ["file/sub", "a\0b", None, 5])
def test_E4_what_is_no_folder_is_told(folder, lcm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PipelineError, match="bake can't write"):
        lcmlora.bake(lcmlora.accelerate(sd_pipe(), lora=lcm), folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_E4_a_link_to_a_checkpoint_is_followed(lcm, tmp_path):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm)
    lcmlora.bake(pipe, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    lcmlora.bake(pipe, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    lcmlora.load_baked(tmp_path / "link")


def unet_replaced(pipe, tmp_path):
    pipe.unet = tiny_unet(3)


def scheduler_replaced(pipe, tmp_path):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)


def weights_loaded(pipe, tmp_path):
    pipe.unet.load_state_dict(tiny_unet(0).state_dict())


def to_meta(pipe, tmp_path):
    cpu_offload(pipe.unet, torch.device("cpu"))


def to_disk(pipe, tmp_path):
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.unet, cpu, cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "off"))


@pytest.mark.parametrize("touch", [unet_replaced, scheduler_replaced, weights_loaded, to_meta, to_disk])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_E4_bake_writes_nothing_that_is_not_what_it_says(fuse, touch, lcm, tmp_path):
    if touch is weights_loaded and not fuse:
        pytest.skip("PEFT's keys are other ones")
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm, fuse=fuse)
    touch(pipe, tmp_path)
    with pytest.raises(PipelineError, match="bake"):
        lcmlora.bake(pipe, tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize("late", [True, False])
def test_E4_bake_refuses_adapters_that_others_set(late, lcm, ink, tmp_path):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm, styles={"ink": ink}, fuse=False)
    if late:
        load(pipe, ink, "late")
        pipe.set_adapters(["lcmlora_lcm", "ink", "late"], [1.0, 0.8, 0.5])
    else:
        pipe.set_adapters(["lcmlora_lcm", "ink"], [1.0, 0.1])
    with pytest.raises(PipelineError, match=r"set_styles\(pipe, styles\) says what shall be"):
        lcmlora.bake(pipe, tmp_path / "baked")
    lcmlora.set_styles(pipe, {"ink": 0.8})
    lcmlora.bake(pipe, tmp_path / "baked")


@pytest.mark.parametrize("mend", ["gone", "moved"])
def test_A9_a_baked_pipe_stays_one_without_its_folder(mend, lcm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lcmlora.bake(lcmlora.accelerate(sd_pipe(), lora=lcm), "baked")
    pipe = lcmlora.load_baked("baked")
    shutil.rmtree("baked") if mend == "gone" else monkeypatch.chdir("/")
    with pytest.raises(PipelineError, match="LCM is merged into this pipe already"):
        lcmlora.accelerate(pipe, lora=lcm)


@pytest.mark.parametrize(
    "written", ['{"call": null, "merged": {}}', '{"merged": null}', "[1]", "{", '{"merged": [1]}']
)
def test_A9_another_lcmlora_json_is_told(written, lcm, tmp_path):
    folder = lcmlora.bake(lcmlora.accelerate(sd_pipe(), lora=lcm), tmp_path / "baked")
    (folder / "lcmlora.json").write_text(written)
    with pytest.raises(PipelineError, match=r"was not made by lcmlora\.bake"):
        lcmlora.load_baked(folder)


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_B7_one_text_encoder_in_both_places(fuse, tmp_path):
    pipe = sdxl_pipe()
    pipe.text_encoder = pipe.text_encoder_2
    lora, style = write_lora(tmp_path / "l.safetensors", pipe.unet), text_style(tmp_path / "t.safetensors", pipe)
    before = snapshot(pipe)
    with pytest.warns(LcmLoraWarning, match="left out, as this pipe has no text_encoder_2"):
        lcmlora.accelerate(pipe, lora=lora, styles={"t": Style(style, 0.5)}, fuse=fuse)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("off_load", ["meta", "disk"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_A6_a_text_encoder_that_is_off_loaded_takes_no_style(when, off_load, lcm, text, tmp_path):
    pipe, cpu = sd_pipe(), torch.device("cpu")

    def away():
        if off_load == "meta":
            cpu_offload(pipe.text_encoder, cpu)
        else:
            folder = str(tmp_path / "off")
            apply_group_offloading(pipe.text_encoder, cpu, cpu, offload_type="leaf_level", offload_to_disk_path=folder)

    if when == "before":
        away()
    lcmlora.accelerate(pipe, lora=lcm)
    if when == "after":
        away()
    with pytest.raises(PipelineError, match="text_encoder are off-loaded"):
        lcmlora.set_styles(pipe, {"t": text})
    lcmlora.restore(pipe)


def test_A2_a_weight_that_two_layers_share_is_not_merged(lcm):
    def tied():
        pipe = sd_pipe()
        attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        attention.to_k.weight = attention.to_q.weight
        return pipe

    pipe, plain = tied(), tied()
    load(plain, lcm, "lcm")
    before = snapshot(pipe)
    with pytest.raises(PipelineError, match="share one weight"):
        lcmlora.accelerate(pipe, lora=lcm, fuse=True)
    lcmlora.accelerate(pipe, lora=lcm)
    torch.testing.assert_close(passed(pipe), passed(plain), atol=1e-5, rtol=1e-4)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_B3_a_text_encoder_that_got_other_parameters_before_its_first_style(lcm, text):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm)
    pipe.text_encoder.load_state_dict({k: v.clone() for k, v in pipe.text_encoder.state_dict().items()}, assign=True)
    expected = embedded(pipe)
    lcmlora.set_styles(pipe, {"t": text})
    lcmlora.set_styles(pipe, {"t": 0.2})
    lcmlora.restore(pipe)
    assert torch.equal(embedded(pipe), expected)


def unload_ip_adapter(pipe):
    pipe.unload_ip_adapter()


def train_a_norm(pipe):
    pipe.unet.conv_norm_out.weight.data.mul_(1.5)


def replace_conv_in(pipe):
    pipe.unet.conv_in = torch.nn.Conv2d(4, 8, 3, padding=1)


@pytest.mark.parametrize("touch", [unload_ip_adapter, train_a_norm, replace_conv_in])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_B3_what_lcmlora_never_changed_is_the_users_to_change(fuse, touch, lcm, ink):
    pipe = sd_pipe()
    plain = {name: layer.weight.clone() for name, layer in lcmlora.layers.lcm_layers(pipe.unet).items()}
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    pipe.image_encoder = pipe.feature_extractor = None
    lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
    touch(pipe)
    lcmlora.set_styles(pipe, {"ink": ink})
    lcmlora.restore(pipe)
    assert all(torch.equal(x.weight, plain[n]) for n, x in lcmlora.layers.lcm_layers(pipe.unet).items())


@pytest.mark.parametrize("act", [lcmlora.restore, lambda pipe: lcmlora.set_styles(pipe, {"s": 0.3})])
def test_B3_originals_on_disk_outlive_their_files_name(act, lcm, ink, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pipe, plain = sd_pipe(), sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm, styles={"s": ink}, keep="disk")
    [file.unlink() for file in tmp_path.glob("lcmlora-originals-*")]
    act(pipe)
    if lcmlora.is_accelerated(pipe):
        lcmlora.restore(pipe)
    assert all(torch.equal(p, q) for p, q in zip(pipe.unet.parameters(), plain.unet.parameters(), strict=True))


# -- what is said counts, whatever others did ------------------------------------------------------------------------


def set_the_style(pipe, ink):
    pipe.set_adapters(["lcmlora_lcm", "ink"], [1.0, 0.1])


def set_the_lcm(pipe, ink):
    pipe.set_adapters(["lcmlora_lcm", "ink"], [0.2, 0.8])


def delete_the_style(pipe, ink):
    pipe.delete_adapters("ink")


def load_another(pipe, ink):
    load(pipe, ink, "late")
    pipe.set_adapters(["lcmlora_lcm", "ink", "late"], [1.0, 0.8, 0.5])


@pytest.mark.parametrize("touch", [set_the_style, set_the_lcm, delete_the_style, load_another])
@pytest.mark.parametrize("act", ["styles", "accelerate"])
def test_E1_equal_is_judged_by_the_pipe(act, touch, lcm, ink):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm, styles={"ink": Style(ink, 0.8)}, fuse=False)
    expected = passed(pipe)
    touch(pipe, ink)
    if act == "styles":
        lcmlora.set_styles(pipe, {"ink": 0.8})
    else:
        lcmlora.accelerate(pipe, weight=1.0, styles={"ink": 0.8})
    torch.testing.assert_close(passed(pipe), expected)


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_E1_an_empty_dict_turns_late_ones_off_too(fuse, lcm, text):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm, fuse=fuse)
    expected, words = passed(pipe), embedded(pipe)
    load(pipe, text, "late")
    lcmlora.set_styles(pipe, {})
    torch.testing.assert_close(passed(pipe), expected)
    torch.testing.assert_close(embedded(pipe), words)


def test_E1_one_layer_of_a_merged_unet(lcm, ink):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm, styles={"ink": ink})
    expected = passed(pipe)
    pipe.unet.mid_block.resnets[0].conv1.weight.data += 1
    with pytest.warns(LcmLoraWarning, match="is undone now"):
        lcmlora.set_styles(pipe, {"ink": 0.8})
    assert torch.equal(passed(pipe), expected)


def test_B4_an_lcm_lora_of_another_weight_is_told(lcm):
    for weight in (0.0, 0.4):
        pipe = lcmlora.accelerate(sd_pipe(), lora=lcm, fuse=False)
        pipe.set_adapters(["lcmlora_lcm"], [weight])
        with pytest.warns(LcmLoraWarning, match="does not count with 1 any more"):
            draw(pipe)


@pytest.mark.parametrize("name", ["ink", "lcmlora_lcm", "own"])
def test_B4_a_late_lora_with_a_name_that_is_taken_is_refused(name, lcm, ink, other):
    pipe = sd_pipe()
    load(pipe, ink, "own")
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, styles={"ink": Style(ink, 0.5)})
    load(pipe, other, name)
    with pytest.raises(PipelineError, match=rf"pipe\.delete_adapters\('{name}'\)"):
        lcmlora.set_styles(pipe, {"ink": 0.6})
    with pytest.warns(LcmLoraWarning, match=name):
        lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_B10_styled_gives_back_files_and_late_loras(fuse, lcm, ink, other):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm, styles={"ink": Style(ink, 0.5)}, fuse=fuse)
    expected = passed(pipe)
    with lcmlora.styled(pipe, {"ink": Style(other, 0.5)}):
        assert not torch.equal(passed(pipe), expected)
    torch.testing.assert_close(passed(pipe), expected)
    load(pipe, other, "late")
    if not fuse:
        pipe.set_adapters(["lcmlora_lcm", "ink", "late"], [1.0, 0.5, 0.7])
    expected = passed(pipe)
    with lcmlora.styled(pipe, {"ink": 0.1}):
        pass
    torch.testing.assert_close(passed(pipe), expected, atol=1e-5, rtol=1e-4)


def test_B10_a_restore_inside_a_block_ends_it(lcm, ink):
    pipe = sd_pipe()
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, styles={"ink": ink})
    with lcmlora.styled(pipe, {}):
        lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))
    with pytest.raises(ZeroDivisionError), lcmlora.accelerated(pipe, lora=lcm):
        lcmlora.restore(pipe)
        raise ZeroDivisionError
    assert_same(before, snapshot(pipe))


def test_B10_restore_inside_a_call_is_refused(lcm):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm)

    def back(pipe, step, timestep, values):
        with pytest.raises(PipelineError, match="from inside a call"):
            lcmlora.restore(pipe)
        return values

    draw(pipe, callback_on_step_end=back)


def test_B6_what_was_said_holds_for_a_new_unet(lcm, ink):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm, styles={"ink": Style(ink, 0.5)})
    expected = passed(pipe)
    pipe.unet = tiny_unet(0)
    lcmlora.accelerate(pipe)
    assert torch.equal(passed(pipe), expected)
    pipe.unet = tiny_unet(0)
    lcmlora.set_styles(pipe, {"ink": 0.5})
    assert torch.equal(passed(pipe), expected)


def test_B6_a_unet_made_of_merged_weights_is_refused(lcm):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm)
    pipe.image_encoder = pipe.feature_extractor = None
    motion = AnimateDiffPipeline.from_pipe(pipe, motion_adapter=MotionAdapter(**MOTION), torch_dtype=torch.float32)
    with pytest.raises(PipelineError, match="copied from an accelerated pipe"):
        lcmlora.accelerate(motion, lora=lcm)
    lcmlora.restore(pipe)
    motion = AnimateDiffPipeline.from_pipe(pipe, motion_adapter=MotionAdapter(**MOTION), torch_dtype=torch.float32)
    lcmlora.accelerate(motion, lora=lcm)


@pytest.mark.parametrize("act", ["steps", "styles", "restore"])
def test_B6_a_vae_of_the_users_own_stays(act, lcm):
    pipe, vae = lcmlora.accelerate(sd_pipe(), lora=lcm), tiny_vae()
    pipe.vae = vae
    if act == "steps":
        lcmlora.accelerate(pipe, steps=6)
    elif act == "styles":
        lcmlora.set_styles(pipe, {})
    assert pipe.vae is vae
    lcmlora.restore(pipe)
    assert pipe.vae is vae


def test_B6_an_lcm_scheduler_of_the_users_own_stays_until_restore(lcm):
    pipe = sd_pipe()
    found = pipe.scheduler
    lcmlora.accelerate(pipe, lora=lcm)
    mine = pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    lcmlora.accelerate(pipe, steps=6)
    assert pipe.scheduler is mine
    lcmlora.restore(pipe)
    assert pipe.scheduler is found


def without_scheduler(pipe):
    pipe.scheduler = None


def without_config(pipe):
    pipe.scheduler = type("Bare", (), {})()


@pytest.mark.parametrize("touch", [without_scheduler, without_config])
def test_B6_a_scheduler_that_is_none_is_told(touch, lcm):
    pipe = sd_pipe()
    touch(pipe)
    with pytest.raises(PipelineError, match="has no scheduler"):
        lcmlora.accelerate(pipe, lora=lcm)


def test_B6_betas_in_an_array(lcm):
    pipe = sd_pipe()
    pipe.scheduler = DDIMScheduler(trained_betas=np.linspace(0.0001, 0.02, 1000))
    lcmlora.accelerate(pipe, lora=lcm)
    lcmlora.accelerate(pipe, steps=6)


def test_B10_nobody_writes_into_the_remembered_prompts(lcm):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm, cache_prompts=np.int64(4))
    expected = draw(pipe)

    def spoil(pipe, step, timestep, values):
        values["prompt_embeds"].mul_(0)
        return values

    draw(pipe, callback_on_step_end=spoil, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    with torch.no_grad():
        pipe.encode_prompt("a fox", torch.device("cpu"), 1, False)[0].mul_(0)
    assert (draw(pipe) == expected).all()


@pytest.mark.parametrize("name", ["train", "keys", "pop", "forward", "to"])
def test_E7_names_that_no_adapter_can_have_are_refused(name, lcm, ink):
    with pytest.raises(PipelineError, match="can't be used"):
        lcmlora.accelerate(sd_pipe(), lora=lcm, styles={name: ink}, fuse=False)


@pytest.mark.parametrize("name", ["0", "attn1", "conv1", "to_q", "base_layer", "lora_A", "net"])
def test_E7_names_of_layers_are_names(name, lcm, ink):
    pipe = lcmlora.accelerate(sd_pipe(), lora=lcm, styles={name: ink}, fuse=False)
    fresh = lcmlora.accelerate(sd_pipe(), lora=lcm, styles={"s": ink}, fuse=False)
    torch.testing.assert_close(passed(pipe), passed(fresh))


def test_D5_a_dict_with_another_tensor_is_another_source(lcm, ink):
    from safetensors.torch import load_file

    pipe, tensors = lcmlora.accelerate(sd_pipe(), lora=lcm), load_file(ink)
    lcmlora.set_styles(pipe, {"s": tensors})
    before = passed(pipe)
    for key in tensors:
        tensors[key] = tensors[key] * 1.5
    lcmlora.set_styles(pipe, {"s": tensors})
    assert not torch.equal(passed(pipe), before)


def test_A7_adapters_made_under_inference_mode_work_outside(lcm, ink):
    pipe = sd_pipe()
    before = snapshot(pipe)
    with torch.inference_mode():
        lcmlora.accelerate(pipe, lora=lcm, fuse=False)
    lcmlora.set_styles(pipe, {"s": ink})
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_B4_a_lora_on_an_ip_adapter_that_is_gone_is_given_up(lcm):
    from peft import LoraConfig

    pipe = sd_pipe()
    scheduler = pipe.scheduler
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    pipe.image_encoder = pipe.feature_extractor = None
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k_ip.0", "to_q"]), adapter_name="own")
    lcmlora.accelerate(pipe, lora=lcm)
    pipe.unload_ip_adapter()
    with pytest.warns(LcmLoraWarning, match="gave back what it could"):
        lcmlora.restore(pipe, force=True)
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize("start", [0.0, 0, 1.0, "x", np.float32(0.5)])
def test_C2_a_split_that_diffusers_ignores_is_none(start, tmp_path):
    pipe = sdxl_pipe(cls=StableDiffusionXLImg2ImgPipeline)
    lcmlora.accelerate(pipe, lora=write_lora(tmp_path / "l.safetensors", pipe.unet))
    passes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: passes.append(1))
    pipe("a fox", image=Image.new("RGB", (16, 16)), strength=0.5, denoising_start=start, output_type="np")
    assert len(passes) == 4


def test_C2_a_split_at_a_strength_that_leaves_no_step_is_refused(tmp_path):
    pipe = sdxl_pipe(cls=StableDiffusionXLImg2ImgPipeline)
    lcmlora.accelerate(pipe, lora=write_lora(tmp_path / "l.safetensors", pipe.unet))
    with pytest.raises(lcmlora.CallError, match="lies there"):
        pipe("a fox", image=Image.new("RGB", (16, 16)), strength=0.3, denoising_end=0.5, output_type="np")
