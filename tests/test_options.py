"""What pays at four steps beside the LCM-LoRA: another VAE, a compiled UNet, remembered prompts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from PIL import Image

import lcmlora
from conftest import assert_same, sd_pipe, sdxl_pipe, snapshot, write_lora
from lcmlora import base as registry


def tiny_decoder(**changes: object) -> AutoencoderTiny:
    """An AutoencoderTiny for the latents of the test pipes: factor 2, four channels."""
    torch.manual_seed(3)
    widths = (8, 8)
    options = {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths}
    return AutoencoderTiny(**{**options, "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), **changes})


@pytest.fixture
def vae_folder(tmp_path: Path) -> Path:
    tiny_decoder().save_pretrained(tmp_path / "taesd")
    return tmp_path / "taesd"


def picture(pipe, prompt="a fox", **call):
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **call).images


def test_another_vae_stands_in_until_restore(vae_folder, lcm_file):
    pipe = sd_pipe()
    before, theirs = snapshot(pipe), pipe.vae
    plain = picture(lcmlora.accelerate(pipe, lora=lcm_file(pipe)))
    lcmlora.restore(pipe)
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), vae=vae_folder)
    assert isinstance(pipe.vae, AutoencoderTiny)
    assert pipe.config["vae"] == ("diffusers", "AutoencoderTiny")
    assert not pipe.vae.training
    assert not any(parameter.requires_grad for parameter in pipe.vae.parameters())
    drawn = picture(pipe)
    assert drawn.shape == plain.shape
    assert not torch.equal(drawn, plain)
    lcmlora.restore(pipe)
    assert pipe.vae is theirs
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("make", [sd_pipe, sdxl_pipe])
def test_a_vae_given_as_a_module_is_taken_as_it_is(make, lcm_file):
    pipe, vae = make(), tiny_decoder()
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), vae=vae)
    assert pipe.vae is vae
    assert torch.isfinite(picture(pipe)).all()


def test_it_takes_the_dtype_of_the_one_it_stands_for_and_encodes_too(vae_folder, lcm_file):
    pipe = sd_pipe(cls=StableDiffusionImg2ImgPipeline).to(torch.bfloat16)
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), vae=vae_folder)
    assert pipe.vae.dtype == torch.bfloat16
    drawn = picture(pipe, image=Image.new("RGB", (16, 16), "teal"), strength=0.5)
    assert torch.isfinite(drawn).all()


def test_tiny_is_the_bases_own(vae_folder, lcm_file, request):
    pipe = sd_pipe()
    mine = lcmlora.Base("mine", "Mine", 32, (8, 16), 0, str(lcm_file(pipe)), tiny_vae=str(vae_folder))
    mine = registry.dataclasses.replace(mine, layers=registry.structure_of(pipe.unet).layers)
    lcmlora.register(mine)
    request.addfinalizer(lambda: lcmlora.unregister("mine"))
    lcmlora.accelerate(pipe, vae="tiny")
    assert isinstance(pipe.vae, AutoencoderTiny)
    with pytest.raises(lcmlora.BaseModelError, match=r"vae='fp16-fix': base 'mine' has none"):
        lcmlora.accelerate(sd_pipe(), vae="fp16-fix")


def test_the_known_bases_name_their_vaes():
    named = {base.name: (base.tiny_vae, base.fp16_vae) for base in lcmlora.bases()}
    assert named["sd15"] == ("madebyollin/taesd", None)
    for name in ("sdxl", "ssd-1b", "vega"):
        assert named[name] == ("madebyollin/taesdxl", "madebyollin/sdxl-vae-fp16-fix")


def other_latents(folder: Path) -> object:
    tiny_decoder(latent_channels=8).save_pretrained(folder / "eight")
    return folder / "eight"


def other_factor(folder: Path) -> object:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)


@pytest.mark.parametrize(
    ("vae", "kind", "told"),
    [
        (lambda folder: "tiny", lcmlora.BaseModelError, "a UNet of no known base has none"),
        (lambda folder: folder / "nowhere", lcmlora.PipelineError, "could not be loaded"),
        (lambda folder: "someone/nowhere", lcmlora.PipelineError, "type: hf download someone/nowhere"),
        (other_latents, lcmlora.PipelineError, "latents of 8 channels, 2 times smaller.*have 4 and are 2"),
        (other_factor, lcmlora.PipelineError, "latents of 4 channels, 1 times smaller.*have 4 and are 2"),
    ],
)
def test_a_vae_that_is_not_there_or_does_not_fit_is_refused(vae, kind, told, lcm_file, tmp_path):
    pipe = sd_pipe()
    before, lora = snapshot(pipe), lcm_file(pipe)
    with pytest.raises(kind, match=told):
        lcmlora.accelerate(pipe, lora=lora, vae=vae(tmp_path), local_files_only=True)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize(("how", "regions"), [("regional", 4), (True, 4), ("whole", 1)])
def test_compiling_is_done_in_place_once_and_undone(how, regions, lcm_file, tmp_path, monkeypatch):
    """One compilation per region and shape serves LCM, every change of styles, and both guidances' batch sizes."""
    pipe = sd_pipe()
    before, unet = snapshot(pipe), pipe.unet
    style = write_lora(tmp_path / "s.safetensors", pipe.unet, seed=9)
    compiled, seen = [], 0

    def backend(graph, inputs):
        nonlocal seen
        seen += 1
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda call, **o: compiled.append(call) or compile_(call, backend=backend, **o)
    )
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), compile=how)
    assert len(compiled) == regions
    plain = picture(pipe)
    first = seen
    assert first > 0
    lcmlora.set_styles(pipe, {"s": lcmlora.Style(style, 0.5)})
    styled = picture(pipe)
    assert seen == first, "a change of styles made the compiler start again"
    assert not torch.equal(plain, styled)
    lcmlora.restore(pipe)
    assert pipe.unet is unet
    assert_same(before, snapshot(pipe))


def test_what_the_user_compiled_stays_compiled(lcm_file):
    pipe = sd_pipe()
    block = next(m for m in pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock")
    block.compile(backend="eager")
    theirs = block._compiled_call_impl
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), compile=True)
    assert block._compiled_call_impl is theirs
    lcmlora.restore(pipe)
    assert block._compiled_call_impl is theirs


@pytest.fixture
def counted(lcm_file):
    """An accelerated pipe that remembers two prompts, and a list to which every pass of its text encoder adds."""
    pipe, passes = sd_pipe(), []
    pipe.text_encoder.register_forward_hook(lambda *_: passes.append(1))
    lcmlora.accelerate(pipe, lora=lcm_file(pipe), cache_prompts=2)
    return pipe, passes


def test_a_prompt_is_encoded_once(counted):
    pipe, passes = counted
    first = picture(pipe)
    assert torch.equal(first, picture(pipe))
    assert len(passes) == 1
    assert not torch.equal(first, picture(pipe, "a cat"))
    picture(pipe, guidance_scale=1.5)  # another result: with the empty prompt's embeddings
    assert len(passes) == 4
    picture(pipe, "a cat")
    assert len(passes) == 4
    picture(pipe)  # two were kept, and this was used longest ago
    assert len(passes) == 5


def test_a_changed_encoder_is_asked_again(counted):
    pipe, passes = counted
    first = picture(pipe)
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).mul_(1.5)
    assert not torch.equal(first, picture(pipe))
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    picture(pipe)
    assert len(passes) == 3  # the copy has the hook too


def test_a_style_in_the_text_encoder_changes_what_is_remembered(counted, tmp_path):
    pipe, passes = counted
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    halves = {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(32, 2)}
    style = write_lora(
        tmp_path / "s.safetensors", pipe.unet, only=lambda name: False, spelling="diffusers", extra=halves
    )
    picture(pipe)
    lcmlora.set_styles(pipe, {"s": style})
    picture(pipe)
    lcmlora.set_styles(pipe, {"s": 0.1})
    picture(pipe)
    assert len(passes) == 3


def test_what_a_result_would_not_tell_is_never_remembered(counted):
    pipe, passes = counted
    embeddings = pipe.encode_prompt("a fox", "cpu", 1, False)[0]  # with gradients
    pipe.encode_prompt("a fox", "cpu", 1, False)
    assert len(passes) == 2
    assert embeddings.requires_grad
    for scale in (0.5, 1.0):
        with torch.no_grad():
            first = pipe.encode_prompt("a fox", "cpu", 1, False, prompt_embeds=embeddings * scale)[0]
        assert torch.equal(first, embeddings * scale)


def test_restore_forgets_the_prompts(counted):
    pipe, passes = counted
    lcmlora.restore(pipe)
    for _ in range(2):
        picture(pipe, num_inference_steps=1, guidance_scale=1)
    assert len(passes) == 2


@pytest.mark.parametrize(
    "options", [{"compile": "all"}, {"cache_prompts": -1}, {"cache_prompts": True}, {"cache_prompts": 2.5}]
)
def test_other_values_are_refused(options, lcm_file):
    pipe = sd_pipe()
    before = snapshot(pipe)
    with pytest.raises(lcmlora.PipelineError, match=f"{next(iter(options))}={next(iter(options.values()))!r}"):
        lcmlora.accelerate(pipe, lora=lcm_file(pipe), **options)
    assert_same(before, snapshot(pipe))


def test_a_pipe_that_encodes_in_its_own_way_has_no_cache(lcm_file):
    pipe = sd_pipe()
    lora = lcm_file(pipe)
    odd = StableDiffusionInstructPix2PixPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(lcmlora.PipelineError, match="StableDiffusionInstructPix2PixPipeline has no encode_prompt"):
        lcmlora.accelerate(odd, lora=lora, cache_prompts=4)


def test_another_vae_moves_the_pipe_without_a_merge(counted):
    pipe, _ = counted
    own, before = pipe.vae, [p._version for p in pipe.unet.parameters()]
    decoder = tiny_decoder()
    lcmlora.accelerate(pipe, vae=decoder)
    assert pipe.vae is decoder
    lcmlora.accelerate(pipe, vae=None)
    assert pipe.vae is own
    assert [p._version for p in pipe.unet.parameters()] == before
