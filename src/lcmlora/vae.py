"""Another VAE for an accelerated pipe: at four steps, decoding takes as long as the UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .base import Base
from .compat import execution_device
from .errors import BaseModelError, PipelineError, brief, near_match
from .lora.sources import HubOptions

_NAMED = ("tiny", "fp16-fix")
Vae = str | Path | nn.Module | None
"""A VAE: "tiny", "fp16-fix", a repository or folder, a module; None is the pipe's own."""


def load(pipe: Any, own: Any, base: Base | None, vae: Vae, hub: HubOptions) -> nn.Module | None:
    """The VAE asked for, ready to stand in the pipe's place of it; None where none was asked for.

    Args:
        pipe: the pipeline; nothing in it is changed.
        own: its own VAE.
        base: its base, which names the repositories of "tiny" and "fp16-fix".
        vae: see `accelerate`.
        hub: how the hub is asked.

    Raises:
        BaseModelError: the base has no VAE of that name.
        PipelineError: the VAE is not to be had, or makes other latents than the pipe's.
    """
    if vae is None:
        return None
    if not isinstance(own, nn.Module):
        raise PipelineError(
            f"vae={brief(vae)}: this {type(pipe).__name__} has no VAE that another could stand in for."
        )
    if isinstance(vae, nn.Module):
        made = vae
    elif not isinstance(vae, str | Path):
        raise PipelineError(f"vae={brief(vae)}: 'tiny', 'fp16-fix', a repository, a folder or a module is expected.")
    else:
        made = _from_pretrained(_source(base, vae), hub)
        # not where an off-loaded VAE waits, but where it is used: no hook will move this one
        nn.Module.to(made, execution_device(pipe), next(own.parameters()).dtype)  # diffusers' own logs at any dtype
        made.requires_grad_(False).eval()
    if not hasattr(made, "decode") or not hasattr(made, "config"):
        raise PipelineError(f"vae={brief(vae)} is no VAE: 'tiny', 'fp16-fix', a repository, a folder or a module is.")
    theirs, ours = _latents(own), _latents(made)
    if theirs != ours:
        raise PipelineError(
            f"vae={brief(vae)} makes latents of {ours[0]} channels, {ours[1]} times smaller than the picture; this "
            f"pipe's have {theirs[0]} and are {theirs[1]} times smaller. 'tiny' finds the one that fits."
        )
    return made


def _source(base: Base | None, vae: str | Path) -> str | Path:
    if vae not in _NAMED:
        if near := near_match(str(vae), _NAMED):
            raise PipelineError(f"vae={str(vae)!r} is not known. Is {near!r} meant?")
        return vae
    source = base and (base.tiny_vae if vae == "tiny" else base.fp16_vae)
    if not source:
        name = f"base {base.name!r}" if base else "a UNet of no known base"
        raise BaseModelError(f"vae={vae!r}: {name} has none; pass a repository id, a folder or a module.")
    return source


def _from_pretrained(source: str | Path, hub: HubOptions) -> nn.Module:
    from diffusers import AutoModel

    options = {"cache_dir": hub.cache_dir, "token": hub.token, "local_files_only": hub.local_files_only}
    try:
        vae = AutoModel.from_pretrained(str(source), use_safetensors=True, **options)
    except Exception as error:  # the hub and diffusers raise many kinds
        raise PipelineError(
            f"VAE {str(source)!r} could not be loaded: {str(error).splitlines()[0]} Once on line, type: "
            f"hf download {source}; or pass vae= with a local folder."
        ) from error
    assert isinstance(vae, nn.Module)
    return vae


def _latents(vae: nn.Module) -> tuple[int | None, int]:
    """(latent channels, how many times smaller latents are)."""
    config: Any = vae.config
    return config.get("latent_channels"), 2 ** (len(config.get("block_out_channels") or (0,)) - 1)
