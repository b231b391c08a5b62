"""How LoRA files write the names of layers.

Spellings understood: kohya with diffusers block names (the official LCM-LoRAs) and with sgm block names (most SDXL
styles), diffusers and PEFT keys with or without `unet.` and `base_model.model.` in front, old attention-processor
keys, motion LoRAs in diffusers' and in AnimateDiff's own names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

_PREFIXES = {
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
}
_IN_FRONT = re.compile(r"^(?:unet\.)?(?:_orig_mod\.)?(?:base_model\.model\.)?(?:unet\.)?(?:_orig_mod\.)?")
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_SGM_BLOCKS = ("input_blocks", "middle_block", "output_blocks")
_BLOCKS = ("down_blocks", "mid_block", "up_blocks", "encoder")  # "encoder": of a text encoder


def part_of(module: str) -> str:
    """The part of a pipeline that a module's name in a file belongs to."""
    front = _IN_FRONT.sub("", module)
    return next((part for prefix, part in _PREFIXES.items() if front.startswith(prefix)), "unet")


def plain(part: str, module: str) -> str:
    """A module's name in a file without what stands in front of the model's own name."""
    return _IN_FRONT.sub("", module.removeprefix(f"{part}."))


def is_kohya(module: str) -> bool:
    """Whether a module's name has dots replaced by underscores, and kohya's prefix."""
    return module.startswith(_KOHYA)


def is_sgm(module: str) -> bool:
    """Whether a module's name counts blocks as Stability's own code does."""
    return any(block in module for block in _SGM_BLOCKS)


def second_half(modules: Iterable[str]) -> tuple[list[str], str]:
    """The modules of one part that diffusers leaves out of a file with two spellings, and what they are in words.

    Where there are diffusers blocks, it drops all sgm blocks (lora_conversion_utils.py,
    _maybe_map_sgm_blocks_to_diffusers). Where there are keys of its own format, it drops all of kohya's
    (lora_pipeline.py, lora_state_dict). Layers that only the dropped half names are lost with it.
    """
    kohya, sgm, blocks = [], [], {True: False, False: False}
    for module in modules:
        blocks[is_kohya(module)] |= any(block in module for block in _BLOCKS)
        if is_kohya(module):
            kohya.append(module)
            sgm += [module] if is_sgm(module) else []
    if kohya and blocks[False]:
        return kohya, "modules in kohya's format, beside some in diffusers' own"
    if sgm and blocks[True]:
        return sgm, "modules with sgm block names, beside some with diffusers block names"
    return [], ""


def preference(module: str) -> tuple[bool, ...]:
    """Sort key: of two names for one layer, the one that diffusers takes comes first."""
    return (not module.startswith(("unet.", "text_encoder")), ".processor" in module, module.startswith("lora_te1_"))


def unet_spellings(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Every way a LoRA file may write a UNet layer's name -> the name."""
    per_block = 1 + max(
        (int(m[1]) for name in layers if (m := re.match(r"down_blocks\.\d+\.resnets\.(\d+)\.", name))), default=0
    )
    table = {}
    for name in layers:
        for spelling in (name, _animatediff(name)):
            table[spelling] = name
            table[spelling.replace(".to_out.0", ".to_out")] = name  # old attention-processor keys
            table["lora_unet_" + spelling.replace(".", "_")] = name
        table["lora_unet_" + _sgm(name, per_block).replace(".", "_")] = name
    return table


def _animatediff(name: str) -> str:
    """A motion module's layer as AnimateDiff's own code calls it."""
    own = re.sub(r"(motion_modules\.\d+\.)", r"\1temporal_transformer.", name)
    return own if own == name else re.sub(r"\.attn(\d)\.", lambda m: f".attention_blocks.{int(m[1]) - 1}.", own)


def text_spellings(part: str, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Every way a LoRA file may write a text encoder's layer -> its name in this transformers version.

    Since transformers 5 a CLIPTextModel's layers are called `encoder...`; files say `text_model.encoder...`.
    """
    prefixes = [prefix for prefix, of in _PREFIXES.items() if of == part and prefix.startswith("lora_")]
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    table = {}
    for name in layers:
        bare = name.removeprefix("text_model.")
        for spelling in (bare, f"text_model.{bare}"):
            table[spelling] = name
            front, _, last = spelling.rpartition(".")
            table[f"{front}.{old.get(last, last)}"] = name
            table.update({prefix + spelling.replace(".", "_"): name for prefix in prefixes})
    return table


_SGM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_SGM_INSIDE = (
    ("conv1", "in_layers.2"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)


def _sgm(name: str, per_block: int) -> str:
    """The name of a layer in Stability's own code, whose UNet counts its blocks through.

    `per_block` is the number of resnets of a down block (the config's `layers_per_block`).
    """
    down = re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.*)", name)
    mid = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
    up = re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.*)", name)
    if down:
        block, kind, index, rest = int(down[1]), down[2], int(down[3]), down[4]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (per_block + 1)}.0.op"
        front = f"input_blocks.{1 + block * (per_block + 1) + index}.{int(kind == 'attentions')}"
    elif mid:
        kind, index, rest = mid[1], int(mid[2]), mid[3]
        front = f"middle_block.{1 if kind == 'attentions' else 2 * index}"
    elif up:
        block, kind, index, rest = int(up[1]), up[2], int(up[3]), up[4]
        if kind == "upsamplers":  # after the resnet and, where there is one, the attention: diffusers takes it for 2
            return f"output_blocks.{block * (per_block + 1) + per_block}.2.conv"
        front = f"output_blocks.{block * (per_block + 1) + index}.{int(kind == 'attentions')}"
    else:
        return _SGM_OUTSIDE.get(name, name)
    if kind == "resnets":
        rest = next((rest.replace(ours, theirs) for ours, theirs in _SGM_INSIDE if rest == ours), rest)
    return f"{front}.{rest}"
