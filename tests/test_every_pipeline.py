"""Every pipeline class of diffusers that holds a Stable Diffusion or SDXL UNet: accelerated, called, restored."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import typing
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel, UNetMotionModel, pipelines

import lcmlora
from conftest import assert_same, snapshot, write_lora
from tiny_pipelines import *

FRAMES = [picture(), picture()]
ARGUMENTS = {
    "prompt": "a fox",
    "height": SIZE,
    "width": SIZE,
    "image": picture(),
    "mask_image": mask(),
    "control_image": picture(),
    "control_mode": 0,
    "example_image": picture(),
    "video": FRAMES,
    "conditioning_frames": FRAMES,
    "num_frames": 2,
    "output_type": "np",
}


@dataclasses.dataclass(frozen=True)
class Case:
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    accelerate: dict[str, Any] = dataclasses.field(default_factory=dict)
    passes: Any = staticmethod(lambda steps: steps)


nine = {"unet": {"in_channels": 9}}
pix = {"unet": {"in_channels": 8}}
t2i = {"unet": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),}}
vision = {"image_encoder": image_encoder, "feature_extractor": image_processor}
CASES = {
    "StableDiffusionPipeline": Case(),
    "StableDiffusionImg2ImgPipeline": Case(),
    "StableDiffusionInpaintPipeline": Case(),
    "StableDiffusionInpaintPipeline (9 channels)": Case(nine),
    "StableDiffusionDepth2ImgPipeline": Case({"unet": {"in_channels": 5}, "feature_extractor": depth_processor}),
    "StableDiffusionInstructPix2PixPipeline": Case(pix),
    "StableDiffusionUpscalePipeline": Case({"unet": {"in_channels": 7, "num_class_embeds": 1000}}),
    "StableDiffusionImageVariationPipeline": Case(vision),
    "StableDiffusionLatentUpscalePipeline": Case({"unet": {"in_channels": 8}}),
    "StableUnCLIPPipeline": Case({"unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH}}, {"prior_num_inference_steps": 2}),
    "StableUnCLIPImg2ImgPipeline": Case({**vision, "unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDTH}}),
    "StableDiffusionXLPipeline": Case(),
    "StableDiffusionXLImg2ImgPipeline": Case(),
    "StableDiffusionXLInpaintPipeline": Case(),
    "StableDiffusionXLInpaintPipeline (9 channels)": Case(nine),
    "StableDiffusionXLInstructPix2PixPipeline": Case(pix),
    "StableDiffusionControlNetPipeline": Case(),
    "StableDiffusionControlNetImg2ImgPipeline": Case(),
    "StableDiffusionControlNetInpaintPipeline": Case(),
    "StableDiffusionXLControlNetPipeline": Case(),
    "StableDiffusionXLControlNetImg2ImgPipeline": Case(),
    "StableDiffusionXLControlNetInpaintPipeline": Case(),
    "StableDiffusionXLControlNetUnionPipeline": Case({"controlnet": controlnet_union}),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Case({"controlnet": controlnet_union}),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Case({"controlnet": controlnet_union}),
    "StableDiffusionAdapterPipeline": Case(t2i),
    "StableDiffusionXLAdapterPipeline": Case(t2i),
    "StableDiffusionPAGPipeline": Case(),
    "StableDiffusionPAGImg2ImgPipeline": Case(),
    "StableDiffusionPAGInpaintPipeline": Case(),
    "StableDiffusionControlNetPAGPipeline": Case(),
    "StableDiffusionControlNetPAGInpaintPipeline": Case(),
    "StableDiffusionXLPAGPipeline": Case(),
    "StableDiffusionXLPAGImg2ImgPipeline": Case(),
    "StableDiffusionXLPAGInpaintPipeline": Case(),
    "StableDiffusionXLControlNetPAGPipeline": Case(),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": Case(),
    "AnimateDiffPipeline": Case(),
    "AnimateDiffControlNetPipeline": Case(),
    "AnimateDiffSparseControlNetPipeline": Case({"controlnet": sparse_controlnet}),
    "AnimateDiffVideoToVideoPipeline": Case(),
    "AnimateDiffVideoToVideoControlNetPipeline": Case(),
    "AnimateDiffSDXLPipeline": Case(),
    "AnimateDiffPAGPipeline": Case(),
    # deprecated ones
    "PIAPipeline": Case({"motion_adapter": lambda: motion_adapter(conv_in_channels=9)}),
    "PaintByExamplePipeline": Case(nine),
    "SemanticStableDiffusionPipeline": Case(),
    "StableDiffusionAttendAndExcitePipeline": Case({}, {"token_indices": [1], "attn_res": (4, 4)}),
    "StableDiffusionGLIGENPipeline": Case({"unet": {"attention_type": "gated"}}, {"gligen_phrases": ["a fox"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}),
    "StableDiffusionLDM3DPipeline": Case({"image_encoder": None}),
    "StableDiffusionPanoramaPipeline": Case(),
    "StableDiffusionPipelineSafe": Case(),
    "StableDiffusionSAGPipeline": Case(),
    "CycleDiffusionPipeline": Case({}, {"source_prompt": "a cat"}),
    "StableDiffusionInpaintPipelineLegacy": Case(),
    "StableDiffusionModelEditingPipeline": Case(),
    "StableDiffusionParadigmsPipeline": Case(),
    "TextToVideoZeroPipeline": Case({}, {"t0": 1, "t1": 2, "video_length": 2}, {"guidance": 1.5}),
    "TextToVideoZeroSDXLPipeline": Case({}, {"t0": 1, "t1": 2, "video_length": 2}, {"guidance": 1.5}),
}


@cache
def classes():
    found = {}
    for module in pkgutil.walk_packages(pipelines.__path__, "diffusers.pipelines."):
        if ".pipeline_" in module.name:
            for name, cls in vars(importlib.import_module(module.name)).items():
                if inspect.isclass(cls) and issubclass(cls, DiffusionPipeline) and cls.__module__ == module.name:
                    annotation = typing.get_type_hints(cls.__init__).get("unet")
                    kinds = {annotation, *typing.get_args(annotation)}
                    if kinds & {UNet2DConditionModel, UNetMotionModel}:
                        found[name] = cls
    return found


def passes(pipe, **changes):
    takes = inspect.signature(type(pipe).__call__).parameters
    arguments = {name: value for name, value in {**ARGUMENTS, **changes}.items() if name in takes}
    if "generator" in takes:
        arguments["generator"] = torch.Generator().manual_seed(0)
    count = 0

    def add(module, args):
        nonlocal count
        count += 1

    handle = pipe.unet.register_forward_pre_hook(add)
    try:
        output = pipe(**arguments, return_dict=False)[0]
    finally:
        handle.remove()
    assert np.isfinite(np.asarray(output)).all()
    return count


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_it(name, fuse, tmp_path):
    case = CASES[name]
    cls = classes()[name.split(" ")[0]]
    pipe = build(cls, **case.parts)
    before = snapshot(pipe)
    file = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    lcmlora.accelerate(pipe, lora=file, fuse=fuse, **case.accelerate)
    assert type(pipe.scheduler) is LCMScheduler
    assert passes(pipe, **case.call) == 4
    half = {"strength": 0.5} if "strength" in inspect.signature(cls.__call__).parameters else {}
    assert passes(pipe, num_inference_steps=3, **half, **case.call) == 3
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))
