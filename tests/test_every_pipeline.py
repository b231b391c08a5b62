"""Every pipeline class of diffusers with a Stable Diffusion or SDXL UNet: accelerated, called, restored."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel, UNetMotionModel, pipelines

import lcmlora
from conftest import assert_same, snapshot, write_lora
from lcmlora.parameters import Parameters
from tiny_pipelines import (
    SIZE,
    WIDTH,
    build,
    controlnet_union,
    controlnet_xs,
    depth_processor,
    example_encoder,
    image_encoder,
    image_processor,
    mask,
    pia_adapter,
    picture,
    sparse_controlnet,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipeline class and what sets it apart from a plain one.

    Attributes:
        unet: changes to the tiny UNet's config.
        parts: what makes the parts that are not the usual ones.
        call: arguments of its calls that ARGUMENTS has not.
        accelerate: arguments of `accelerate`.
        per_step, extra: UNet passes that the pipeline makes in each step, and beside its steps. One and none is usual.
        theirs: what its own calls change for good, accelerated or not: a part, or "processors".
    """

    unet: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: dict[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    accelerate: dict[str, Any] = dataclasses.field(default_factory=dict)
    per_step: int = 1
    extra: int = 0
    theirs: str = "nothing"


ARGUMENTS = {
    "prompt": "a fox",
    "height": SIZE,
    "width": SIZE,
    "image": picture(),
    "mask_image": mask(),
    "example_image": picture(),
    "control_image": picture(),
    "control_mode": 0,
    "video": [picture(), picture()],
    "conditioning_frames": [picture(), picture()],
    "num_frames": 2,
    "output_type": "np",
}
"""What a call is given, as far as the class takes it. Steps, strength and guidance are left to the defaults."""

SEEING = {"image_encoder": image_encoder, "feature_extractor": image_processor}
UNCLIP = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH}
ATTENTION_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
PHRASE = {"gligen_phrases": ["a fox"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}
EXCITED = {"token_indices": [1], "attn_res": (4, 4), "thresholds": {}}
MOVING = {"t0": 1, "t1": 2, "video_length": 2}  # frames part in step t0; the defaults, 44 and 47, want 50 steps
UNION = {"controlnet": controlnet_union}
EMBEDS = {name: torch.full((1, 16, WIDTH), value) for name, value in (("source_embeds", 0.1), ("target_embeds", 0.2))}

CASES = {
    # Stable Diffusion
    "StableDiffusionPipeline": Case(),
    "StableDiffusionImg2ImgPipeline": Case(),
    "StableDiffusionInpaintPipeline": Case(),
    "StableDiffusionInpaintPipeline, 9 channels": Case({"in_channels": 9}),
    "StableDiffusionDepth2ImgPipeline": Case({"in_channels": 5}, {"feature_extractor": depth_processor}),
    "StableDiffusionInstructPix2PixPipeline": Case({"in_channels": 8}),
    "StableDiffusionUpscalePipeline": Case({"in_channels": 7, "num_class_embeds": 1000}),
    "StableDiffusionImageVariationPipeline": Case(parts=SEEING),
    "StableUnCLIPPipeline": Case(UNCLIP, call={"prior_num_inference_steps": 2}, theirs="image_normalizer"),
    "StableUnCLIPImg2ImgPipeline": Case(UNCLIP, SEEING, theirs="image_normalizer"),
    "StableDiffusionControlNetPipeline": Case(),
    "StableDiffusionControlNetImg2ImgPipeline": Case(),
    "StableDiffusionControlNetInpaintPipeline": Case(),
    "StableDiffusionAdapterPipeline": Case(ATTENTION_FIRST),
    "StableDiffusionPAGPipeline": Case(),
    "StableDiffusionPAGImg2ImgPipeline": Case(),
    "StableDiffusionPAGInpaintPipeline": Case(),
    "StableDiffusionControlNetPAGPipeline": Case(),
    "StableDiffusionControlNetPAGInpaintPipeline": Case(),
    # SDXL
    "StableDiffusionXLPipeline": Case(),
    "StableDiffusionXLImg2ImgPipeline": Case(),
    "StableDiffusionXLInpaintPipeline": Case(),
    "StableDiffusionXLInpaintPipeline, 9 channels": Case({"in_channels": 9}),
    "StableDiffusionXLInstructPix2PixPipeline": Case({"in_channels": 8}),
    "StableDiffusionXLControlNetPipeline": Case(),
    "StableDiffusionXLControlNetImg2ImgPipeline": Case(),
    "StableDiffusionXLControlNetInpaintPipeline": Case(),
    "StableDiffusionXLControlNetUnionPipeline": Case(parts=UNION),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Case(parts=UNION),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Case(parts=UNION),
    "StableDiffusionXLAdapterPipeline": Case(ATTENTION_FIRST),
    "StableDiffusionXLPAGPipeline": Case(),
    "StableDiffusionXLPAGImg2ImgPipeline": Case(),
    "StableDiffusionXLPAGInpaintPipeline": Case(),
    "StableDiffusionXLControlNetPAGPipeline": Case(),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": Case(),
    # video: UNetMotionModel
    "AnimateDiffPipeline": Case(),
    "AnimateDiffControlNetPipeline": Case(),
    "AnimateDiffSparseControlNetPipeline": Case(parts={"controlnet": sparse_controlnet}),
    "AnimateDiffVideoToVideoPipeline": Case(),
    "AnimateDiffVideoToVideoControlNetPipeline": Case(),
    "AnimateDiffPAGPipeline": Case(),
    "AnimateDiffSDXLPipeline": Case(),
    # diffusers.pipelines.deprecated
    "AltDiffusionPipeline": Case(),  # CLIP reads the text here, in XLM-RoBERTa's place
    "AltDiffusionImg2ImgPipeline": Case(),
    "PaintByExamplePipeline": Case(
        {"in_channels": 9}, {"image_encoder": example_encoder, "feature_extractor": image_processor}
    ),
    "PIAPipeline": Case(parts={"motion_adapter": pia_adapter}),
    "SemanticStableDiffusionPipeline": Case(),
    "StableDiffusionAttendAndExcitePipeline": Case(call=EXCITED, per_step=2),
    "StableDiffusionGLIGENPipeline": Case({"attention_type": "gated"}, call=PHRASE),
    "StableDiffusionGLIGENTextImagePipeline": Case(
        {"attention_type": "gated-text-image"}, SEEING, {**PHRASE, "gligen_images": [picture()]}, per_step=2
    ),
    "StableDiffusionInpaintPipelineLegacy": Case(),
    "StableDiffusionLDM3DPipeline": Case(),
    "StableDiffusionModelEditingPipeline": Case(),
    "StableDiffusionPanoramaPipeline": Case(),
    "StableDiffusionPipelineSafe": Case(),
    "StableDiffusionPix2PixZeroPipeline": Case(
        call=EMBEDS, accelerate={"guidance": 1.5}, per_step=3, theirs="processors"
    ),
    "StableDiffusionSAGPipeline": Case(per_step=2),
    "TextToVideoZeroPipeline": Case(call=MOVING, accelerate={"guidance": 1.5}, extra=1),  # can't do without guidance
    "TextToVideoZeroSDXLPipeline": Case(call=MOVING, extra=1),
}

UNFUSED = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline, 9 channels",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLControlNetUnionPipeline",
    "AnimateDiffPipeline",
    "StableDiffusionGLIGENPipeline",
    "StableDiffusionPix2PixZeroPipeline",
)
"""With PEFT adapters too, not only merged: one of each kind."""

REFUSED = {
    "LatentConsistencyModelPipeline": (Case({"time_cond_proj_dim": 8}), "full latent consistency model"),
    "LatentConsistencyModelImg2ImgPipeline": (Case({"time_cond_proj_dim": 8}), "full latent consistency model"),
    "LEditsPPPipelineStableDiffusion": (Case(), "no num_inference_steps"),
    "LEditsPPPipelineStableDiffusionXL": (Case(), "no num_inference_steps"),
    "StableDiffusionControlNetXSPipeline": (Case({"layers_per_block": 2}, {"controlnet": controlnet_xs}), "no UNet2D"),
    "StableDiffusionXLControlNetXSPipeline": (
        Case({"layers_per_block": 2}, {"controlnet": controlnet_xs}),
        "no UNet2D",
    ),
    "StableDiffusionLatentUpscalePipeline": (Case({"in_channels": 8, "time_cond_proj_dim": 8}), "scheduler.sigmas"),
    "CycleDiffusionPipeline": (Case(), "eta"),
    "StableDiffusionParadigmsPipeline": (Case(), "parallel scheduler"),
}
"""What `accelerate` refuses, and a piece of the reason it gives."""

OUT_OF_REACH = {
    "AudioDiffusionPipeline": "spectrograms without a text, and steps of None by default",
    "AudioLDMPipeline": "AudioLDM: sound",
    "MusicLDMPipeline": "AudioLDM: sound",
    "BlipDiffusionPipeline": "its Q-Former calls invert_attention_mask, which transformers 5 has not",
    "BlipDiffusionControlNetPipeline": "its Q-Former calls invert_attention_mask, which transformers 5 has not",
    "StableDiffusionDiffEditPipeline": "blends with the latents that its invert() has at DDIM's timesteps, not LCM's",
    "LDMTextToImagePipeline": "LDM: neither its VAE nor its text encoder is Stable Diffusion's",
    **dict.fromkeys(
        ("KolorsPipeline", "KolorsImg2ImgPipeline", "KolorsPAGPipeline"), "Kolors: reads ChatGLM, has no LCM-LoRA"
    ),
    **dict.fromkeys(
        ("MarigoldDepthPipeline", "MarigoldIntrinsicsPipeline", "MarigoldNormalsPipeline"),
        "Marigold: estimates from a picture, with few steps of its own",
    ),
    **dict.fromkeys(
        (
            "IFPipeline",
            "IFImg2ImgPipeline",
            "IFImg2ImgSuperResolutionPipeline",
            "IFInpaintingPipeline",
            "IFInpaintingSuperResolutionPipeline",
            "IFSuperResolutionPipeline",
        ),
        "DeepFloyd IF: pixels, not latents, and T5",
    ),
    **dict.fromkeys(
        (
            "KandinskyPipeline",
            "KandinskyCombinedPipeline",
            "KandinskyImg2ImgPipeline",
            "KandinskyImg2ImgCombinedPipeline",
            "KandinskyInpaintPipeline",
            "KandinskyInpaintCombinedPipeline",
            "KandinskyV22Pipeline",
            "KandinskyV22CombinedPipeline",
            "KandinskyV22ControlnetPipeline",
            "KandinskyV22ControlnetImg2ImgPipeline",
            "KandinskyV22Img2ImgPipeline",
            "KandinskyV22Img2ImgCombinedPipeline",
            "KandinskyV22InpaintPipeline",
            "KandinskyV22InpaintCombinedPipeline",
        ),
        "Kandinsky: decodes image embeddings, its UNet's blocks are others",
    ),
}
"""Other families, and what can't be built or makes no sense with LCM, by class name: why."""


@functools.cache
def classes() -> dict[str, type]:
    """Every pipeline class of diffusers whose `unet` is annotated as one of the two that lcmlora accelerates."""
    found = {}
    for module in pkgutil.walk_packages(pipelines.__path__, pipelines.__name__ + "."):
        if not module.name.rpartition(".")[2].startswith("pipeline"):
            continue
        for name, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if cls.__module__ == module.name and issubclass(cls, DiffusionPipeline):
                annotation = typing.get_type_hints(cls.__init__).get("unet")
                if {UNet2DConditionModel, UNetMotionModel} & {annotation, *typing.get_args(annotation)}:
                    found[name] = cls
    return found


def make(name: str, case: Case, folder: Path) -> tuple[Any, Path]:
    """A pipe and a LoRA for it; `name` is the class's, and may go on after a comma."""
    pipe = build(classes()[name.partition(",")[0]], case.unet, **case.parts)
    return pipe, write_lora(folder / "lcm.safetensors", pipe.unet)


def passes(pipe: Any, **arguments: Any) -> int:
    """Call the pipe, see that the picture is finite, and count the UNet's passes."""
    taken = inspect.signature(type(pipe).__call__).parameters
    known = {**ARGUMENTS, "generator": torch.Generator().manual_seed(0)}
    seen: list[torch.Size] = []
    with pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)):
        output, *_ = pipe(
            **{key: value for key, value in known.items() if key in taken}, **arguments, return_dict=False
        )
    pictures = output if isinstance(output, tuple) else [output]  # LDM3D: colours and depth
    assert all(np.isfinite(np.asarray(picture)).all() for picture in pictures)
    return len(seen)


def state(pipe: Any, theirs: str) -> dict[str, Any]:
    """A snapshot, with the attention processors in it."""
    values = {key: value for key, value in snapshot(pipe).items() if not key.startswith(theirs + ".")}
    return values if theirs == "processors" else {**values, "processors": dict(pipe.unet.attn_processors)}


@pytest.mark.parametrize(
    ("name", "fuse"),
    [
        *(pytest.param(name, True, id=f"{name}, fused") for name in CASES),
        *(pytest.param(name, False, id=f"{name}, unfused") for name in UNFUSED),
    ],
)
def test_runs_in_the_steps_asked_for_and_comes_back(name, fuse, tmp_path):
    case = CASES[name]
    pipe, file = make(name, case, tmp_path)
    before = state(pipe, case.theirs)
    lcmlora.accelerate(pipe, lora=file, fuse=fuse, **case.accelerate)
    assert type(pipe.scheduler) is LCMScheduler
    assert lcmlora.status(pipe).fused is fuse
    assert passes(pipe, **case.call) == 4 * case.per_step + case.extra
    strength = {"strength": 0.5} if "strength" in inspect.signature(type(pipe).__call__).parameters else {}
    assert passes(pipe, **case.call, **strength, num_inference_steps=3) == 3 * case.per_step + case.extra
    lcmlora.restore(pipe)
    assert_same(before, state(pipe, case.theirs))


def test_what_calls_look_up_in_their_open_arguments_is_known_and_nothing_else():
    seen = set()
    for name, cls in classes().items():
        takes = Parameters.of(cls, "__call__")
        text = inspect.getsource(inspect.unwrap(cls.__call__))
        looked_up = set(re.findall(r'\bkwargs(?:\.pop\(|\.get\(|\[)"(\w+)"', text))
        assert [*takes.unknown({*looked_up, *takes.defaults})] == []
        seen |= looked_up
        if takes.open and name not in OUT_OF_REACH:
            other = {"image", "mask_image", "control_image", "strength", "video", "prompt_3"} - takes.defaults.keys()
            assert {key for key, _ in takes.unknown(other)} == other
    assert seen >= {"callback", "callback_steps"}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_left_as_it_was(name, tmp_path):
    case, words = REFUSED[name]
    pipe, file = make(name, case, tmp_path)
    before = snapshot(pipe)
    with pytest.raises(lcmlora.PipelineError, match=words):
        lcmlora.accelerate(pipe, lora=file)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("name", ["AnimateDiffVideoToVideoPipeline", "AnimateDiffVideoToVideoControlNetPipeline"])
def test_enforced_steps_are_not_stretched_twice(name, tmp_path):
    pipe, file = make(name, CASES[name], tmp_path)
    lcmlora.accelerate(pipe, lora=file)
    assert passes(pipe, enforce_inference_steps=True) == 4


def test_no_class_is_forgotten():
    lists = [{name.partition(",")[0] for name in names} for names in (CASES, REFUSED, OUT_OF_REACH)]
    known = set().union(*lists)
    assert len(known) == sum(map(len, lists)), "a class is in two lists"
    assert set(classes()) == known
