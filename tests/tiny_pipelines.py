"""The parts that pipelines are made of, tiny and random, and `build`, which fits them to a pipeline class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    PriorTransformer,
    SparseControlNetModel,
    T2IAdapter,
    UNet2DConditionModel,
    UnCLIPScheduler,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
)

from conftest import sdxl_unet, text_config, tiny_tokenizer, tiny_unet, tiny_vae

SIZE = 16  # pixels; the tiny VAE halves them
WIDTH = 32  # of the text encoders
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def mask() -> Image.Image:
    return Image.fromarray(np.tri(SIZE, dtype=np.uint8) * 255)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        projection_dim=WIDTH,
    )


def image_encoder() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(vision_config())


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size=SIZE, crop_size=SIZE)


def depth_estimator() -> DPTForDepthEstimation:
    config = DPTConfig(
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=4,
        num_attention_heads=4,
        backbone_out_indices=[0, 1, 2, 3],
        image_size=32,
        patch_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    return DPTForDepthEstimation(config)


def depth_processor() -> DPTImageProcessor:
    return DPTImageProcessor(size={"height": 32, "width": 32})


def controlnet(unet: UNet2DConditionModel, **changes: Any) -> ControlNetModel:
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16), **changes)


def controlnet_union(unet: UNet2DConditionModel) -> ControlNetUnionModel:
    return ControlNetUnionModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))


def sparse_controlnet() -> SparseControlNetModel:
    return SparseControlNetModel(
        in_channels=4,
        conditioning_channels=3,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(8, 8),
        use_simplified_condition_embedding=False,
    )


def motion_adapter(**changes: Any) -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        **changes,
    )


def t2i_adapter() -> T2IAdapter:
    return T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2)


def prior() -> PriorTransformer:
    return PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1, num_embeddings=16
    )


def _projected_text_encoder() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(text_config(tiny_tokenizer()))


# By the name of the pipeline's parameter; a value with a parameter `unet` is given the pipeline's UNet.
PARTS: dict[str, Callable[..., Any]] = {
    "vae": tiny_vae,
    "text_encoder": lambda: CLIPTextModel(text_config(tiny_tokenizer())),
    "text_encoder_2": _projected_text_encoder,
    "tokenizer": tiny_tokenizer,
    "tokenizer_2": tiny_tokenizer,
    "scheduler": lambda: DDIMScheduler(**BETAS),
    "safety_checker": lambda: None,
    "feature_extractor": lambda: None,
    "requires_safety_checker": lambda: False,
    "add_watermarker": lambda: False,
    "controlnet": controlnet,
    "motion_adapter": motion_adapter,
    "adapter": t2i_adapter,
    "depth_estimator": depth_estimator,
    "low_res_scheduler": lambda: DDPMScheduler(),
    "image_normalizer": lambda: StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
    "image_noising_scheduler": lambda: DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "prior_tokenizer": tiny_tokenizer,
    "prior_text_encoder": _projected_text_encoder,
    "prior": prior,
    "prior_scheduler": lambda: UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
}


def build(cls: type, /, **given: Any) -> Any:
    """A pipeline of that class. What it takes and is not given comes from PARTS, or is left to its default.

    Args:
        cls: the class. It is SDXL's kind if it takes a second text encoder.
        given: parts to use instead; a function makes the part, from the pipeline's UNet if it has a parameter `unet`.
            A dict given as `unet` changes the config of the tiny UNet.
    """
    torch.manual_seed(0)
    parameters = dict(inspect.signature(cls.__init__).parameters)
    parameters.pop("self")
    sdxl = "text_encoder_2" in parameters
    changes = given.pop("unet", {})
    unet = UNet2DConditionModel.from_config({**sdxl_unet().config, **changes}) if sdxl else tiny_unet(**changes)
    parts = {"unet": unet}
    if sdxl:
        given.setdefault("scheduler", EulerDiscreteScheduler(**BETAS))
    for name, parameter in parameters.items():
        if name in parts:
            continue
        if name not in given and name not in PARTS:
            assert parameter.default is not parameter.empty, f"{cls.__name__} needs a part {name!r}"
            continue
        part = given.get(name, PARTS.get(name))
        if inspect.isfunction(part):
            part = part(unet) if "unet" in inspect.signature(part).parameters else part()
        parts[name] = part
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
