"""Field cases A1 to A9: what is in the pipe when `accelerate` comes."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, UNetMotionModel
from diffusers.hooks import apply_group_offloading
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

import lcmlora
from conftest import PIPES, assert_same, sd_pipe, sdxl_pipe, snapshot, write_lora
from lcmlora import PipelineError, Style
from lcmlora.layers import ModuleIndex
from test_surroundings import ip_adapter
from tiny_pipelines import MOTION


def passed(pipe) -> torch.Tensor:
    """What the UNet makes of fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    unet = pipe.unet
    motion = isinstance(unet, UNetMotionModel)
    frames = (1, 4, 2, 8, 8) if motion else (1, 4, 8, 8)
    text = torch.randn(1 + motion, 4, unet.config.cross_attention_dim, generator=generator)
    more = {}
    if unet.config.get("addition_embed_type") == "text_time":
        more = {"added_cond_kwargs": {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)}}
    with torch.no_grad():
        sample = torch.randn(frames, generator=generator)
        return unet(sample, torch.tensor(999), encoder_hidden_states=text, **more).sample


def embedded(pipe) -> torch.Tensor:
    with torch.no_grad():
        return pipe.encode_prompt("a fox", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]


def reference(make, lcm, *others, weights=(1.0,), names=("lcm",)):
    """Plain diffusers with the same files as adapters."""
    pipe = make()
    pipe.load_lora_weights(str(lcm.parent), weight_name=lcm.name, adapter_name="lcm")
    for file, name in zip(others, names[1:], strict=True):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    pipe.set_adapters(list(names), list(weights))
    return pipe


def animate() -> AnimateDiffPipeline:
    plain = sd_pipe()
    torch.manual_seed(4)
    adapter = MotionAdapter(**MOTION)
    unet = UNetMotionModel.from_unet2d(plain.unet, adapter)
    parts = {name: part for name, part in plain.components.items() if name in ("vae", "text_encoder", "tokenizer")}
    pipe = AnimateDiffPipeline(**parts, unet=unet, motion_adapter=adapter, scheduler=plain.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def motion_lora(path, unet, only=lambda name: True):
    """In the layout of the published motion LoRAs."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, layer in ModuleIndex.of(unet).layers.items():
        if ".motion_modules." in name and name.endswith(("to_q", "to_k", "to_v", "to_out.0")) and only(name):
            front, _, last = name.removesuffix(".0" if name.endswith("to_out.0") else "").rpartition(".")
            out, width = layer.weight.shape
            key = f"unet.{front}.processor.{last}_lora"
            tensors[f"{key}.down.weight"] = torch.randn(3, width, generator=generator) * 0.3
            tensors[f"{key}.up.weight"] = torch.randn(out, 3, generator=generator) * 0.3
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("only", [lambda n: True, lambda n: "attn1" in n, lambda n: n.endswith("to_q")])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_A1_a_motion_lora_keeps_its_effect(fuse, only, tmp_path):
    pipe = animate()
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    motion = motion_lora(tmp_path / "m.safetensors", pipe.unet, only)
    expected = passed(reference(animate, lcm, motion, names=("lcm", "zoom"), weights=(1.0, 0.7)))
    pipe.load_lora_weights(str(tmp_path), weight_name=motion.name, adapter_name="zoom")
    pipe.set_adapters(["zoom"], [0.7])
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
    assert lcmlora.status(pipe).styles == pytest.approx({"zoom": 0.7})
    torch.testing.assert_close(passed(pipe), expected, atol=1e-4, rtol=1e-4)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_A1_a_motion_lora_is_a_style(fuse, tmp_path):
    pipe = animate()
    before = snapshot(pipe)
    lcm, motion = (
        write_lora(tmp_path / "lcm.safetensors", pipe.unet),
        motion_lora(tmp_path / "m.safetensors", pipe.unet),
    )
    expected = passed(reference(animate, lcm, motion, names=("lcm", "zoom"), weights=(1.0, 0.7)))
    lcmlora.accelerate(pipe, lora=lcm, styles={"zoom": Style(motion, 0.7)}, fuse=fuse)
    torch.testing.assert_close(passed(pipe), expected, atol=1e-4, rtol=1e-4)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def token_embedding(pipe):
    config = LoraConfig(r=2, target_modules=["token_embedding", "q_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, pipe.text_encoder, adapter_name="own")
    pipe.text_encoder._hf_peft_config_loaded = True
    return "text_encoder"


def with_bias(pipe):
    config = LoraConfig(r=2, target_modules=["proj_in"], lora_bias=True, init_lora_weights=False)
    pipe.unet.add_adapter(config, adapter_name="own")
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter)
    return "unet"


def modules_to_save(pipe, name="conv_in"):
    config = LoraConfig(r=2, target_modules=["to_q"], modules_to_save=[name], init_lora_weights=False)
    pipe.unet.add_adapter(config, adapter_name="own")
    for name, parameter in pipe.unet.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    return "unet"


def a_block_to_save(pipe):
    return modules_to_save(pipe, "time_embedding")


def loha(pipe):
    inject_adapter_in_model(
        LoHaConfig(r=2, target_modules=["to_k"], init_weights=False), pipe.unet, adapter_name="own"
    )
    pipe.unet._hf_peft_config_loaded = True
    return "unet"


def dora(pipe):
    config = LoraConfig(r=2, target_modules=["to_q"], use_dora=True, init_lora_weights=False)
    pipe.unet.add_adapter(config, adapter_name="own")
    return "unet"


ODD = {f.__name__: f for f in (token_embedding, with_bias, modules_to_save, a_block_to_save, loha, dora)}


@pytest.mark.parametrize("kind", ODD)
def test_A2_an_adapter_that_merging_does_not_know_is_left_whole(kind, tmp_path):
    pipe = sd_pipe()
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    where = ODD[kind](pipe)
    before = snapshot(pipe)
    with pytest.raises(PipelineError, match="fuse=True is impossible here: "):
        lcmlora.accelerate(pipe, lora=lcm, fuse=True)
    assert_same(before, snapshot(pipe))
    text = embedded(pipe)
    lcmlora.accelerate(pipe, lora=lcm)
    assert lcmlora.status(pipe).fused == (where == "text_encoder")
    assert "own" in lcmlora.status(pipe).styles
    assert torch.equal(embedded(pipe), text)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("kind", [k for k in ODD if k != "token_embedding"])
def test_A2_such_an_adapter_acts_beside_the_lcm_lora(kind, tmp_path):
    pipe = sd_pipe()
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    ODD[kind](pipe)
    alone = passed(pipe)
    lcmlora.accelerate(pipe, lora=lcm)
    both = passed(pipe)
    lcmlora.accelerate(pipe, weight=0)
    torch.testing.assert_close(passed(pipe), alone)
    lcmlora.accelerate(pipe, weight=1)
    torch.testing.assert_close(passed(pipe), both)
    lcmlora.set_styles(pipe, {})
    bare = sd_pipe()
    lcmlora.accelerate(bare, lora=lcm)
    torch.testing.assert_close(passed(pipe), passed(bare), atol=1e-5, rtol=1e-5)
    lcmlora.restore(pipe)
    assert torch.equal(passed(pipe), alone)


def text_style(path, pipe):
    extra = {}
    for te in ("lora_te1", "lora_te2") if hasattr(pipe, "text_encoder_2") else ("lora_te",):
        for layer in (0, 1):
            front = f"{te}_text_model_encoder_layers_{layer}_mlp_fc1"
            extra |= {f"{front}.lora_down.weight": torch.randn(2, 32), f"{front}.lora_up.weight": torch.randn(37, 2)}
    return write_lora(path, pipe.unet, only=lambda n: "attn" in n, extra=extra, seed=7)


BLOCKS = {"down": 0.2, "mid": 0.5, "up": 1.0}
UNEQUAL = {
    "per part": {"unet": 0.9, "text_encoder": 0.2},
    "per block": {"unet": BLOCKS},
    "per block of blocks": {"unet": {"down": 0.1, "up": {"block_0": 0.3}}},
    "part and block": {"unet": {"down": 0.3, "mid": 0.0, "up": 0.7}, "text_encoder": 0.4},
    "negative": {"unet": -0.4, "text_encoder": 0.6},
}


@pytest.mark.parametrize("scales", UNEQUAL)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_A3_weights_stay_as_found_part_by_part_and_layer_by_layer(fuse, scales, tmp_path):
    pipe = sd_pipe()
    lcm, ink = write_lora(tmp_path / "lcm.safetensors", pipe.unet), text_style(tmp_path / "ink.safetensors", pipe)
    made = reference(sd_pipe, lcm, ink, names=("lcm", "ink"), weights=(1.0, UNEQUAL[scales]))
    expected, text = passed(made), embedded(made)
    pipe.load_lora_weights(str(tmp_path), weight_name=ink.name, adapter_name="ink")
    pipe.set_adapters(["ink"], [UNEQUAL[scales]])
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
    torch.testing.assert_close(passed(pipe), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embedded(pipe), text, atol=1e-5, rtol=1e-4)
    other = write_lora(tmp_path / "o.safetensors", pipe.unet, only=lambda n: "to_v" in n, seed=11)
    lcmlora.accelerate(pipe, styles={"other": Style(other, 0.5)})  # of others: "ink" stays as it was found
    lcmlora.accelerate(pipe, styles={})
    torch.testing.assert_close(passed(pipe), expected, atol=1e-5, rtol=1e-4)
    lcmlora.set_styles(pipe, {"ink": 0.5})  # somebody gave a number
    even = reference(sd_pipe, lcm, ink, names=("lcm", "ink"), weights=(1.0, 0.5))
    torch.testing.assert_close(passed(pipe), passed(even), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embedded(pipe), embedded(even), atol=1e-5, rtol=1e-4)
    assert lcmlora.status(pipe).styles == pytest.approx({"ink": 0.5})
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_A3_status_says_what_is_not_the_same_everywhere(tmp_path):
    pipe = sd_pipe()
    lcm, ink = write_lora(tmp_path / "lcm.safetensors", pipe.unet), text_style(tmp_path / "ink.safetensors", pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=ink.name, adapter_name="ink")
    pipe.set_adapters(["ink"], [{"unet": {"down": 0.25, "mid": 0.25, "up": 1.0}, "text_encoder": 0.5}])
    for fuse in (True, False):
        lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
        found = lcmlora.status(pipe).styles["ink"]
        assert found == {"unet": pytest.approx((0.25, 1.0)), "text_encoder": pytest.approx((0.5, 0.5))}
        assert json.dumps(lcmlora.status(pipe).to_dict())


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("make", PIPES.values(), ids=PIPES)
def test_A4_a_text_encoder_that_is_switched_off_stays_off(make, fuse, tmp_path):
    pipe = make()
    lcm, ink = write_lora(tmp_path / "lcm.safetensors", pipe.unet), text_style(tmp_path / "ink.safetensors", pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=ink.name, adapter_name="ink")
    pipe.text_encoder.disable_adapters()
    before, text = snapshot(pipe), embedded(pipe)
    lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
    torch.testing.assert_close(embedded(pipe), text, atol=1e-5, rtol=1e-4)  # SDXL's second one is on
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_A4_a_pipe_that_is_switched_off_stays_off_beside_the_lcm_lora(fuse, tmp_path):
    pipe = sd_pipe()
    lcm, ink = write_lora(tmp_path / "lcm.safetensors", pipe.unet), text_style(tmp_path / "ink.safetensors", pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=ink.name, adapter_name="ink")
    pipe.disable_lora()
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
    torch.testing.assert_close(passed(pipe), passed(reference(sd_pipe, lcm)), atol=1e-5, rtol=1e-4)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("components", [["text_encoder"], ["unet"], ["unet", "text_encoder"]])
@pytest.mark.parametrize("fuse", ["auto", False])
def test_A4_a_lora_fused_by_hand_is_refused_wherever_it_is(fuse, components, tmp_path):
    pipe = sd_pipe()
    lcm, ink = write_lora(tmp_path / "lcm.safetensors", pipe.unet), text_style(tmp_path / "ink.safetensors", pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=ink.name, adapter_name="ink")
    pipe.fuse_lora(components=components)
    before = snapshot(pipe)
    with pytest.raises(PipelineError, match=rf"this pipe's {components[0]} have a LoRA merged by fuse_lora\(\)"):
        lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
    assert_same(before, snapshot(pipe))


class Resampler(nn.Module):
    """Layers with the names of a UNet's, as IP-Adapter Plus has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.ff = nn.ModuleDict({"net": nn.ModuleList([nn.Identity(), nn.Identity(), nn.Linear(width, width)])})
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, embeds):
        return embeds


def ip_adapter_plus(unet):
    unet._load_ip_adapter_weights([ip_adapter(unet)])
    unet.encoder_hid_proj.image_projection_layers.append(Resampler(8))


def controller(unet):
    unet.control = Resampler(8)


def inside_a_block(unet):
    unet.mid_block.attentions[0].transformer_blocks[0].fuser = Resampler(8)


@pytest.mark.parametrize("attach", [ip_adapter_plus, controller, inside_a_block])
def test_A5_layers_that_others_hang_on_a_unet_are_not_its_own(attach, tmp_path):
    pipe = sd_pipe()
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    structure = lcmlora.base.structure_of(pipe.unet)
    attach(pipe.unet)
    assert lcmlora.base.structure_of(pipe.unet) == structure
    before = snapshot(pipe)
    for fuse in (True, False):
        lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
        lcmlora.restore(pipe)
        assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_A6_weights_off_loaded_to_disk_are_refused_with_the_order_that_works(kind, tmp_path):
    pipe = sd_pipe()
    lcm, folder = write_lora(tmp_path / "lcm.safetensors", pipe.unet), str(tmp_path / "off")
    cpu, more = torch.device("cpu"), {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(pipe.unet, cpu, cpu, offload_type=kind, offload_to_disk_path=folder, **more)
    with pytest.raises(PipelineError, match=r"off-loaded to disk .* accelerate the pipe before"):
        lcmlora.accelerate(pipe, lora=lcm)
    assert not lcmlora.is_accelerated(pipe)


def test_A6_a_text_encoder_elsewhere_matters_only_where_it_is_changed(tmp_path):
    pipe = sd_pipe()
    lcm, ink = write_lora(tmp_path / "lcm.safetensors", pipe.unet), text_style(tmp_path / "ink.safetensors", pipe)
    pipe.text_encoder.to("meta")
    with pytest.raises(PipelineError, match="this pipe's text_encoder are off-loaded"):
        lcmlora.accelerate(pipe, lora=lcm, styles={"ink": ink})
    lcmlora.accelerate(pipe, lora=lcm)
    lcmlora.restore(pipe)


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("outside", [True, False], ids=["called outside", "called inside"])
def test_A7_a_pipe_built_under_inference_mode_works(outside, fuse, tmp_path):
    with torch.inference_mode():
        pipe = sd_pipe()
    plain = sd_pipe()
    lcm = write_lora(tmp_path / "lcm.safetensors", plain.unet)
    before = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    with torch.inference_mode(not outside):
        lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
        torch.testing.assert_close(passed(pipe), passed(lcmlora.accelerate(plain, lora=lcm, fuse=fuse)))
        lcmlora.set_styles(pipe, {"s": Style(lcm, 0.3)})
        lcmlora.restore(pipe)
    assert all(torch.equal(p, before[name]) for name, p in pipe.unet.named_parameters())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_A7_modes_of_torch_around_the_call_change_nothing(fuse, mode, tmp_path):
    pipe = sd_pipe()
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    before = snapshot(pipe)
    expected = passed(lcmlora.accelerate(sd_pipe(), lora=lcm, fuse=fuse))
    with mode():
        lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
    assert torch.equal(passed(pipe), expected)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_A7_another_default_dtype_changes_nothing(tmp_path):
    pipe = sd_pipe()
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    expected = passed(lcmlora.accelerate(sd_pipe(), lora=lcm))
    torch.set_default_dtype(torch.float64)
    try:
        lcmlora.accelerate(pipe, lora=lcm)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(passed(pipe), expected)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_A8_peft_models_are_named_with_what_to_call(part, tmp_path):
    from peft import get_peft_model

    pipe = sd_pipe()
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    config = LoraConfig(target_modules=["to_q", "q_proj"])
    setattr(pipe, part, get_peft_model(getattr(pipe, part), config))
    with pytest.raises(PipelineError, match=rf"pipe\.{part} is a PeftModel.*merge_and_unload\(\)"):
        lcmlora.accelerate(pipe, lora=lcm)


def test_A8_a_unet_in_a_wrapper_is_named(tmp_path):
    pipe = sd_pipe()
    lcm, unet = write_lora(tmp_path / "lcm.safetensors", pipe.unet), pipe.unet
    pipe.unet = nn.DataParallel(unet)
    with pytest.raises(PipelineError, match=r"wrapped in DataParallel: set pipe\.unet = pipe\.unet\.module"):
        lcmlora.accelerate(pipe, lora=lcm)


@pytest.mark.parametrize("make", [sd_pipe, sdxl_pipe])
def test_A9_a_baked_folder_says_what_it_is(make, tmp_path):
    pipe = make()
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    folder = lcmlora.bake(lcmlora.accelerate(pipe, lora=lcm, steps=6, guidance=1.5), tmp_path / "baked")
    loaded = type(make()).from_pretrained(folder)
    with pytest.raises(PipelineError, match=r"LCM is merged into this pipe already.*load_baked"):
        lcmlora.accelerate(loaded, lora=lcm)
    other = make()
    other.unet = type(other.unet).from_pretrained(folder, subfolder="unet")
    with pytest.raises(PipelineError, match="LCM is merged into this pipe already"):
        lcmlora.accelerate(other, lora=lcm)
    baked = lcmlora.load_baked(folder)
    now = lcmlora.status(baked)
    assert (now.steps, now.guidance, now.lora, now.scheduler) == (6, 1.5, lcm.name, "LCMScheduler")
    passes = []
    baked.unet.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[0]))
    baked.set_progress_bar_config(disable=True)
    baked("a fox", output_type="np")
    assert passes == [2] * 6
    with pytest.raises(PipelineError, match="baked"):
        lcmlora.accelerate(baked, lora=lcm)
    with pytest.raises(PipelineError, match="baked"):
        lcmlora.restore(baked)
    assert lcmlora.set_styles(baked, {}) is baked  # it has none
    with pytest.raises(PipelineError, match="was baked without styles"):
        lcmlora.set_styles(baked, {"ink": lcm})
