"""Writing the distilled LoRA, and reading the file back the way its users will."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

from .. import __version__, recipe
from ..acceleration import accelerated
from ..errors import DataError, LcmLoraError, LcmLoraWarning, LoraMismatchError
from ..layers import ModuleIndex, layer_shape
from ..lora.adapters import Adapters
from ..lora.files import WEIGHT_NAME, cover, read
from ..lora.merge import FileLora
from ..lora.sources import Given, Source
from ..quiet import TEXT_ENCODERS, hushed
from ..writing import whole
from .student import Student

ADAPTER, REHEARSAL = "lcmlora_student", ".rehearsal-"
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
State = Mapping[str, torch.Tensor]
"""A LoRA as PEFT spells it: "mid_block...to_q.lora_A.weight" (rank, in, ...), "...lora_B.weight" (out, rank, ...)."""


def kohya_copy(file: Path) -> Path:
    """Where the copy in kohya's layout is, of a file in diffusers'."""
    return file.with_name(f"{file.stem}_kohya.safetensors")


def save(
    state: State,
    folder: Path,
    *,
    alpha: float,
    recipe: str = "lcm",
    settings: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
    kohya: bool = False,
) -> Path:
    """Write a LoRA in diffusers' layout. The file appears only when all of it is written.

    Its alpha stands in the metadata: without that every loader takes alpha for the rank. Only what every PEFT knows
    is written there, since diffusers hands it to `LoraConfig` as it is.

    Args:
        state: of `Student.state`, or of `merge_factors`.
        folder: where to.
        alpha: of every layer. One for all, whatever the ranks: where alphas differ, plain diffusers loses those of
            attention layers in kohya's layout (peft_utils.py, get_peft_kwargs).
        recipe: how the file is to be driven, which `accelerate` follows: "lcm" or "tcd".
        settings: how it was made.
        dtype: of the weights.
        kohya: also write a copy in kohya's layout beside it (see `kohya_copy`), as ComfyUI and A1111 read it.

    Returns:
        The file.

    Raises:
        LcmLoraError: it can't be written there, or a weight is too large for `dtype`.
    """
    halves = {key: value.detach().to("cpu", dtype).contiguous() for key, value in state.items()}
    for key, value in halves.items():
        if not torch.isfinite(value).all():
            raise LcmLoraError(f"{key} can't be saved as {dtype}: it has values that are too large, or not finite.")
    ranks = {key.removesuffix(_DOWN): len(value) for key, value in halves.items() if key.endswith(_DOWN)}
    (rank, _), *_ = Counter(ranks.values()).most_common(1)
    made = {"lcmlora_recipe": recipe, "lcmlora": json.dumps({"version": __version__, **(settings or {})}, default=str)}
    others = {f"^{layer}": r for layer, r in ranks.items() if r != rank}
    adapter: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(ranks)}
    adapter |= {"rank_pattern": others} if others else {}
    packed = json.dumps({f"unet.{key}": value for key, value in adapter.items()})
    file = folder / WEIGHT_NAME
    write({f"unet.{key}": value for key, value in halves.items()}, file, {"lora_adapter_metadata": packed, **made})
    if kohya:
        _save_kohya(halves, alpha, max(ranks.values()), kohya_copy(file), made)
    else:
        kohya_copy(file).unlink(missing_ok=True)  # of an earlier run: it would be another LoRA
    return file


def _save_kohya(halves: State, alpha: float, rank: int, file: Path, made: Mapping[str, str]) -> None:
    """With diffusers' block names, as the official LCM-LoRAs have for every base: diffusers, ComfyUI and A1111 read
    them.
    """
    ends = {_DOWN: ".lora_down.weight", _UP: ".lora_up.weight"}
    tensors = {}
    for key, value in halves.items():
        front = "lora_unet_" + key.partition(".lora_")[0].replace(".", "_")
        tensors[front + ends[key[-len(_DOWN) :]]] = value
        tensors[f"{front}.alpha"] = torch.tensor(float(alpha))
    network = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
    }
    write(tensors, file, {**network, **made})


def write(tensors: State, file: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under another name, and rename it when it is whole.

    Raises:
        LcmLoraError: it can't be written there.
    """
    with whole(file) as partial:
        save_file(dict(tensors), partial, metadata={"format": "pt", **metadata})


# -- styles -----------------------------------------------------------------------------------------------------------


def merge_factors(state: State, alpha: float, unet: Any, style: Given, weight: float = 1.0) -> dict[str, torch.Tensor]:
    """One LoRA that adds what a distilled one and a style add together, exactly: B = [B1 B2] and A = [A1; A2].

    Its rank is in each layer the sum of the two. What each part counts with is folded into B, so that the alpha is the
    distilled LoRA's everywhere.

    Args:
        state: the distilled LoRA's.
        alpha: its alpha.
        unet: the UNet that both are for, with or without adapters.
        style: the style's file, in any spelling; or folder, repository or tensors.
        weight: what it counts with.

    Returns:
        A state for the same alpha.

    Raises:
        LoraFileError: as for `accelerate`. LoraMismatchError: the style is made for another UNet, or covers more than
        a UNet. DataError: it is a DoRA.
    """
    layers = ModuleIndex.of(unet).own
    added = _style(style, layers)
    merged: dict[str, torch.Tensor] = {}
    with added.opened() as read_factors:
        names = {key.removesuffix(_DOWN) for key in state if key.endswith(_DOWN)}
        for name in sorted(names | added.layers):
            parts: list[tuple[float, torch.Tensor, torch.Tensor]] = []
            if name in names:
                down, up = (state[name + half].detach().cpu().float().flatten(1) for half in (_DOWN, _UP))
                parts.append((alpha / len(down), up, down))
            if name in added.layers:
                factors = read_factors(name)
                parts.append((factors.scale * weight, factors.up, factors.down))
            out, *rest = layer_shape(layers[name])
            rank = sum(len(down) for _, _, down in parts)
            ups = [up * (scale * rank / alpha) for scale, up, _ in parts]
            merged[name + _UP] = torch.cat(ups, dim=1).view(out, rank, *(1,) * (len(rest) - 1))
            merged[name + _DOWN] = torch.cat([down for _, _, down in parts]).view(rank, *rest)
    return merged


def _style(given: Given, layers: Mapping[str, Any]) -> FileLora:
    info = read(Source.of(given).find())
    found = cover("unet", info.modules, layers)
    if info.text_modules or found.foreign or found.clashes:
        other = "a text encoder" if info.text_modules else "another UNet"
        raise LoraMismatchError(f"{info.describe()} can't be distilled in: a part of it is for {other}.")
    assert info.file is not None
    style = FileLora(info.file, found.pairs)
    if why := style.why_not_mergeable:
        raise DataError(f"{why}; it can't be distilled in.")
    return style


# -- reading it back --------------------------------------------------------------------------------------------------


@torch.no_grad()
def check(pipe: Any, file: Path, inputs: Mapping[str, Any], expected: torch.Tensor) -> None:
    """Load the file, and its kohya copy if there is one, with plain diffusers and with `accelerate`, and compare one
    UNet pass with that of the weights in training. The pipe is left as it was.

    Args:
        pipe: the teacher, without the student's adapter.
        file: of `save`.
        inputs: the UNet's arguments.
        expected: what it gave for them, without autocast, with the weights in training.

    Raises:
        LcmLoraError: a way fails, or its output differs by more than the dtypes explain.
    """
    bare = pipe.unet(**inputs, return_dict=False)[0]
    for path in (file, kohya_copy(file)):
        for words, loading in (("plain diffusers", _plainly), ("lcmlora.accelerate", _accelerated)):
            if path.is_file():
                try:
                    with loading(pipe, path):
                        loaded = pipe.unet(**inputs, return_dict=False)[0]
                except Exception as error:  # diffusers and PEFT raise many kinds
                    raise LcmLoraError(f"{path} does not load with {words}: {error}") from error
                _compare(f"{path} does not load back with {words}", bare, loaded, expected)


def _compare(words: str, bare: torch.Tensor, loaded: torch.Tensor, expected: torch.Tensor) -> None:
    """Rounding of the weights is a share of what they change; rounding on the way through the UNet, of its output."""
    change, error, size = (x.float().norm().item() for x in (expected - bare, loaded - expected, expected))
    allowed = 0.02 * change + ROUNDING.get(expected.dtype, 1e-4) * size
    if not error <= allowed:
        raise LcmLoraError(
            f"{words}: its UNet pass is off by {error:.3g}, where {expected.dtype} explains {allowed:.3g} and the "
            f"LoRA changes {change:.3g}."
        )


ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative error of a UNet's output by its dtype: four times the dtype's own. In float32 only the weights count, which
are rounded to the file's."""


@contextmanager
def _plainly(pipe: Any, file: Path) -> Iterator[None]:
    """The file loaded as its users without lcmlora do it."""
    adapters, scheduler = Adapters(ModuleIndex.of(pipe.unet)), pipe.scheduler
    found = recipe.by_name(read(Source.of(file).find()).recipe or recipe.LCM.name)
    try:
        with hushed(TEXT_ENCODERS):
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=ADAPTER)
        pipe.scheduler = getattr(diffusers, found.scheduler).from_config(scheduler.config)
        yield
    finally:
        adapters.restore()
        pipe.scheduler = scheduler


@contextmanager
def _accelerated(pipe: Any, file: Path) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LcmLoraWarning)  # a v-prediction teacher: other files are not made for it
        with accelerated(pipe, lora=file, fuse=False):
            yield


@torch.no_grad()
def rehearse(student: Student, folder: Path, inputs: Mapping[str, Any], **saving: Any) -> None:
    """Save a LoRA of random weights and load it back, before anybody trains towards a failure. Nothing is left of it,
    in the pipe or in the folder.

    Args:
        student: one like that which will be trained; it gets the random weights.
        folder: where the result will be written.
        inputs: the UNet's arguments.
        saving: as for `save`.

    Raises:
        LcmLoraError: as `save` and `check`.
    """
    device = student.teacher.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # loaders draw weights before they set them
        for down, up in zip(student.down, student.up, strict=True):  # together about a quarter of what a layer gives
            down.normal_(std=down[0].numel() ** -0.5)
            up.normal_(std=student.rank**0.5 / (4 * student.alpha))
        with student.attached():
            expected = student.pass_of(inputs)
        try:
            with tempfile.TemporaryDirectory(prefix=REHEARSAL, dir=folder) as place:
                file = save(student.state(), Path(place), alpha=student.alpha, **saving)
                check(student.teacher.pipe, file, inputs, expected)
        except OSError as error:
            raise LcmLoraError(f"nothing can be written to {folder}: {error}") from error
