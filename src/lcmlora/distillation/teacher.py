"""The frozen pipeline that is learned from: finding it, judging it, borrowing it, asking it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import nn

from .. import compat
from ..errors import PipelineError, brief
from ..layers import ModuleIndex, unet_of
from ..loading import load as load_pipeline
from ..lora.merge import FileLora, merge
from ..lora.originals import Originals
from ..lora.sources import Given, HubOptions
from ..state import is_accelerated
from ..transition.plan import style_loras
from ..transition.snapshot import Snapshot, baked_into
from ..transition.target import Style, check_weight
from .config import DistillConfig
from .solver import Solver

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Text(NamedTuple):
    """What the text encoders make of prompts: embeddings (batch, tokens, width), and SDXL's pooled (batch, width)."""

    embeds: torch.Tensor
    pooled: torch.Tensor | None


class Conditions(NamedTuple):
    """What the UNet is told beside z and t.

    Attributes:
        text: of the prompts.
        empty: of no prompt, for the unconditional pass; one row.
        time_ids: SDXL's sizes (batch, 6): original height and width, crop top and left, target height and width.
    """

    text: Text
    empty: Text
    time_ids: torch.Tensor | None

    def alone(self) -> dict[str, Any]:
        """The UNet's arguments for the conditional pass."""
        return _arguments(self.text, self.time_ids)

    def both(self) -> dict[str, Any]:
        """The same for the conditional and the unconditional pass as one batch of twice the size."""
        pooled = None
        if self.text.pooled is not None and self.empty.pooled is not None:
            pooled = torch.cat([self.text.pooled, self.empty.pooled.expand_as(self.text.pooled)])
        text = Text(torch.cat([self.text.embeds, self.empty.embeds.expand_as(self.text.embeds)]), pooled)
        return _arguments(text, None if self.time_ids is None else self.time_ids.repeat(2, 1))


def _arguments(text: Text, time_ids: torch.Tensor | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"encoder_hidden_states": text.embeds}
    if time_ids is not None:
        arguments["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": time_ids}
    return arguments


# -- finding and judging it -------------------------------------------------------------------------------------------


def load(source: Any, dtype: str = "auto") -> Any:
    """The teacher's pipeline.

    Args:
        source: a pipeline, its folder or repository, a single checkpoint file, or "pocket".
        dtype: "auto", or a key of `DTYPES`.

    Raises:
        PipelineError: it can't be loaded, or is a pipeline of another dtype.
    """
    if not isinstance(source, str | os.PathLike):
        own = getattr(unet_of(source), "dtype", None)
        if own is not None and dtype != "auto" and own != DTYPES[dtype]:
            raise PipelineError(
                f"dtype={dtype!r}, but the pipeline that was given is {own}: type pipe.to(dtype=torch.{dtype}) first, "
                "or leave dtype out."
            )
        return source
    wanted = DTYPES.get(dtype, torch.float32)
    pipe = load_pipeline(str(source), dtype=wanted, device="cpu")
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and getattr(part, "dtype", wanted) != wanted:
            part.to(wanted)  # transformers may keep the file's own
    return pipe


def judge(pipe: Any, settings: DistillConfig) -> None:
    """Refuse a teacher that can't be distilled, before anything is touched.

    Raises:
        PipelineError: it lacks a part, has adapters, weights elsewhere, a scheduler without noise schedule, or the
            like.
    """
    if missing := [p for p in ("unet", "vae", "scheduler", "encode_prompt") if getattr(pipe, p, None) is None]:
        raise PipelineError(
            f"{brief(pipe)} can't be a teacher, as it has no {missing[0]}: a Stable Diffusion or SDXL pipeline is "
            "expected."
        )
    _judge_weights(pipe)
    unet: Any = pipe.unet
    config: Any = unet.config
    name, channels = type(pipe).__name__, pipe.vae.config.latent_channels
    if config.in_channels != channels or config.get("addition_embed_type") not in (None, "text_time"):
        raise PipelineError(
            f"{name} can't be a teacher: its UNet takes {config.in_channels} channels where latents have {channels}, "
            f"and {config.get('addition_embed_type')!r} embeddings; a text-to-image pipeline is expected."
        )
    mixed = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(settings.mixed_precision)
    if mixed is not None and unet.dtype not in (mixed, torch.float32):
        raise PipelineError(
            f"mixed_precision={settings.mixed_precision!r}, but the teacher is {unet.dtype}: leave it out, as half "
            "precision needs no other."
        )
    if pipe.config.get("requires_aesthetics_score"):
        raise PipelineError(f"{name} can't be a teacher: a refiner has no text-to-image path of its own.")
    schedule = pipe.scheduler
    if getattr(schedule, "alphas_cumprod", None) is None:
        raise PipelineError(
            f"the teacher's {type(schedule).__name__} has no alphas_cumprod; a diffusion scheduler such as "
            "DDIMScheduler is expected."
        )


def _judge_weights(pipe: Any) -> None:
    """Refuse weights that can't be learned from as they are."""
    unet: Any = pipe.unet
    if baked_into(pipe) is not None:
        raise PipelineError("the teacher was baked: an LCM-LoRA is in its weights. Give the model it was baked from.")
    if is_accelerated(pipe):
        raise PipelineError("the teacher is accelerated: call lcmlora.restore(pipe) first.")
    if compat.uncompiled(unet) is not unet:
        raise PipelineError(
            "the teacher's UNet is wrapped by torch.compile: type pipe.unet = pipe.unet._orig_mod first; compile=True "
            "compiles its blocks for the run."
        )
    if ModuleIndex.of(unet).wrappers:
        raise PipelineError(
            "the teacher has LoRAs loaded: unload_lora_weights() first, and give them as styles= to distil the mix."
        )
    if compat.is_offloaded(pipe) or any(p.is_meta for p in unet.parameters()):
        raise PipelineError(
            "the teacher's weights are off-loaded: call pipe.remove_all_hooks() first, or load it without off-loading."
        )
    if any(p.is_inference() for part in _modules(pipe) for p in part.parameters()):
        raise PipelineError("the teacher was made under torch.inference_mode: load it outside of that.")


def _modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


# -- borrowing it -----------------------------------------------------------------------------------------------------


@contextmanager
def borrowed(pipe: Any) -> Iterator[None]:
    """Freeze every component; give it back on the device and with the modes, gradients and marks that it had."""
    parts = _modules(pipe)
    modes = [(module, module.training) for part in parts for module in part.modules()]
    grads = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    devices = [(part, next(part.parameters()).device) for part in parts if any(True for _ in part.parameters())]
    unet: Any = unet_of(pipe)
    marks = [(module, set(module.__dict__)) for module in unet.modules()]
    try:
        for part in parts:
            part.eval()
            part.requires_grad_(False)
        with compat.plain(unet):
            yield
    finally:
        for module, names in marks:
            for name in set(module.__dict__) - names:
                delattr(module, name)
        for module, mode in modes:
            module.training = mode
        for parameter, grad in grads:
            parameter.requires_grad_(grad)
        for part, device in devices:
            if next(part.parameters()).device != device:
                part.to(device)


@contextmanager
def styled(pipe: Any, styles: Mapping[str, Any]) -> Iterator[list[tuple[Given, float]]]:
    """The teacher with style LoRAs merged into its UNet; the exact weights are back afterwards.

    Args:
        pipe: the teacher.
        styles: name -> a LoRA's source or `Style`.

    Yields:
        Each style's source and weight: what has to go into the distilled file beside the student.

    Raises:
        PipelineError, CallError, LoraFileError, LoraMismatchError: a style can't be had, does not fit, or is no plain
            LoRA of the UNet alone.
    """
    if not isinstance(styles, Mapping):
        raise PipelineError(f"styles={brief(styles)}: a dict of names and sources is expected.")
    found: dict[str, FileLora] = {}
    weights: dict[str, float] = {}
    sources: list[tuple[Given, float]] = []
    snapshot = Snapshot.of(pipe) if styles else None
    for name, given in styles.items():
        style = Style.of(given)
        check_weight(f"style {name!r}", style.weight)
        assert snapshot is not None
        loras = style_loras(snapshot, name, style.origin.find(HubOptions()))
        if loras.keys() != {"unet"}:
            raise PipelineError(
                f"style {name!r} covers {' and '.join(sorted(loras))}: only one of the UNet alone can be distilled "
                "into a few-step file, which has no text-encoder layers."
            )
        if why := loras["unet"].why_not_mergeable:
            raise PipelineError(f"style {name!r} can't be distilled: {why}.")
        found[name], weights[name] = loras["unet"], float(style.weight)
        sources.append((loras["unet"].file.path or style.source, float(style.weight)))
    originals = Originals("memory")
    try:
        if snapshot is not None:
            layers = ModuleIndex.of(pipe.unet).layers
            touched = {name: layers[name] for lora in found.values() for name in lora.layers}
            merge(touched, found, weights, originals)
        yield sources
    finally:
        originals.put_all_back()


# -- asking it --------------------------------------------------------------------------------------------------------


class Teacher:
    """A borrowed pipeline, as distillation asks it.

    Args:
        pipe: the pipeline.
        config: the run's settings.
        device: where it computes.

    Attributes:
        unet: its UNet.
        solver: its noise schedule.
        side: of a training picture in pixels, where pictures don't say.
    """

    def __init__(self, pipe: Any, config: DistillConfig, device: torch.device) -> None:
        self.pipe, self.device, self.w = pipe, device, config.w
        unet: Any = unet_of(pipe)
        self.unet, self.solver = unet, solver_of(pipe, config)
        self.factor: int = pipe.vae_scale_factor
        self.side: int = config.resolution or unet.config.sample_size * self.factor
        self.has_sizes = unet.config.get("addition_embed_type") == "text_time"

    def latents_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture of `side`."""
        return (self.unet.config.in_channels, self.side // self.factor, self.side // self.factor)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> tuple[Text, Text]:
        """The embeddings of prompts, and those of no prompt in one row: zeros or an empty text's, as the pipeline does
        it.
        """
        encoded = self.pipe.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        if len(encoded) == 4:  # SDXL
            return Text(encoded[0], encoded[2]), Text(encoded[1][:1], encoded[3][:1])
        return Text(encoded[0], None), Text(encoded[1][:1], None)

    @torch.no_grad()
    def inputs(self, prompt: str) -> dict[str, Any]:
        """The UNet's arguments for a pass by which files are compared with what was trained.

        Raises:
            PipelineError: the pipeline gives no prediction for them: it lacks a part, or wants more than a prompt.
        """
        z = torch.randn(1, *self.latents_shape(), generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        sample, t = z.to(self.device, self.unet.dtype), torch.tensor([999], device=self.device)
        try:
            arguments = self.conditions(*self.encode_text([prompt])).alone()
            self.predict(sample, t, arguments)
        except Exception as error:  # whatever a text encoder, a tokenizer or a UNet of another kind raises
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise PipelineError(
                f"this {type(self.pipe).__name__} can't be a teacher, as its UNet gives no prediction for a prompt "
                f"alone: {reason}"
            ) from error
        return {"sample": sample, "timestep": t, **arguments}

    def rest_encoders(self) -> None:
        """Make room on an accelerator: all texts are encoded."""
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(self.pipe, name, None)
            if encoder is not None and self.device.type != "cpu":
                encoder.to("cpu")

    @torch.no_grad()
    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents (batch, channels, height / factor, width / factor) of pictures in [-1, 1], scaled, float32."""
        with self._vae() as vae:
            encoded = retrieve_latents(vae.encode(pixels.to(self.device, vae.dtype)), sample_mode="argmax")
            return encoded.float() * vae.config.scaling_factor  # type: ignore[no-any-return]

    @torch.no_grad()
    def decode(self, z_0: torch.Tensor) -> list[Any]:
        """PIL pictures of latents."""
        with self._vae() as vae:
            pixels = vae.decode(z_0.to(self.device, vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        pictures: list[Any] = self.pipe.image_processor.postprocess(pixels.float(), output_type="pil")
        return pictures

    @contextmanager
    def _vae(self) -> Iterator[Any]:
        """The VAE, in float32 where half precision would overflow (as diffusers does it for SDXL)."""
        vae = self.pipe.vae
        with ExitStack() as stack:
            if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
                vae.to(torch.float32)
                stack.callback(vae.to, torch.float16)
            yield vae

    def conditions(self, text: Text, empty: Text, sizes: Sequence[Sequence[int]] | None = None) -> Conditions:
        """What the UNet is told, on its device and in its dtype.

        Args:
            text: of the prompts.
            empty: of no prompt.
            sizes: SDXL's six numbers for each picture; None for whole pictures of `side`.
        """
        to: Any = {"device": self.device, "dtype": self.unet.dtype}
        text, empty = (Text(e.to(**to), None if p is None else p.to(**to)) for e, p in (text, empty))
        if not self.has_sizes:
            return Conditions(text, empty, None)
        sizes = sizes or [(self.side, self.side, 0, 0, self.side, self.side)] * len(text.embeds)
        return Conditions(text, empty, torch.tensor(sizes, **to))

    def predict(self, z: torch.Tensor, t: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        """The UNet's output in float32; z is float32 and enters in the UNet's dtype.

        Args:
            z: latents.
            t: (batch,) timesteps.
            arguments: of `Conditions`.
        """
        predicted = self.unet(z.to(self.unet.dtype), t.to(z.device), **arguments, return_dict=False)[0]
        return predicted.float()  # type: ignore[no-any-return]

    @torch.no_grad()
    def guided(self, z: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The teacher's prediction, eps = (1 + w) eps_cond - w eps_uncond (LCM paper, equation 14), as one batch."""
        if not self.w:
            return self.predict(z, t, conditions.alone())
        conditional, unconditional = self.predict(z.repeat(2, 1, 1, 1), t.repeat(2), conditions.both()).chunk(2)
        return conditional + self.w * (conditional - unconditional)


def solver_of(pipe: Any, config: DistillConfig) -> Solver:
    """The teacher's noise schedule.

    Raises:
        PipelineError: its prediction type is unknown, or `solver_steps` does not fit.
    """
    schedule = pipe.scheduler
    return Solver(
        schedule.alphas_cumprod.clone(), schedule.config.get("prediction_type", "epsilon"), config.solver_steps
    )
