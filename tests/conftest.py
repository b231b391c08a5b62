"""Tiny random pipelines of real diffusers classes, and LoRA files made for them."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcmlora.layers import lcm_layers

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def tiny_tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def text_config(tokenizer: CLIPTokenizer, width: int = 32) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def tiny_unet(seed: int = 0, width: int = 32, **changes: object) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": width,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            **changes,
        }
    )


def sd_pipe(
    seed: int = 0, unet: UNet2DConditionModel | None = None, cls: type = StableDiffusionPipeline
) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    pipe = cls(
        tiny_vae(),
        CLIPTextModel(text_config(tokenizer)),
        tokenizer,
        unet or tiny_unet(seed),
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_unet(seed: int = 0) -> UNet2DConditionModel:
    return tiny_unet(
        seed,
        width=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )


def sdxl_pipe(seed: int = 0, cls: type = StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    pipe = cls(
        tiny_vae(),
        CLIPTextModel(text_config(tokenizer)),
        CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer,
        tokenizer,
        sdxl_unet(seed),
        EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPES = {"sd": sd_pipe, "sdxl": sdxl_pipe}


def write_lora(
    path: Path,
    unet: UNet2DConditionModel,
    *,
    rank: int = 4,
    alpha: float | None = 2.0,
    only: Callable[[str], bool] = lambda name: True,
    seed: int = 1,
    spelling: str = "kohya",
    extra: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A LoRA file for the LCM layers of a UNet that `only` lets through."""
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(extra or {})
    for name, layer in lcm_layers(unet).items():
        if not only(name):
            continue
        shape = layer.weight.shape
        down = torch.randn(rank, *shape[1:], generator=generator) * 0.2
        up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator) * 0.2
        if spelling == "kohya":
            front, a, b = "lora_unet_" + name.replace(".", "_"), "lora_down", "lora_up"
        elif spelling == "diffusers":
            front, a, b = "unet." + name, "lora_A", "lora_B"
        else:  # the official SD 1.5 script's own output
            front, a, b = "unet.base_model.model." + name, "lora_A", "lora_B"
        tensors[f"{front}.{a}.weight"], tensors[f"{front}.{b}.weight"] = down, up
        if alpha is not None and spelling == "kohya":
            tensors[f"{front}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


@pytest.fixture
def lcm_file(tmp_path: Path) -> Callable[..., Path]:
    """Write the LCM-LoRA of a pipe."""

    def write(pipe: StableDiffusionPipeline, name: str = "lcm.safetensors", **options: object) -> Path:
        return write_lora(tmp_path / name, pipe.unet, **options)

    return write


def snapshot(pipe: StableDiffusionPipeline) -> dict[str, object]:
    """Everything a restore has to give back: tensors by value, objects by identity."""
    state: dict[str, object] = {"class": type(pipe), "scheduler": pipe.scheduler, "config": dict(pipe.config)}
    for part, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for name, parameter in module.named_parameters():
            state[f"{part}.{name}"] = (parameter, parameter.detach().clone(), parameter.requires_grad)
        for name, inner in module.named_modules():
            # transformers marks a text encoder at its first pass, accelerated or not
            marks = set(inner.__dict__) - {"_output_capturing_hooks_installed"}
            state[f"{part}:{name}"] = (inner, inner.training, marks)
            if isinstance(scales := getattr(inner, "scaling", None), dict) and scales:  # a number in BEiT
                state[f"{part}:{name}:scales"] = (dict(scales), list(inner.active_adapters), inner.disable_adapters)
        state[f"{part}:peft"] = dict(getattr(module, "peft_config", {}))
    return state


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        other = after[key]
        if isinstance(value, tuple) and isinstance(value[0], torch.nn.Parameter):
            assert value[0] is other[0], f"{key} is another Parameter"
            assert torch.equal(value[1], other[1]), f"{key} has other values"
            assert value[2] == other[2], f"{key} has another requires_grad"
        elif isinstance(value, tuple) and isinstance(value[0], torch.nn.Module):
            assert value[0] is other[0], f"{key} is another module"
            assert value[1:] == other[1:], f"{key} differs: {value[1:]} != {other[1:]}"
        elif key in ("class", "scheduler"):
            assert value is other, key
        else:
            assert value == other, key
