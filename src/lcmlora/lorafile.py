"""What a LoRA file is, told from its header alone, and which layers of a UNet it covers.

Spellings understood: kohya with diffusers block names (the official LCM-LoRAs) and with sgm block names (most SDXL
styles), diffusers and PEFT keys with or without `unet.` and `base_model.model.` in front, old attention-processor
keys.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .errors import LoraFileError

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
"""diffusers' usual name of a LoRA file."""

_PART = re.compile(
    r"^(?P<module>.+?)(?:\.lora_linear_layer|\.lora|_lora)?[._]"
    r"(?P<part>lora_down|lora_up|lora_A|lora_B|down|up)(?:\.\w+)?\.weight$"
)
_SIDES = {"lora_down": "down", "lora_A": "down", "down": "down", "lora_up": "up", "lora_B": "up", "up": "up"}
_TEXT_ENCODER = ("text_encoder.", "text_encoder_2.", "lora_te_", "lora_te1_", "lora_te2_")
_IN_FRONT = re.compile(r"^(?:unet\.)?(?:base_model\.model\.)?(?:unet\.)?")


@dataclasses.dataclass(frozen=True)
class Pair:
    """One adapted module in a file: W + alpha / rank * up @ down.

    `down` and `up` are keys of the file; the shapes are (rank, in, ...) and (out, rank, ...).
    """

    down: str
    up: str
    down_shape: tuple[int, ...]
    up_shape: tuple[int, ...]
    alpha: float

    @property
    def rank(self) -> int:
        """Columns of `up`, rows of `down`."""
        return self.down_shape[0]

    @property
    def scale(self) -> float:
        """What up @ down is multiplied with at weight 1."""
        return self.alpha / self.rank

    def fits(self, layer: nn.Module) -> bool:
        """Whether up @ down has the layer's weight shape (a 1 x 1 convolution and a linear layer are the same)."""
        out, *rest = layer.weight.shape  # type: ignore[misc, operator]
        return self.up_shape[0] == out and math.prod(self.down_shape[1:]) == math.prod(rest)


@dataclasses.dataclass(frozen=True)
class LoraInfo:
    """What a LoRA file holds.

    Attributes:
        path: the file.
        format: "kohya", "kohya-sgm" or "diffusers".
        modules: the UNet's adapted modules, by the file's own names.
        ranks: every rank that occurs, ascending.
        alphas: every alpha that occurs, ascending.
        text_encoder_keys: how many keys belong to text encoders.
        cross_attention_dim: the text width it was made for (768 SD 1.x, 1024 SD 2.x, 2048 SDXL family); None if
            unknown.
    """

    path: Path
    format: str
    modules: Mapping[str, Pair]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    text_encoder_keys: int
    cross_attention_dim: int | None

    def describe(self) -> str:
        """One line: "LCM.safetensors (278 modules, rank 64, text width 768)"."""
        ranks, width = "/".join(map(str, self.ranks)) or "none", self.cross_attention_dim or "?"
        return f"{self.path.name} ({len(self.modules)} modules, rank {ranks}, text width {width})"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How a file's modules and a UNet's layers meet.

    Attributes:
        pairs: layer name -> the file's pair for it, shapes agreeing.
        clashes: layers that the file names, with other shapes.
        foreign: modules of the file that the UNet has not.
    """

    pairs: Mapping[str, Pair]
    clashes: tuple[str, ...]
    foreign: tuple[str, ...]


def find_file(
    source: str | Path,
    weight_name: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local path of a LoRA: a file, the right file of a folder, or one fetched from (or cached of) the hub.

    Raises:
        LoraFileError: it is nowhere, or no safetensors file; the message says where was looked.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _safetensors(path)
    if path.is_dir():
        return _file_in(path, weight_name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise LoraFileError(f"LoRA {str(source)!r} is no file, no folder and no repository id like 'owner/name'.")
    from huggingface_hub import hf_hub_download

    name = weight_name or WEIGHT_NAME
    try:
        found = hf_hub_download(
            str(source), name, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
        )
    except Exception as error:  # the hub raises many kinds, none of them tells what to type
        from huggingface_hub.constants import HF_HUB_CACHE

        raise LoraFileError(
            f"LoRA {source}/{name} could not be had: no such file or folder here, not in the hub's cache "
            f"({cache_dir or HF_HUB_CACHE}), and from the hub: {str(error).splitlines()[0]} "
            f"Once on line, type: hf download {source} {name}; or pass lora= with a local file."
        ) from error
    return _safetensors(Path(found))


def _safetensors(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise LoraFileError(
            f"{path} is no .safetensors file; pickled weights can run code when loaded and are refused."
        )
    return path


def _file_in(folder: Path, weight_name: str | None) -> Path:
    wanted = folder / (weight_name or WEIGHT_NAME)
    if wanted.is_file():
        return _safetensors(wanted)
    there = sorted(p.name for p in folder.glob("*.safetensors"))
    if weight_name is None and len(there) == 1:
        return folder / there[0]
    raise LoraFileError(
        f"folder {folder} holds no {wanted.name}; its safetensors files: {there or 'none'}. Pass weight_name=."
    )


def read(path: Path) -> LoraInfo:
    """Read a file's header (and its alphas, one number each); no weight is loaded.

    Raises:
        LoraFileError: not safetensors, truncated, no LoRA, or a kind of adapter other than plain LoRA.
    """
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            alphas = {
                key.removesuffix(".alpha"): float(file.get_tensor(key))
                for key in shapes
                if key.endswith(".alpha") and not shapes[key]
            }
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise LoraFileError(f"{path} can't be read as safetensors (truncated or corrupt?): {error}") from error
    sides, text_encoder_keys = _sort_keys(path, shapes)
    modules = {}
    pattern = _Alphas(metadata)
    for name, keys in sides.items():
        if set(keys) != {"down", "up"}:
            raise LoraFileError(f"{path}: module {name} has only {sorted(keys.values())}; a LoRA needs both halves.")
        down, up = shapes[keys["down"]], shapes[keys["up"]]
        if len(down) < 2 or len(up) < 2 or 0 in (*down, *up) or math.prod(up[1:]) != down[0]:
            raise LoraFileError(f"{path}: the halves of {name} don't go together: {list(down)} and {list(up)}.")
        alpha = alphas.get(name, pattern.of(_IN_FRONT.sub("", name), down[0]))
        if not math.isfinite(alpha) or not 1e-3 <= abs(alpha) / down[0] <= 1e3:
            raise LoraFileError(f"{path}: alpha {alpha} of {name} (rank {down[0]}) makes no sense.")
        modules[name] = Pair(keys["down"], keys["up"], down, up, alpha)
    if not modules and not text_encoder_keys:
        raise LoraFileError(f"{path} holds no LoRA: none of its {len(shapes)} keys is a LoRA key.")
    return LoraInfo(
        path=path,
        format=_format(modules),
        modules=modules,
        ranks=tuple(sorted({pair.rank for pair in modules.values()})),
        alphas=tuple(sorted({pair.alpha for pair in modules.values()})),
        text_encoder_keys=text_encoder_keys,
        cross_attention_dim=_cross_attention_dim(modules),
    )


def _sort_keys(path: Path, shapes: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], int]:
    """({module: {"down": key, "up": key}}, number of text-encoder keys)."""
    sides: dict[str, dict[str, str]] = {}
    text_encoder_keys = 0
    strange: list[str] = []
    for key in shapes:
        if _IN_FRONT.sub("", key).startswith(_TEXT_ENCODER):
            text_encoder_keys += 1
        elif match := _PART.match(key):
            sides.setdefault(match["module"], {})[_SIDES[match["part"]]] = key
        elif not key.endswith(".alpha"):
            strange.append(key)
    if strange:
        raise LoraFileError(
            f"{path} is no plain LoRA: {len(strange)} of its {len(shapes)} keys are of another kind, "
            f"such as {strange[0]!r}."
        )
    return sides, text_encoder_keys


def _format(modules: Mapping[str, Pair]) -> str:
    if not all(name.startswith("lora_unet_") for name in modules):
        return "diffusers"
    sgm = any("put_blocks_" in name or "middle_block_" in name for name in modules)
    return "kohya-sgm" if sgm else "kohya"


def _cross_attention_dim(modules: Mapping[str, Pair]) -> int | None:
    widths = Counter(
        pair.down_shape[1] for name, pair in modules.items() if re.search(r"attn2[._](?:processor\.)?to_[kv]$", name)
    )
    return widths.most_common(1)[0][0] if widths else None


class _Alphas:
    """The alphas that diffusers and PEFT write into a file's metadata; where there are none, alpha is the rank."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            written = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except json.JSONDecodeError:
            written = {}
        self._config = {key.removeprefix("unet."): value for key, value in written.items()}

    def of(self, module: str, rank: int) -> float:
        patterns = self._config.get("alpha_pattern") or {}
        alpha = next(
            (a for pattern, a in patterns.items() if re.search(rf"(^|.*\.){pattern}$", module)),
            self._config.get("lora_alpha"),
        )
        if alpha is None:
            return float(rank)
        return float(alpha) * (math.sqrt(rank) if self._config.get("use_rslora") else 1.0)


def cover(info: LoraInfo, layers: Mapping[str, nn.Module]) -> Coverage:
    """Match a file's modules with a UNet's layers (`lcmlora.unets.layers`), by name and by shape."""
    names = _spellings(layers)
    pairs, clashes, foreign = {}, [], []
    for module, pair in info.modules.items():
        name = names.get(_IN_FRONT.sub("", module).replace(".processor", ""))
        if name is None:
            foreign.append(module)
        elif pair.fits(layers[name]):
            pairs[name] = pair
        else:
            clashes.append(name)
    return Coverage(pairs, tuple(clashes), tuple(foreign))


def _spellings(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Every way a LoRA file may write a layer's name -> the name."""
    per_block = 1 + max(
        (int(m[1]) for name in layers if (m := re.match(r"down_blocks\.\d+\.resnets\.(\d+)\.", name))), default=0
    )
    table = {}
    for name in layers:
        table[name] = name
        table[name.replace(".to_out.0", ".to_out")] = name  # old attention-processor keys
        table["lora_unet_" + name.replace(".", "_")] = name
        table["lora_unet_" + _sgm(name, per_block).replace(".", "_")] = name
    return table


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
        return name
    if kind == "resnets":
        rest = next((rest.replace(ours, theirs) for ours, theirs in _SGM_INSIDE if rest == ours), rest)
    return f"{front}.{rest}"


def load(path: Path, pair: Pair, file: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of a pair as float32 matrices: up (out, rank) and down (rank, in).

    Raises:
        LoraFileError: they hold NaN or infinity.
    """
    if file is None:
        with safe_open(path, "pt") as opened:
            return load(path, pair, opened)
    up, down = (file.get_tensor(key).flatten(1).float() for key in (pair.up, pair.down))
    if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
        raise LoraFileError(f"{path}: {pair.up} or {pair.down} holds NaN or infinity; the file is damaged.")
    return up, down


def inspect_lora(source: str | Path, weight_name: str | None = None, **hub: Any) -> LoraInfo:
    """What a LoRA file holds, without loading its weights.

    Args:
        source: repository id, folder or safetensors file.
        weight_name: the file's name there, where it is not `pytorch_lora_weights.safetensors`.
        hub: `revision`, `cache_dir`, `token`, `local_files_only`, as in `huggingface_hub.hf_hub_download`.

    Raises:
        LoraFileError: it is not there, or can't be read as a LoRA.
    """
    return read(find_file(source, weight_name, **hub))
