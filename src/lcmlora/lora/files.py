"""What a LoRA file is, told from its header alone, and which layers of a model it covers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LoraFileError
from ..layers import layer_shape
from . import spellings
from .sources import READ_ERRORS, WEIGHT_NAME, Given, HubOptions, LoraFile, Source

__all__ = [
    "MAX_RANK",
    "WEIGHT_NAME",
    "Coverage",
    "HubOptions",
    "LoraFile",
    "LoraInfo",
    "Pair",
    "Source",
    "cover",
    "inspect_lora",
    "load",
    "load_magnitude",
    "read",
]

_HALF = re.compile(
    r"^(?P<module>.+?)(?:\.lora_linear_layer|\.lora|_lora)?[._]"
    r"(?P<side>lora_down|lora_up|lora_A|lora_B|down|up)(?:\.\w+)?\.weight$"
)
_SIDES = {"lora_down": "down", "lora_A": "down", "down": "down", "lora_up": "up", "lora_B": "up", "up": "up"}
_MAGNITUDE = re.compile(r"^(?P<module>.+?)\.(?:lora_magnitude_vector(?:\.\w+)?(?:\.weight)?|dora_scale)$")
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_OTHER_KINDS = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.lora_mid\.": "LoCon with a Tucker core",
    r"\.diff(_b)?$": "whole differences of weights",
    r"lora(_B|_up|\.up)(\.\w+)?\.bias$": "LoRA with biases",
    r"\.(ia3_l|on_input)": "IA3",
    r"\.(oft_|boft_)": "OFT",
    r"\.lora_embedding_": "LoRA of an embedding",
    r"^(bundle_emb|emb_params|string_to_param)": "textual inversion",
    r"\.[wb]_norm$": "trained normalisation layers",
    r"^lora_controlnet$": "Control-LoRA",
}
"""What keys of other kinds of adapters look like -> the kind in words."""
MAX_RANK = 2048
"""No layer of a known UNet has more rows or columns that a LoRA of higher rank could serve."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """One adapted module in a file: W + alpha / rank * up @ down.

    `down` and `up` are keys of the file; the shapes are (rank, in, ...) and (out, rank, ...). `magnitude` is the key
    of DoRA's magnitudes: every row of that sum is then scaled to its magnitude.
    """

    down: str
    up: str
    down_shape: tuple[int, ...]
    up_shape: tuple[int, ...]
    alpha: float
    magnitude: str | None = None

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
        path: the file; None for a dict of tensors.
        format: "kohya", "kohya-sgm" or "diffusers".
        modules: the UNet's adapted modules, by the file's own names.
        text_modules: the same for "text_encoder" and "text_encoder_2", where the file has any.
        ranks: every rank that occurs, ascending.
        alphas: every alpha that occurs, ascending.
        cross_attention_dim: the text width it was made for (768 SD 1.x, 1024 SD 2.x, 2048 SDXL family); None if
            unknown.
        notes: what of the file is left out, as diffusers does, in words.
        file: where it was read.
        recipe: how its metadata says it is to be driven (`lcmlora_recipe`, which `distill` writes); None where it says
            nothing.
    """

    path: Path | None
    format: str
    modules: Mapping[str, Pair]
    text_modules: Mapping[str, Mapping[str, Pair]]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    cross_attention_dim: int | None
    notes: tuple[str, ...] = ()
    file: LoraFile | None = dataclasses.field(default=None, repr=False)
    recipe: str | None = None

    def describe(self) -> str:
        """One line: "LCM.safetensors (278 modules, rank 64, text width 768)"."""
        ranks, width = "/".join(map(str, self.ranks)) or "none", self.cross_attention_dim or "?"
        texts = sum(map(len, self.text_modules.values()))
        also = f", {texts} in text encoders" if texts else ""
        name = self.path.name if self.path else self.file.label if self.file else "LoRA"
        return f"{name} ({len(self.modules)} modules{also}, rank {ranks}, text width {width})"


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How a file's modules and a model's layers meet.

    Attributes:
        pairs: layer name -> the file's pair for it, shapes agreeing.
        clashes: layers that the file names, with other shapes.
        foreign: modules of the file that the model has not.
        doubled: modules for a layer that has one already, by another spelling; left out.
    """

    pairs: Mapping[str, Pair]
    clashes: tuple[str, ...]
    foreign: tuple[str, ...]
    doubled: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out, in words."""
        count = len(self.doubled)
        return (f"{count} modules in a second spelling, such as {self.doubled[0]}",) if count else ()


def read(file: LoraFile) -> LoraInfo:
    """Read a file's header (and its alphas, one number each); no weight is loaded.

    Raises:
        LoraFileError: not safetensors, truncated, no LoRA, or a kind of adapter other than LoRA and DoRA.
    """
    header = _Header.of(file)
    modules: dict[str, dict[str, Pair]] = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
    sides, doubled = _sort_keys(header)
    for (part, name), keys in sides.items():
        modules[part][name] = _pair(header, part, name, keys)
    if not any(modules.values()):
        raise LoraFileError(f"{file.label} holds no LoRA: none of its {len(header.shapes)} keys is a LoRA key.")
    notes = [f"{len(doubled)} modules in a second spelling, such as {doubled[0]}"] if doubled else []
    for pairs in modules.values():
        out, words = spellings.second_half(pairs)
        notes += [f"{len(out)} {words}, such as {out[0]}"] if out else []
        for name in out:
            del pairs[name]
    kept = [pair for pairs in modules.values() for pair in pairs.values()]
    unet = modules.pop("unet")
    return LoraInfo(
        path=file.path,
        format=_format(unet),
        modules=unet,
        text_modules={part: names for part, names in modules.items() if names},
        ranks=tuple(sorted({pair.rank for pair in kept})),
        alphas=tuple(sorted({pair.alpha for pair in kept})),
        cross_attention_dim=_cross_attention_dim(unet),
        notes=tuple(notes),
        file=file,
        recipe=header.recipe,
    )


@dataclasses.dataclass(frozen=True)
class _Header:
    """What can be known of a file without its weights."""

    path: str
    shapes: Mapping[str, tuple[int, ...]]
    alphas: Mapping[str, float]  # by module, as the file spells it
    config: Mapping[str, Any]  # what diffusers writes of PEFT's LoraConfig, the part in front: "unet.lora_alpha"
    patterns: Mapping[str, tuple[tuple[re.Pattern[str], Any], ...]]  # by part: PEFT's `alpha_pattern`, compiled
    recipe: str | None

    @staticmethod
    def of(found: LoraFile) -> _Header:
        path = found.label
        try:
            with found.opened() as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
                odd = [key for key, part in slices.items() if _weight(key) and part.get_dtype() not in _FLOATS]
                if odd:
                    kind = slices[odd[0]].get_dtype()
                    raise LoraFileError(f"{path}: {odd[0]} is of type {kind}; a LoRA's halves are floating point.")
                alpha_keys = [key for key in shapes if key.endswith(".alpha")]
                for key in alpha_keys:
                    if math.prod(shapes[key]) != 1:
                        raise LoraFileError(f"{path}: {key} is no single number but of shape {list(shapes[key])}.")
                alphas = {key.removesuffix(".alpha"): float(file.get_tensor(key)) for key in alpha_keys}
                metadata = file.metadata() or {}
        except READ_ERRORS as error:
            raise found.unreadable(error) from error
        try:
            config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise LoraFileError(f"{path}: its lora_adapter_metadata is no JSON, so alpha is unknown.") from error
        config = config if isinstance(config, dict) else {}
        parts = ("unet", "text_encoder", "text_encoder_2")
        patterns = {part: _alpha_patterns(path, config.get(f"{part}.alpha_pattern") or {}) for part in parts}
        return _Header(path, shapes, alphas, config, patterns, metadata.get("lcmlora_recipe"))

    def alpha(self, part: str, name: str, rank: int) -> float:
        """alpha as PEFT would have it: of the module's own key, else the metadata's, else the rank."""
        if name in self.alphas:
            return self.alphas[name]
        module = spellings.plain(part, name)
        found = (value for pattern, value in self.patterns[part] if pattern.match(module))
        alpha = next(found, self.config.get(f"{part}.lora_alpha"))
        if alpha is None:
            return float(rank)
        rank_stabilised = self.config.get(f"{part}.use_rslora")
        return _number(alpha) * (math.sqrt(rank) if rank_stabilised else 1.0)


def _alpha_patterns(path: str, written: Any) -> tuple[tuple[re.Pattern[str], Any], ...]:
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


def _weight(key: str) -> tuple[str, str, bool] | None:
    """(module, side, whether in PEFT's spelling) of a LoRA's key."""
    if match := _HALF.match(key):
        return match["module"], _SIDES[match["side"]], match["side"] in ("lora_A", "lora_B")
    match = _MAGNITUDE.match(key)
    return (match["module"], "magnitude", not key.endswith("dora_scale")) if match else None


def _sort_keys(header: _Header) -> tuple[dict[tuple[str, str], dict[str, str]], list[str]]:
    """{(part, module): {"down": key, "up": key, "magnitude": key}}, and the modules that are there twice.

    Raises:
        LoraFileError: keys of another kind of adapter, or a module that is there twice and not whole.
    """
    found: dict[tuple[str, str], dict[bool, dict[str, str]]] = {}
    for key in header.shapes:
        if weight := _weight(key):
            name, side, is_peft = weight
            sides = found.setdefault((spellings.part_of(name), name), {}).setdefault(is_peft, {})
            if side in sides:
                raise _twice(header, name, sides[side], key)
            sides[side] = key
    _refuse_other_kinds(header)
    modules, doubled = {}, []
    for (part, name), spelled in found.items():
        peft, other = spelled.get(True, {}), spelled.get(False, {})
        halves = peft.keys() & other.keys()
        if halves and {*peft, *other} - halves - {"magnitude"}:
            raise _twice(header, name, peft[min(halves)], other[min(halves)])
        doubled += [name] if halves else []
        modules[part, name] = {**other, **peft}  # PEFT's, which diffusers keeps
    return modules, doubled


def _twice(header: _Header, name: str, one: str, two: str) -> LoraFileError:
    return LoraFileError(f"{header.path}: module {name} is there twice, as {one!r} and as {two!r}.")


def _refuse_other_kinds(header: _Header) -> None:
    strange = [key for key in header.shapes if not _weight(key) and not key.endswith(".alpha")]
    if strange:
        kinds = " and ".join(k for sign, k in _OTHER_KINDS.items() if any(re.search(sign, key) for key in strange))
        raise LoraFileError(
            f"{header.path} is no plain LoRA{f' but {kinds}' if kinds else ''}: {len(strange)} of its "
            f"{len(header.shapes)} keys are of another kind, such as {strange[0]!r}."
        )


def _pair(header: _Header, part: str, name: str, keys: Mapping[str, str]) -> Pair:
    if not keys.keys() >= {"down", "up"}:
        raise LoraFileError(
            f"{header.path}: module {name} has only {sorted(keys.values())}; a LoRA needs both halves."
        )
    down, up = header.shapes[keys["down"]], header.shapes[keys["up"]]
    if len(down) < 2 or len(up) < 2 or 0 in (*down, *up) or math.prod(up[1:]) != down[0]:
        raise LoraFileError(f"{header.path}: the halves of {name} don't go together: {list(down)} and {list(up)}.")
    if down[0] > MAX_RANK:
        raise LoraFileError(f"{header.path}: rank {down[0]} of {name} makes no sense.")
    alpha = header.alpha(part, name, down[0])
    if not abs(alpha) <= _FLOAT_MAX:  # NaN too
        raise LoraFileError(f"{header.path}: alpha {alpha} of {name} (rank {down[0]}) makes no sense.")
    magnitude = keys.get("magnitude")
    if magnitude and not _one_a_row(magnitude, header.shapes[magnitude], up[0]):
        raise LoraFileError(
            f"{header.path}: {magnitude} is of shape {list(header.shapes[magnitude])}; PEFT's DoRA has one magnitude "
            f"for each of the {up[0]} outputs."
        )
    return Pair(keys["down"], keys["up"], down, up, alpha, magnitude)


_FLOAT_MAX = torch.finfo(torch.float32).max


def _one_a_row(key: str, shape: tuple[int, ...], rows: int) -> bool:
    """Whether there is one magnitude for each output. kohya's may be for each input: (1, in) instead of (out, 1)."""
    return math.prod(shape) == rows and (not key.endswith("dora_scale") or shape[:1] == (rows,))


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
    """Match a file's modules with the layers of a part, by name and by shape.

    Args:
        part: "unet", "text_encoder" or "text_encoder_2".
        modules: of `LoraInfo.modules` or `.text_modules[part]`.
        layers: the part's layers by their own names: its own (`lcmlora.unets.layers`), or those of motion modules too.
    """
    names = spellings.unet_spellings(layers) if part == "unet" else spellings.text_spellings(part, layers)
    pairs: dict[str, Pair] = {}
    clashes: list[str] = []
    foreign, doubled = [], []
    for module in sorted(modules, key=spellings.preference):
        name = names.get(spellings.plain(part, module).replace(".processor", ""))
        if name is None:
            foreign.append(module)
        elif name in pairs or name in clashes:
            doubled.append(module)
        elif modules[module].fits(layers[name]):
            pairs[name] = modules[module]
        else:
            clashes.append(name)
    return Coverage(pairs, tuple(clashes), tuple(foreign), tuple(doubled))


def load(file: LoraFile, pair: Pair, opened: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of a pair as float32 matrices: up (out, rank) and down (rank, in).

    Args:
        file: the file.
        pair: the module in it.
        opened: what `file.opened()` gives.

    Raises:
        LoraFileError: they can't be read, or hold NaN or infinity.
    """
    up, down = _finite(file, opened, pair.up, pair.down)
    return up.flatten(1), down.flatten(1)


def load_magnitude(file: LoraFile, pair: Pair, opened: Any) -> torch.Tensor | None:
    """DoRA's magnitudes as a float32 vector; None where there are none. Arguments and errors as for `load`."""
    if pair.magnitude is None:
        return None
    return next(_finite(file, opened, pair.magnitude)).flatten()


def _finite(file: LoraFile, opened: Any, *keys: str) -> Iterator[torch.Tensor]:
    for key in keys:
        try:
            tensor = opened.get_tensor(key).float()
        except READ_ERRORS as error:
            raise file.unreadable(error) from error
        if not all(torch.isfinite(extreme) for extreme in tensor.aminmax()):  # NaN is both
            raise LoraFileError(f"{file.label}: {key} holds NaN or infinity; the file is damaged.")
        yield tensor


def inspect_lora(
    source: Given,
    weight_name: str | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> LoraInfo:
    """What a LoRA file holds, without loading its weights.

    Args:
        source: a file, a folder, a repository id, or a dict of tensors.
        weight_name: the file's name in a folder or repository, where it is not `pytorch_lora_weights.safetensors`.
        subfolder: the folder inside that folder or repository.
        revision: the repository's branch, tag or commit.
        cache_dir: the hub's cache, as in `huggingface_hub.hf_hub_download`.
        token: the hub's token, as there.
        local_files_only: ask no network, as there.

    Raises:
        LoraFileError: it is not there, or can't be read as a LoRA.
    """
    hub = HubOptions(cache_dir, token, local_files_only)
    return read(Source.of(source, weight_name, subfolder, revision).find(hub))
