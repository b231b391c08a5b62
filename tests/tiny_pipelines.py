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
    ControlNetXSAdapter,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    PriorTransformer,
    SparseControlNetModel,
    T2IAdapter,
    UnCLIPScheduler,
    UNet2DConditionModel,
)
from diffusers.pipelines.deprecated.paint_by_example.image_encoder import PaintByExampleImageEncoder
from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTImageProcessor,
    GLPNConfig,
    GLPNForDepthEstimation,
)

from conftest import sdxl_unet, text_config, tiny_tokenizer, tiny_unet, tiny_vae

SIZE = 16
"""Pixels of a picture's side. The tiny VAE halves them."""
WIDTH = 32
"""Of the text and image encoders."""
HINTS = (8, 16)
"""Widths of a ControlNet's way from pixels to latents: one halving, as in the tiny VAE."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MOTION = {
    "block_out_channels": (8, 16),
    "motion_layers_per_block": 1,
    "motion_num_attention_heads": 2,
    "motion_norm_num_groups": 4,
}


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


def example_encoder() -> PaintByExampleImageEncoder:
    return PaintByExampleImageEncoder(vision_config(), proj_size=WIDTH)


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size=SIZE, crop_size=SIZE)


def image_project() -> CLIPImageProjection:
    return CLIPImageProjection(hidden_size=WIDTH)


def depth_estimator() -> GLPNForDepthEstimation:
    """In DPT's place, whose attention has numbers `scaling` that `snapshot` takes for PEFT's."""
    ones = [1, 1, 1, 1]
    widths = [8, 8, 8, 8]
    config = GLPNConfig(
        depths=ones, num_attention_heads=ones, sr_ratios=ones, hidden_sizes=widths, decoder_hidden_size=8
    )
    return GLPNForDepthEstimation(config)


def depth_processor() -> DPTImageProcessor:
    return DPTImageProcessor(size={"height": 32, "width": 32})


def projecting_text_encoder() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(text_config(tiny_tokenizer()))


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINTS)


def controlnet_union(unet: UNet2DConditionModel) -> ControlNetUnionModel:
    known = inspect.signature(ControlNetUnionModel.__init__).parameters
    config = {key: value for key, value in unet.config.items() if key in known}
    width = config["block_out_channels"][0]
    return ControlNetUnionModel(
        **config,
        conditioning_embedding_out_channels=HINTS,
        num_trans_channel=width,
        num_trans_head=2,
        num_proj_channel=width,
    )


def controlnet_xs(unet: UNet2DConditionModel) -> ControlNetXSAdapter:
    return ControlNetXSAdapter.from_unet(unet, block_out_channels=[4, 8], conditioning_embedding_out_channels=HINTS)


def sparse_controlnet() -> SparseControlNetModel:
    return SparseControlNetModel(
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        conditioning_channels=3,
        conditioning_embedding_out_channels=HINTS,
        use_simplified_condition_embedding=False,
    )


def motion_adapter() -> MotionAdapter:
    return MotionAdapter(**MOTION)


def pia_adapter() -> MotionAdapter:
    return MotionAdapter(**MOTION, conv_in_channels=9)


def t2i_adapter() -> T2IAdapter:
    return T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2)


def prior() -> PriorTransformer:
    return PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1, num_embeddings=16
    )


PARTS: dict[str, Callable[..., Any]] = {
    "vae": tiny_vae,
    "text_encoder": lambda: CLIPTextModel(text_config(tiny_tokenizer())),
    "text_encoder_2": projecting_text_encoder,
    "tokenizer": tiny_tokenizer,
    "tokenizer_2": tiny_tokenizer,
    "scheduler": lambda: DDIMScheduler(**BETAS),
    "inverse_scheduler": lambda: None,
    "low_res_scheduler": DDPMScheduler,
    "image_noising_scheduler": DDPMScheduler,
    "safety_checker": lambda: None,
    "requires_safety_checker": lambda: False,
    "feature_extractor": lambda: None,
    "image_encoder": lambda: None,
    "add_watermarker": lambda: False,
    "controlnet": controlnet,
    "motion_adapter": motion_adapter,
    "adapter": t2i_adapter,
    "depth_estimator": depth_estimator,
    "image_project": image_project,
    "processor": image_processor,
    "image_normalizer": lambda: StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
    "prior": prior,
    "prior_tokenizer": tiny_tokenizer,
    "prior_text_encoder": projecting_text_encoder,
    "prior_scheduler": lambda: UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
    "caption_generator": lambda: None,
    "caption_processor": lambda: None,
}
"""What makes a part, by the name of the pipeline's parameter. A parameter `unet` is given the pipeline's own."""


def build(cls: type, /, unet: dict[str, Any], **makers: Callable[..., Any]) -> Any:
    """A pipeline of that class; SDXL's kind, if it takes a second text encoder.

    Args:
        cls: the class.
        unet: changes to the config of the tiny UNet.
        makers: what makes parts that differ from PARTS, or that PARTS has not.
    """
    torch.manual_seed(0)
    parameters = inspect.signature(cls.__init__).parameters
    made: dict[str, Any] = {"unet": tiny_unet(**unet)}
    if "text_encoder_2" in parameters:
        config = {key: value for key, value in sdxl_unet().config.items() if not key.startswith("_")}
        made = {"unet": UNet2DConditionModel(**{**config, **unet}), "scheduler": EulerDiscreteScheduler(**BETAS)}
    for name, parameter in parameters.items():
        maker = makers.get(name) or PARTS.get(name)
        if name == "self" or name in made or (maker is None and parameter.default is not parameter.empty):
            continue
        assert maker, f"{cls.__name__} takes a {name!r}, which PARTS has not"
        takes_unet = "unet" in inspect.signature(maker).parameters
        made[name] = maker(made["unet"]) if takes_unet else maker()
    pipe = cls(**made)
    pipe.set_progress_bar_config(disable=True)
    return pipe
