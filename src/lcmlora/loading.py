"""A pipeline from whatever names it: a folder, a repository, one file, or the embedded model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import safe_open

from . import pocket
from .baking import load_baked
from .compat import bars_hidden, set_name_or_path
from .errors import PipelineError
from .kinds import as_kind
from .lora.sources import REPOSITORY
from .transition.snapshot import read_baked

_CHECKPOINTS = (".safetensors", ".ckpt")
_EXPECTED = (
    "a pipeline's folder, a repository id like 'owner/name', a .safetensors or .ckpt checkpoint, 'pocket' or "
    "'pocket:chalk' is expected."
)
_CLASSES = {
    "v1": StableDiffusionPipeline,
    "v2": StableDiffusionPipeline,
    "inpainting": StableDiffusionInpaintPipeline,
    "inpainting_v2": StableDiffusionInpaintPipeline,
    "xl_base": StableDiffusionXLPipeline,
    "playground-v2-5": StableDiffusionXLPipeline,
    "xl_inpaint": StableDiffusionXLInpaintPipeline,
}


def default_device() -> str:
    """An accelerator where there is one, else the processor. Of several processes each has its own."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return "cpu"
    place = os.environ.get("LOCAL_RANK")  # which torchrun and `accelerate launch` set
    return found.type if place is None else f"{found.type}:{int(place) % torch.accelerator.device_count()}"


def load(
    model: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    kind: str | None = None,
    config: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Load a pipeline, whatever names it.

    >>> import lcmlora
    >>> lcmlora.load("pocket").__class__.__name__
    'StableDiffusionPipeline'

    Args:
        model: a folder (baked ones too), a repository id, a `.safetensors` or `.ckpt` checkpoint, "pocket" or
            "pocket:chalk".
        dtype: of the weights; None is float16 on an accelerator, float32 on a processor.
        device: where to; None is an accelerator where there is one, and each process' own under `torchrun`.
        kind: "text2img", "img2img" or "inpaint"; None leaves what the model says it is.
        config: for a checkpoint: the folder or repository of a pipeline of its kind, whose configs describe it.
        options: as for diffusers' `from_pretrained`, such as `local_files_only` or `variant`.

    Returns:
        A pipeline of diffusers, on the device.

    Raises:
        PipelineError: it is not there, can't be loaded, or there is no pipeline of that kind for it.
    """
    if not isinstance(model, str | os.PathLike):
        raise PipelineError(f"model is a {type(model).__name__}: {_EXPECTED}")
    model = os.fspath(model)
    try:
        device = torch.device(device or default_device())
    except RuntimeError as error:
        raise PipelineError(f"device={device!r}: 'cuda', 'cuda:1', 'mps' or 'cpu' is expected.") from error
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    with _told(model), bars_hidden():
        pipe = _loaded(model, dtype, config, options)
    if kind is not None:
        pipe = as_kind(pipe, kind)
    try:
        return pipe if device.type == "cpu" else pipe.to(device)
    except (RuntimeError, AssertionError) as error:  # out of memory, no such device, torch without it
        raise PipelineError(f"{model} can't be put on {device}: {str(error).splitlines()[0]}") from error


def _loaded(model: str, dtype: torch.dtype, config: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> Any:
    name, _, variant = model.partition(":")
    if name == "pocket" and not os.path.exists(model):
        if variant not in ("", "base", "chalk"):
            raise PipelineError(f"model {model!r}: 'pocket' or 'pocket:chalk' is expected.")
        own = None if dtype is torch.float32 else dtype  # it is so already
        return pocket.load_pocket("chalk" if variant == "chalk" else "base", dtype=own)
    path = Path(model).expanduser()
    if path.is_dir() and read_baked(path) is not None:
        return load_baked(path, dtype=dtype, **options)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise PipelineError(f"{path} is no pipeline's folder: there is no model_index.json in it.")
    if path.is_file() or path.suffix.lower() in _CHECKPOINTS:
        return _from_checkpoint(path, dtype, config, options)
    if not path.is_dir() and not REPOSITORY.fullmatch(model):
        raise PipelineError(f"there is no model {model!r}: {_EXPECTED}")
    return _from_pretrained(str(path) if path.is_dir() else model, dtype, options)


def _from_pretrained(model: str, dtype: torch.dtype, options: Mapping[str, Any]) -> Any:
    try:
        return DiffusionPipeline.from_pretrained(model, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        if options.get("variant"):
            raise
        try:  # there may be half-precision files alone, which bear a variant's name
            return DiffusionPipeline.from_pretrained(model, dtype=dtype, **{**options, "variant": "fp16"})
        except (OSError, ValueError):
            raise error from None


def _from_checkpoint(
    path: Path, dtype: torch.dtype, config: str | os.PathLike[str] | None, options: Mapping[str, Any]
) -> Any:
    if not path.is_file():
        raise PipelineError(f"there is no file {path}.")
    if path.suffix.lower() not in _CHECKPOINTS:
        raise PipelineError(f"{path} is no checkpoint: a .safetensors or .ckpt file is expected.")
    shapes = _shapes(path)
    if not any("diffusion_model." in key for key in shapes):
        raise PipelineError(f"{path} is no checkpoint of a whole model; is it a LoRA, or a part of one?")
    kind = infer_diffusers_model_type(shapes)
    if kind not in _CLASSES:
        raise PipelineError(f"{path} is a checkpoint of kind {kind!r}: Stable Diffusion or SDXL is expected.")
    options = {**options, **({"config": os.fspath(config)} if config else {})}
    pipe = _CLASSES[kind].from_single_file(str(path), dtype=dtype, **options)
    set_name_or_path(pipe, os.path.abspath(path))
    return pipe


def _shapes(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors by name, those of a safetensors file without their values."""
    if path.suffix.lower() != ".safetensors":
        found: Mapping[str, torch.Tensor] = load_single_file_checkpoint(str(path))
        return found
    with safe_open(path, "pt") as file:
        return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118


def as_class(pipe: Any, name: str) -> Any:
    """A pipeline of diffusers' class of that name, of the same parts.

    Raises:
        PipelineError: there is none, or it needs other parts.
    """
    if type(pipe).__name__ == name:
        return pipe
    try:
        made = getattr(diffusers, name)
        given = {**pipe.config, **pipe.components}  # its own from_pipe would cast the parts, which are shared
        return made(**{part: given[part] for part in inspect.signature(made).parameters if part in given})
    except (ValueError, AttributeError, TypeError) as error:
        raise PipelineError(f"no {name} can be made of a {type(pipe).__name__}: {error}") from error


@contextmanager
def downloads_hidden() -> Iterator[None]:
    """No bars of the hub's client. For a program; a library leaves them to its user."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _told(model: str) -> Iterator[None]:
    """One sentence for whatever the loaders raise."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # diffusers, transformers, safetensors and the hub's client raise many kinds
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise PipelineError(f"model {model!r} can't be loaded. The loader says: {reason}") from error
