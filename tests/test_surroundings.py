"""What else may be done to a pipe: off-loading, compiling, quantising, sharing, copying. And what must stay quiet."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import (
    AutoPipelineForImage2Image,
    EDMEulerScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.hooks import apply_group_offloading
from PIL import Image

import lcmlora
from conftest import assert_same, sd_pipe, sdxl_pipe, snapshot, write_lora

PICTURE = Image.new("RGB", (16, 16), "red")


def call(pipe, **changes):
    arguments = {"height": 16, "width": 16, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipe("a fox", **{**arguments, **changes}).images


class ForeignParameter(torch.nn.Parameter):
    """Stands for a quantiser's parameter class, whose arithmetic only the quantiser knows."""


def test_model_offload_hooks_stay(lcm_file):
    """Pitfall 23: hooks of accelerate on the UNet are the same objects before, during and after."""
    pipe = sd_pipe()
    add_hook_to_module(pipe.unet, AlignDevicesHook(execution_device="cpu"))
    hook, forward = pipe.unet._hf_hook, pipe.unet.forward
    for fuse in (True, False):
        lcmlora.accelerate(pipe, lora=lcm_file(pipe), fuse=fuse)
        assert pipe.unet._hf_hook is hook
        call(pipe)
        lcmlora.restore(pipe)
        assert pipe.unet._hf_hook is hook
        assert pipe.unet.forward == forward


def test_group_offload_goes_on(lcm_file):
    """Pitfall 23: diffusers' group off-loading, set up before, serves the merged weights."""
    pipe, plain = sd_pipe(), sd_pipe()
    lora = lcm_file(pipe)
    expected = call(lcmlora.accelerate(plain, lora=lora))
    apply_group_offloading(
        pipe.unet, torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    original = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    lcmlora.accelerate(pipe, lora=lora)
    assert (call(pipe) == expected).all()
    lcmlora.restore(pipe)
    assert all(torch.equal(p, original[name]) for name, p in pipe.unet.named_parameters())


def test_sequential_offload_is_refused_with_the_order_that_works(lcm_file):
    """Pitfall 23: weights on the meta device can be neither merged nor wrapped."""
    pipe = sd_pipe()
    lora = lcm_file(pipe)
    pipe.unet.to("meta")
    with pytest.raises(lcmlora.PipelineError, match="before enable_sequential_cpu_offload"):
        lcmlora.accelerate(pipe, lora=lora)


def test_weights_of_another_kind_are_not_merged(lcm_file):
    """Pitfall 24: merging into quantised weights is refused with the layer's name; "auto" leaves adapters."""
    pipe = sd_pipe()
    lora = lcm_file(pipe)
    layer = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    layer.weight = ForeignParameter(layer.weight.detach())
    before = snapshot(pipe)
    with pytest.raises(lcmlora.PipelineError, match=r"attn1\.to_q has quantised weights \(ForeignParameter"):
        lcmlora.accelerate(pipe, lora=lora, fuse=True)
    assert_same(before, snapshot(pipe))
    lcmlora.accelerate(pipe, lora=lora)
    assert not lcmlora.status(pipe).fused
    call(pipe)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torchao's own
def test_a_really_quantised_unet_keeps_its_weights_and_gets_adapters(lcm_file):
    """Pitfall 24, with torchao's int8 weights: nothing is merged, everything comes back."""
    quantization = pytest.importorskip("torchao.quantization")
    pipe = sd_pipe()
    lora = lcm_file(pipe)
    quantization.quantize_(pipe.unet, quantization.Int8WeightOnlyConfig())
    weights = dict(pipe.unet.named_parameters())
    expected = call(pipe)
    with pytest.raises(lcmlora.PipelineError, match="has quantised weights"):
        lcmlora.accelerate(pipe, lora=lora, fuse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lcmlora.accelerate(pipe, lora=lora)
    assert lcmlora.status(pipe).adapters == {"lcmlora_lcm": 1.0}
    assert (call(pipe) != expected).any()
    lcmlora.restore(pipe)
    assert all(weights[name] is p for name, p in pipe.unet.named_parameters())
    assert (call(pipe) == expected).all()


def ip_adapter(unet: torch.nn.Module, tokens: int = 4, image_width: int = 6) -> dict[str, dict[str, torch.Tensor]]:
    """Random IP-Adapter weights in the layout of the published files."""
    width = unet.config.cross_attention_dim
    torch.manual_seed(5)
    project = {"proj.weight": torch.randn(tokens * width, image_width), "proj.bias": torch.zeros(tokens * width)}
    project |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    layers = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    halves = {
        f"{2 * i + 1}.to_{kind}_ip.weight": torch.randn(layer.to_k.out_features, width)
        for i, layer in enumerate(layers)
        for kind in ("k", "v")
    }
    return {"image_proj": project, "ip_adapter": halves}


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_ip_adapter_acts_and_stays(when, fuse, lcm_file):
    """Its processors are objects of the user's: the LoRA goes in beside them, whichever comes first."""
    pipe = sd_pipe()
    lora, plain = lcm_file(pipe), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    if when == "before":
        pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
        before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lora, fuse=fuse)
    if when == "after":
        pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    processors = pipe.unet.attn_processors
    assert sum("IPAdapter" in type(p).__name__ for p in processors.values()) == 4

    def drawn(value: float) -> torch.Tensor:
        embeds = [torch.full((1, 1, 6), value)]
        generator = torch.Generator().manual_seed(0)
        return pipe("a fox", ip_adapter_image_embeds=embeds, generator=generator, output_type="pt").images

    assert not torch.equal(drawn(0.1), drawn(2.0))
    lcmlora.restore(pipe)
    assert all(p is processors[name] for name, p in pipe.unet.attn_processors.items())
    if when == "before":
        assert_same(before, snapshot(pipe))
    assert all(torch.equal(plain[name], value) for name, value in pipe.unet.state_dict().items() if name in plain)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_unet_is_merged_in_place(when, lcm_file, tmp_path):
    """Pitfall 25: one compilation serves the LCM-LoRA, every change of styles, and the restored UNet."""
    pipe, plain = sd_pipe(), sd_pipe()
    lora, style = lcm_file(pipe), write_lora(tmp_path / "s.safetensors", plain.unet, seed=9)
    compiled = 0

    def count(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph.forward

    if when == "before":
        pipe.unet = torch.compile(pipe.unet, backend=count)
    lcmlora.accelerate(pipe, lora=lora)
    if when == "after":
        pipe.unet = torch.compile(pipe.unet, backend=count)
    arguments = {
        "sample": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor(999),
        "encoder_hidden_states": torch.ones(1, 4, 32),
    }
    with torch.no_grad():
        pipe.unet(**arguments)
        first = compiled
        lcmlora.set_styles(pipe, {"s": lcmlora.Style(style, 0.5)})
        lcmlora.accelerate(plain, lora=lora, styles={"s": lcmlora.Style(style, 0.5)})
        torch.testing.assert_close(pipe.unet(**arguments).sample, plain.unet(**arguments).sample)
        lcmlora.restore(pipe)
        lcmlora.restore(plain)
        torch.testing.assert_close(pipe.unet(**arguments).sample, plain.unet(**arguments).sample)
    assert first > 0
    assert compiled == first, "merging made the compiler start again"


def test_a_pipe_made_from_an_accelerated_one(lcm_file):
    """Pitfall 28: it shares the fast UNet, is made fast by the same call, and gets the original scheduler back."""
    pipe = sd_pipe()
    before, lora = snapshot(pipe), lcm_file(pipe)
    lcmlora.accelerate(pipe, lora=lora)
    sibling = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(sibling) is StableDiffusionImg2ImgPipeline
    assert sibling.unet is pipe.unet
    assert not lcmlora.is_accelerated(sibling)
    assert lcmlora.status(sibling).fused
    lcmlora.accelerate(sibling, lora=lora)
    assert sibling.scheduler is not pipe.scheduler
    passes = []
    with pipe.unet.register_forward_pre_hook(lambda module, args: passes.append(1)):
        sibling("a fox", image=PICTURE, output_type="np")
    assert len(passes) == 4
    lcmlora.restore(pipe)
    assert lcmlora.status(sibling).fused
    lcmlora.restore(sibling)
    assert_same(before, snapshot(pipe))
    assert sibling.scheduler is pipe.scheduler


def test_a_denoising_split_needs_a_step_on_each_side(tmp_path):
    """Pitfall 22: four LCM steps are at 999, 759, 499 and 259; a split at 0.8 leaves the second pipe none."""
    pipe = sdxl_pipe(cls=StableDiffusionXLImg2ImgPipeline)
    lcmlora.accelerate(pipe, lora=write_lora(tmp_path / "l.safetensors", pipe.unet))
    passes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: passes.append(1))
    arguments = {"prompt": "a fox", "image": PICTURE, "output_type": "np"}
    with pytest.raises(lcmlora.CallError, match=r"\[999, 759, 499, 259\]"):
        pipe(**arguments, denoising_start=0.8)
    assert passes == []
    pipe(**arguments, denoising_start=0.8, num_inference_steps=8)
    assert len(passes) == 1


def test_the_attention_scale_is_named_for_what_it_does(lcm_file):
    """Pitfall 30."""
    for fuse, words in ((True, "no effect on merged"), (False, "together with the styles")):
        pipe = sd_pipe()
        lcmlora.accelerate(pipe, lora=lcm_file(pipe), fuse=fuse)
        with pytest.warns(lcmlora.LcmLoraWarning, match=words):
            call(pipe, cross_attention_kwargs={"scale": 0.5})


def test_weights_by_block_are_refused(lcm_file):
    """Pitfall 31: PEFT would apply them to a part of an LCM-LoRA's layers only."""
    pipe = sd_pipe()
    with pytest.raises(lcmlora.CallError, match="no number"):
        lcmlora.accelerate(pipe, lora=lcm_file(pipe), weight={"unet": {"down": 0.5}})


@pytest.mark.parametrize(
    ("sign", "words"), [("name", "sdxl-turbo"), ("scheduler", "LCMScheduler"), ("adapter", "hyper_8step")]
)
def test_signs_of_a_few_step_model_are_named(sign, words, lcm_file, tmp_path):
    """Pitfall 16: no structure tells a Turbo or Lightning checkpoint, so this warns and goes on."""
    pipe = sd_pipe()
    lora = lcm_file(pipe)
    if sign == "name":
        pipe.register_to_config(_name_or_path="stabilityai/sdxl-turbo")
    elif sign == "scheduler":
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    else:
        style = write_lora(tmp_path / "s.safetensors", pipe.unet, only=lambda n: "to_q" in n)
        pipe.load_lora_weights(str(tmp_path), weight_name=style.name, adapter_name="hyper_8step")
    with pytest.warns(lcmlora.LcmLoraWarning, match=words):
        lcmlora.accelerate(pipe, lora=lora)


def test_edm_schedules_are_refused(lcm_file):
    """Pitfall 18: Playground v2.5 has SDXL's UNet and no betas."""
    pipe = sd_pipe()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(lcmlora.PipelineError, match="EDMEulerScheduler has no beta schedule"):
        lcmlora.accelerate(pipe, lora=lcm_file(pipe))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_nothing_is_printed_or_logged(fuse, lcm_file, tmp_path, capfd, caplog, recwarn):
    """Pitfall 37: the messages of diffusers, PEFT and transformers that users read as failures."""
    pipe = sd_pipe()
    extra = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(2, 32),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(37, 2),
    }
    style = write_lora(tmp_path / "s.safetensors", pipe.unet, only=lambda n: "to_q" in n, extra=extra)
    lora = lcm_file(pipe)
    recwarn.clear()  # what making the pipe said
    capfd.readouterr()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        lcmlora.accelerate(pipe, lora=lora, styles={"s": style}, fuse=fuse)
        lcmlora.set_styles(pipe, {"s": 0.5})
        lcmlora.restore(pipe)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert [str(warning.message) for warning in recwarn] == []


def test_callbacks_and_progress_bars_go_on(lcm_file):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    seen = []

    def callback(pipe, step, timestep, values):
        seen.append((step, int(timestep)))
        return values

    call(pipe, callback_on_step_end=callback)
    assert seen == [(0, 999), (1, 759), (2, 499), (3, 259)]


def test_components_and_config_stay_whole(lcm_file):
    pipe = sd_pipe()
    names = set(pipe.components)
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    assert set(pipe.components) == names
    assert "_lcmlora" not in pipe.config
    assert "StableDiffusionPipeline" in repr(pipe)
