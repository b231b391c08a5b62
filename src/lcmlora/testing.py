"""Tiny random pipelines and LoRA files, for tests that need real diffusers classes and neither network nor GPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .layers import layer_shape, layers, lcm_layers, unet_of
from .quiet import IMPORTING, hushed

_SHAPE: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
_SHAPE |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 4}
_SHAPE |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32}
_XL: dict[str, Any] = {
    "cross_attention_dim": 64,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
}
_XL |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SPELLINGS = {"kohya": ("lora_down", "lora_up"), "diffusers": ("lora_A", "lora_B"), "peft": ("lora_A", "lora_B")}


def tiny_pipeline(kind: Literal["sd", "sdxl"] = "sd", *, seed: int = 0, cls: Any = None, **unet_changes: Any) -> Any:
    """A pipeline of real diffusers classes with tiny random weights. It draws noise of 16 x 16 pixels in no time.

    >>> import lcmlora
    >>> from lcmlora.testing import tiny_lora, tiny_pipeline
    >>> pipe = tiny_pipeline("sd")
    >>> pipe = lcmlora.accelerate(pipe, lora=tiny_lora(pipe, "lcm.safetensors"))
    >>> pipe("a fox").images[0].size
    (16, 16)
    >>> lcmlora.restore(pipe).scheduler.__class__.__name__
    'DDIMScheduler'

    Args:
        kind: "sd" has one text encoder and a UNet of Stable Diffusion's shape, "sdxl" two and one of SDXL's.
        seed: of the weights. torch's global generator is left alone.
        cls: the pipeline's class, `StableDiffusionPipeline` or `StableDiffusionXLPipeline` where none is given. One
            that needs further parts is made of a pipeline: `cls.from_pipe(tiny_pipeline(), controlnet=...)`.
        unet_changes: what differs in the UNet's config, such as `in_channels=9`.
    """
    if cls is None:
        with hushed(*IMPORTING):
            cls = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
    tokenizer = tiny_tokenizer()
    with seeded(seed):
        parts = {"vae": tiny_vae(), "text_encoder": CLIPTextModel(text_config(tokenizer)), "tokenizer": tokenizer}
        if kind == "sdxl":
            parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config(tokenizer))
            parts["tokenizer_2"] = tokenizer
            parts["scheduler"] = diffusers.EulerDiscreteScheduler(**_BETAS)
    parts |= {"unet": tiny_unet(kind, seed=seed, **unet_changes), "add_watermarker": False}
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts.setdefault("scheduler", diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **_BETAS))
    takes = inspect.signature(cls.__init__).parameters
    pipe = cls(**{name: part for name, part in parts.items() if name in takes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_lora(
    pipe: Any,
    path: str | Path,
    *,
    rank: int = 4,
    alpha: float | None = 2.0,
    only: Callable[[str], bool] | None = None,
    seed: int = 1,
    spelling: Literal["kohya", "diffusers", "peft"] = "kohya",
    text: bool = False,
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a random LoRA for a pipeline: for all layers that an LCM-LoRA covers, so that it can stand for one.

    >>> import lcmlora
    >>> from lcmlora.testing import tiny_lora, tiny_pipeline
    >>> pipe = tiny_pipeline("sdxl")
    >>> ink = tiny_lora(pipe, "ink.safetensors", only=lambda name: name.endswith("to_q"), text=True)
    >>> pipe = lcmlora.accelerate(pipe, lora=tiny_lora(pipe, "lcm.safetensors"), styles={"ink": ink})
    >>> lcmlora.status(pipe).styles
    {'ink': 0.8}

    Args:
        pipe: the pipeline, or its UNet alone.
        path: of the file.
        rank: of each layer.
        alpha: of each layer; None, and other spellings than kohya's, write none.
        only: which of the UNet's layers, by name.
        seed: of the weights.
        spelling: of the layers' names: "kohya", "diffusers", or "peft", which the LCM training script writes.
        text: cover the text encoders' attention too: then it is a style, and no LCM-LoRA.
        extra: further tensors for the file.

    Returns:
        The path.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(extra or {})
    for name, layer in _adapted(pipe, spelling, only, text):
        out, *rest = layer_shape(layer)
        down = torch.randn(rank, *rest, generator=generator) * 0.2
        up = torch.randn(out, rank, *(1,) * (len(rest) - 1), generator=generator) * 0.2
        for half, tensor in zip(_SPELLINGS[spelling], (down, up), strict=True):
            tensors[f"{name}.{half}.weight"] = tensor
        if alpha is not None and spelling == "kohya":
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return Path(path)


def _adapted(pipe: Any, spelling: str, only: Callable[[str], bool] | None, text: bool) -> Iterator[tuple[str, Any]]:
    """The layers to cover, each with the name that the file gives it."""
    front = {"kohya": "lora_unet_", "diffusers": "unet.", "peft": "unet.base_model.model."}[spelling]
    unet: Any = unet_of(pipe)
    found = [(front, name, layer) for name, layer in lcm_layers(unet).items() if only is None or only(name)]
    for part, kohya in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")) if text else ():
        for name, layer in layers(getattr(pipe, part)).items() if hasattr(pipe, part) else ():
            if ".self_attn." in name:  # since transformers 5 some names lack what files have in front
                bare = "text_model." + name.removeprefix("text_model.")
                found.append((kohya if spelling == "kohya" else f"{part}.", bare, layer))
    for front, name, layer in found:
        yield front + (name.replace(".", "_") if spelling == "kohya" else name), layer


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global CPU generator at a seed, and afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def tiny_unet(kind: Literal["sd", "sdxl"] = "sd", *, seed: int = 0, **changes: Any) -> Any:
    """The UNet of a tiny pipeline."""
    with seeded(seed):
        return diffusers.UNet2DConditionModel(**{**_SHAPE, **(_XL if kind == "sdxl" else {}), **changes})


def tiny_vae() -> Any:
    """A VAE that halves the sides of a picture."""
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=down, up_block_types=up, norm_num_groups=4, sample_size=16
    )


def tiny_tokenizer() -> Any:
    """A tokenizer that knows single bytes, and texts of 16 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def text_config(tokenizer: Any, width: int = 32) -> Any:
    """The config of a text encoder for that tokenizer."""
    sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 37, "num_hidden_layers": 2}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPTextConfig(num_attention_heads=4, max_position_embeddings=16, **sizes, **tokens)
