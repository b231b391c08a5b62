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

from ..errors import LoraFileError
from ..layers import layer_shape

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
"""diffusers' usual name of a LoRA file."""

_PART = re.compile(
    r"^(?P<module>.+?)(?:\.lora_linear_layer|\.lora|_lora)?[._]"
    r"(?P<part>lora_down|lora_up|lora_A|lora_B|down|up)(?:\.\w+)?\.weight$"
)
_SIDES = {"lora_down": "down", "lora_A": "down", "down": "down", "lora_up": "up", "lora_B": "up", "up": "up"}
_PREFIXES = {
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te1_": "text_encoder",
    "lora_te_": "text_encoder",
}
_IN_FRONT = re.compile(r"^(?:unet\.)?(?:base_model\.model\.)?(?:unet\.)?")
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
MAX_RANK = 2048
"""No layer of a known UNet has more rows or columns that a LoRA of higher rank could serve."""


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
        out, *rest = layer_shape(layer)
        return self.up_shape[0] == out and math.prod(self.down_shape[1:]) == math.prod(rest)


@dataclasses.dataclass(frozen=True)
class LoraInfo:
    """What a LoRA file holds.

    Attributes:
        path: the file.
        format: "kohya", "kohya-sgm" or "diffusers".
        modules: the UNet's adapted modules, by the file's own names.
        text_modules: the same for "text_encoder" and "text_encoder_2", where the file has any.
        ranks: every rank that occurs, ascending.
        alphas: every alpha that occurs, ascending.
        cross_attention_dim: the text width it was made for (768 SD 1.x, 1024 SD 2.x, 2048 SDXL family); None if
            unknown.
    """

    path: Path
    format: str
    modules: Mapping[str, Pair]
    text_modules: Mapping[str, Mapping[str, Pair]]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    cross_attention_dim: int | None

    def describe(self) -> str:
        """One line: "LCM.safetensors (278 modules, rank 64, text width 768)"."""
        ranks, width = "/".join(map(str, self.ranks)) or "none", self.cross_attention_dim or "?"
        texts = sum(map(len, self.text_modules.values()))
        also = f", {texts} in text encoders" if texts else ""
        return f"{self.path.name} ({len(self.modules)} modules{also}, rank {ranks}, text width {width})"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How a file's modules and a model's layers meet.

    Attributes:
        pairs: layer name -> the file's pair for it, shapes agreeing.
        clashes: layers that the file names, with other shapes.
        foreign: modules of the file that the model has not.
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
    header = _Header.of(path)
    modules: dict[str, dict[str, Pair]] = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
    for (part, name), keys in _sort_keys(header).items():
        modules[part][name] = _pair(header, part, name, keys)
    pairs = [pair for part in modules.values() for pair in part.values()]
    if not pairs:
        raise LoraFileError(f"{path} holds no LoRA: none of its {len(header.shapes)} keys is a LoRA key.")
    unet = modules.pop("unet")
    return LoraInfo(
        path=path,
        format=_format(unet),
        modules=unet,
        text_modules={part: names for part, names in modules.items() if names},
        ranks=tuple(sorted({pair.rank for pair in pairs})),
        alphas=tuple(sorted({pair.alpha for pair in pairs})),
        cross_attention_dim=_cross_attention_dim(unet),
    )


@dataclasses.dataclass(frozen=True)
class _Header:
    """What can be known of a file without its weights."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    alphas: Mapping[str, float]  # by module, as the file spells it
    config: Mapping[str, Any]  # what diffusers writes of PEFT's LoraConfig, the part in front: "unet.lora_alpha"
    patterns: Mapping[str, tuple[tuple[re.Pattern[str], Any], ...]]  # by part: PEFT's `alpha_pattern`, compiled

    @staticmethod
    def of(path: Path) -> _Header:
        try:
            with safe_open(path, "pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
                odd = [key for key, part in slices.items() if _PART.match(key) and part.get_dtype() not in _FLOATS]
                if odd:
                    kind = slices[odd[0]].get_dtype()
                    raise LoraFileError(f"{path}: {odd[0]} is of type {kind}; a LoRA's halves are floating point.")
                alpha_keys = [key for key in shapes if key.endswith(".alpha")]
                for key in alpha_keys:
                    if math.prod(shapes[key]) != 1:
                        raise LoraFileError(f"{path}: {key} is no single number but of shape {list(shapes[key])}.")
                alphas = {key.removesuffix(".alpha"): float(file.get_tensor(key)) for key in alpha_keys}
                written = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise LoraFileError(f"{path} can't be read as safetensors (truncated or corrupt?): {error}") from error
        try:
            config = json.loads(written)
        except (json.JSONDecodeError, RecursionError) as error:
            raise LoraFileError(f"{path}: its lora_adapter_metadata is no JSON, so alpha is unknown.") from error
        config = config if isinstance(config, dict) else {}
        parts = ("unet", "text_encoder", "text_encoder_2")
        patterns = {part: _alpha_patterns(path, config.get(f"{part}.alpha_pattern") or {}) for part in parts}
        return _Header(path, shapes, alphas, config, patterns)

    def alpha(self, part: str, name: str, rank: int) -> float:
        """alpha as PEFT would have it: of the module's own key, else the metadata's, else the rank."""
        if name in self.alphas:
            return self.alphas[name]
        module = _plain(part, name)
        found = (value for pattern, value in self.patterns[part] if pattern.match(module))
        alpha = next(found, self.config.get(f"{part}.lora_alpha"))
        if alpha is None:
            return float(rank)
        rank_stabilised = self.config.get(f"{part}.use_rslora")
        return _number(alpha) * (math.sqrt(rank) if rank_stabilised else 1.0)


def _alpha_patterns(path: Path, written: Any) -> tuple[tuple[re.Pattern[str], Any], ...]:
    """PEFT's alpha_pattern as it matches it (peft, utils/other.py, get_pattern_key): a regular expression for the end
    of a name. diffusers writes "^whole.name", of which there may be hundreds.
    """
    try:
        return tuple(
            (re.compile(f"{key}$" if re.fullmatch(r"\^[\w.]+", key) else rf"(?:.*\.)?(?:{key})$"), value)
            for key, value in written.items()
        )
    except (AttributeError, re.error, OverflowError, RecursionError) as error:
        raise LoraFileError(
            f"{path}: the alpha_pattern in its lora_adapter_metadata makes no sense: {error}"
        ) from error


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _plain(part: str, name: str) -> str:
    """A module's name in a file without what stands in front of the model's own name."""
    return _IN_FRONT.sub("", name.removeprefix(f"{part}."))


def _sort_keys(header: _Header) -> dict[tuple[str, str], dict[str, str]]:
    """{(part, module): {"down": key, "up": key}}; refuses files with keys of another kind of adapter."""
    sides: dict[tuple[str, str], dict[str, str]] = {}
    strange: list[str] = []
    for key in header.shapes:
        match = _PART.match(key)
        if match:
            name, side = match["module"], _SIDES[match["part"]]
            front = _IN_FRONT.sub("", name)
            part = next((part for prefix, part in _PREFIXES.items() if front.startswith(prefix)), "unet")
            found = sides.setdefault((part, name), {})
            if side in found:
                raise LoraFileError(f"{header.path}: module {name} is there twice, as {found[side]!r} and as {key!r}.")
            found[side] = key
        elif not key.endswith(".alpha"):
            strange.append(key)
    if strange:
        raise LoraFileError(
            f"{header.path} is no plain LoRA: {len(strange)} of its {len(header.shapes)} keys are of another kind, "
            f"such as {strange[0]!r}."
        )
    return sides


def _pair(header: _Header, part: str, name: str, keys: Mapping[str, str]) -> Pair:
    if set(keys) != {"down", "up"}:
        raise LoraFileError(
            f"{header.path}: module {name} has only {sorted(keys.values())}; a LoRA needs both halves."
        )
    down, up = header.shapes[keys["down"]], header.shapes[keys["up"]]
    if len(down) < 2 or len(up) < 2 or 0 in (*down, *up) or math.prod(up[1:]) != down[0]:
        raise LoraFileError(f"{header.path}: the halves of {name} don't go together: {list(down)} and {list(up)}.")
    if down[0] > MAX_RANK:
        raise LoraFileError(f"{header.path}: rank {down[0]} of {name} makes no sense.")
    alpha = header.alpha(part, name, down[0])
    if not math.isfinite(alpha) or not 1e-3 <= abs(alpha) / down[0] <= 1e3:
        raise LoraFileError(f"{header.path}: alpha {alpha} of {name} (rank {down[0]}) makes no sense.")
    return Pair(keys["down"], keys["up"], down, up, alpha)


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


def cover(part: str, modules: Mapping[str, Pair], layers: Mapping[str, nn.Module]) -> Coverage:
    """Match a file's modules with the layers of a part (`lcmlora.unets.layers`), by name and by shape.

    Args:
        part: "unet", "text_encoder" or "text_encoder_2".
        modules: of `LoraInfo.modules` or `.text_modules[part]`.
        layers: the part's layers by their own names.
    """
    names = _spellings(layers) if part == "unet" else _text_spellings(part, layers)
    pairs: dict[str, Pair] = {}
    clashes, foreign = [], []
    for module, pair in modules.items():
        name = names.get(_plain(part, module).replace(".processor", ""))
        if name is None or name in pairs:  # a layer under two names would count twice
            foreign.append(module)
        elif pair.fits(layers[name]):
            pairs[name] = pair
        else:
            clashes.append(name)
    return Coverage(pairs, tuple(clashes), tuple(foreign))


def _spellings(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Every way a LoRA file may write a UNet layer's name -> the name."""
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


def _text_spellings(part: str, layers: Mapping[str, nn.Module]) -> dict[str, str]:
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


def load(path: Path, pair: Pair, file: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of a pair as float32 matrices: up (out, rank) and down (rank, in).

    Raises:
        LoraFileError: they hold NaN or infinity.
    """
    if file is None:
        with safe_open(path, "pt") as opened:
            return load(path, pair, opened)
    up, down = (file.get_tensor(key).flatten(1).float() for key in (pair.up, pair.down))
    if not all(torch.isfinite(extreme) for half in (up, down) for extreme in half.aminmax()):  # NaN is both
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
