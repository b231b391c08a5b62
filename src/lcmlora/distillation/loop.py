"""The training loop: one UNet, teacher with its adapter off and student with it on."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..errors import DataError, LcmLoraError, PipelineError
from ..layers import TARGET_MODULES, ModuleIndex, lcm_layers, unet_of
from ..lora.adapters import Adapters
from ..lora.files import WEIGHT_NAME
from . import export
from .config import DistillConfig
from .data import Example, Pictures, ResumableBatchSampler, collate, read
from .solver import Solver, pseudo_huber

logger = logging.getLogger(__name__)


def distill(
    teacher: Any, data: str | Path, output: str | Path, config: DistillConfig | None = None, *, progress: bool = True
) -> Path:
    """Distil an LCM-LoRA from a pipeline and a folder of captioned pictures.

    The teacher's UNet serves as teacher (adapter off) and student (adapter on). It is given back as it was. At the end
    the file is loaded through `accelerate` and compared with what was trained.

    Args:
        teacher: a Stable Diffusion or SDXL pipeline, or the folder or repository id of one.
        data: folder with `metadata.jsonl`, one `{"file_name": ..., "text": ...}` a line.
        output: folder for `pytorch_lora_weights.safetensors`, `log.jsonl` and checkpoints. A run of the same output
            folder resumes from its newest checkpoint.
        config: settings; the defaults are the LCM-LoRA report's.
        progress: show a progress bar.

    Returns:
        The LoRA's file.

    Raises:
        DataError: the folder or a setting can't be trained on.
        PipelineError: the teacher can't be distilled: no UNet, adapters loaded, an unknown prediction type.
        LcmLoraError: the loss stopped being finite, or the file does not load back.
    """
    config = config or DistillConfig()
    examples = read(data).examples
    pipe = DiffusionPipeline.from_pretrained(teacher) if isinstance(teacher, str | Path) else teacher
    _check_teacher(pipe)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with _borrowed(pipe):
        return _Run(pipe, config, output, progress).run(examples)


def _check_teacher(pipe: Any) -> None:
    unet = unet_of(pipe)
    if unet is None or not all(hasattr(pipe, part) for part in ("vae", "scheduler", "encode_prompt")):
        raise PipelineError(
            f"{type(pipe).__name__} can't be a teacher: a Stable Diffusion or SDXL pipeline is expected."
        )
    if ModuleIndex.of(unet).wrappers:
        raise PipelineError(
            "the teacher has LoRAs loaded: unload_lora_weights() first (or fuse them, then unload, to distil the mix)."
        )


@contextmanager
def _borrowed(pipe: Any) -> Iterator[None]:
    """Give every component back with the modes, gradients and adapters it had."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    modes = [(module, module.training) for part in parts for module in part.modules()]
    attributes = [(part, set(part.__dict__)) for part in parts]  # Accelerate marks what it prepares
    grads = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    unet = unet_of(pipe)
    assert unet is not None
    adapters = Adapters(ModuleIndex.of(unet))
    try:
        for part in parts:
            part.eval()
            part.requires_grad_(False)
        yield
    finally:
        adapters.restore()
        for module, mode in modes:
            module.training = mode
        for parameter, grad in grads:
            parameter.requires_grad_(grad)
        for part, names in attributes:
            for name in set(part.__dict__) - names:
                delattr(part, name)


class _Run:
    """One distillation. The names are the paper's: z latents, t timesteps, c conditions, w guidance, eps noise."""

    def __init__(self, pipe: Any, config: DistillConfig, output: Path, progress: bool) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.utils import set_seed
        except ImportError as error:
            raise LcmLoraError("distill needs Hugging Face Accelerate: pip install 'lcmlora[train]'") from error
        self.pipe, self.config, self.output = pipe, config, output
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.gradient_accumulation
        )
        self.device = self.accelerator.device
        self.progress = progress and self.accelerator.is_local_main_process
        schedule = pipe.scheduler
        self.solver = Solver(
            schedule.alphas_cumprod.clone(), schedule.config.get("prediction_type", "epsilon"), config.solver_steps
        )
        set_seed(config.seed)  # the adapter's first weights, the same in every process
        self.lora = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, target_modules=list(TARGET_MODULES))
        pipe.to(self.device)
        pipe.unet.add_adapter(self.lora, adapter_name=export.ADAPTER)
        self.params = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
        for parameter in self.params:  # a list: an iterator would be used up by the optimizer and nothing left to clip
            parameter.data = parameter.data.float()
        if len(self.params) != 2 * len(lcm_layers(pipe.unet)):
            raise PipelineError(f"PEFT adapted {len(self.params) // 2} layers of {len(lcm_layers(pipe.unet))}.")
        if config.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(self.params, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.unet, self.optimizer = self.accelerator.prepare(pipe.unet, optimizer)
        self.ema = EMAModel(self.params, decay=config.ema) if config.ema else None
        self.step = 0

    def run(self, examples: Sequence[Example]) -> Path:
        config = self.config
        self._resume()
        side = config.resolution or self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        pictures = Pictures(examples, side, config.random_flip, config.seed)
        accumulate = config.gradient_accumulation
        turns = ResumableBatchSampler(
            len(examples), config.batch_size, config.seed, self.step * accumulate, config.steps * accumulate,
            self.accelerator.process_index, self.accelerator.num_processes,
        )  # fmt: skip
        loader = DataLoader(pictures, batch_sampler=turns, collate_fn=collate, num_workers=config.workers)
        began, total, batch = time.monotonic(), 0.0, None
        bar = tqdm(total=config.steps, initial=self.step, desc="distilling", disable=not self.progress)
        for micro, batch in enumerate(loader, start=self.step * accumulate):
            with self.accelerator.accumulate(self.unet):
                total += self._train(batch, micro) / accumulate
            if (micro + 1) % accumulate:
                continue
            self.step += 1
            if self.step % config.log_every == 0 or self.step == config.steps:
                loss = total / (self.step % config.log_every or config.log_every)
                self._log(loss, time.monotonic() - began)
                bar.set_postfix(loss=f"{loss:.4f}")
                total = 0.0
            bar.update()
            if config.checkpoint_every and (self.step % config.checkpoint_every == 0 or self.step == config.steps):
                self._save_checkpoint()
        bar.close()
        return self._finish(batch or collate([pictures[(0, 0)]]))

    def _train(self, batch: dict[str, Any], micro: int) -> float:
        """One forward and backward pass; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * _rate(self.step, self.config)
        generator = torch.Generator().manual_seed(
            (self.config.seed * 1_000_003 + micro) * 65_537 + self.accelerator.process_index
        )
        with self.accelerator.autocast():
            loss = self._loss(batch, generator)
        if not torch.isfinite(loss):
            raise LcmLoraError(
                f"the loss is {loss.item()} at step {self.step}: lower learning_rate, or mixed_precision='no'. "
                f"The checkpoints in {self.output} are from before."
            )
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.params, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema and self.accelerator.sync_gradients:
            self.ema.step(self.params)
        return float(loss.detach())

    def _loss(self, batch: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
        """d(f(z_{t_n+k}, c, t_n+k), f(z^_{t_n}, c, t_n)), z^ by one guided DDIM step (paper, algorithm 1)."""
        with torch.no_grad():
            z_0 = self._encode(batch["pixels"])
            conditions, both = self._conditions(batch)
        index = torch.randint(self.config.solver_steps, (len(z_0),), generator=generator)
        start, end = (t.to(self.device) for t in self.solver.timesteps(index))
        eps = torch.randn(z_0.shape, generator=generator).to(z_0)
        z_start = self.solver.noisy(z_0, eps, start)
        student = self.solver.consistency(self._predict(z_start, start, conditions), z_start, start)
        with torch.no_grad():
            with self._adapter_off():
                predicted = self._predict(z_start.repeat(2, 1, 1, 1), start.repeat(2), both)
            conditional, unconditional = predicted.chunk(2)
            guided = conditional + self.config.w * (conditional - unconditional)
            z_end = self.solver.noisy(*self.solver.split(guided, z_start, start), end)
            target = self.solver.consistency(self._predict(z_end, end, conditions), z_end, end)
        return pseudo_huber(student, target, self.config.huber_c)

    def _predict(self, z: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any]) -> torch.Tensor:
        """The UNet's output in float32; z comes in as float32 and enters in the UNet's dtype."""
        dtype = self.pipe.unet.dtype
        prediction: torch.Tensor = self.unet(z.to(dtype), timesteps, **conditions, return_dict=False)[0]
        return prediction.float()

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        self.pipe.unet.disable_adapters()
        try:
            yield
        finally:
            self.pipe.unet.enable_adapters()

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents of the pictures, scaled, float32, shape (batch, channels, side / factor, side / factor)."""
        vae = self.pipe.vae
        encoded = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        return encoded.float() * vae.config.scaling_factor  # type: ignore[no-any-return]

    def _conditions(self, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The UNet's text arguments for the batch, and for conditional and unconditional as one double batch."""
        count = len(batch["text"])
        encoded = self.pipe.encode_prompt(
            batch["text"], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        text: dict[str, Any] = {"encoder_hidden_states": encoded[0]}
        both: dict[str, Any] = {"encoder_hidden_states": torch.cat([encoded[0], encoded[1].expand_as(encoded[0])])}
        if len(encoded) == 4:  # SDXL: pooled embeddings, and the picture's sizes
            side = [self.config.resolution or self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor] * 2
            sizes = [
                [*original, *corner, *side]
                for original, corner in zip(batch["original_size"], batch["crop_top_left"], strict=True)
            ]
            time_ids = torch.tensor(sizes, device=self.device, dtype=encoded[0].dtype)
            text["added_cond_kwargs"] = {"text_embeds": encoded[2], "time_ids": time_ids}
            pooled = torch.cat([encoded[2], encoded[3].expand_as(encoded[2])])
            both["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids.repeat(2, 1)}
        assert encoded[0].shape[0] == count
        return text, both

    def _log(self, loss: float, seconds: float) -> None:
        if self.accelerator.is_main_process:
            row = {
                "step": self.step,
                "loss": loss,
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": round(seconds, 2),
            }
            with (self.output / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")

    def _save_checkpoint(self) -> None:
        """What a run can't recompute: the LoRA, its average, the optimizer's state. The newest replaces the last."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "params": [parameter.detach().cpu() for parameter in self.params],
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
        }
        partial_file = self.output / "checkpoint.pt.partial"
        torch.save(state, partial_file)
        partial_file.replace(self.output / "checkpoint.pt")

    def _resume(self) -> None:
        file = self.output / "checkpoint.pt"
        if not file.exists():
            return
        state = torch.load(file, map_location="cpu", weights_only=True)
        if [p.shape for p in state["params"]] != [p.shape for p in self.params]:
            raise DataError(f"{file} is of another UNet or rank; give another output folder or delete it.")
        for parameter, value in zip(self.params, state["params"], strict=True):
            parameter.data.copy_(value)
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        logger.info("resumed %s at step %d", file, self.step)

    def _finish(self, batch: dict[str, Any]) -> Path:
        """Write the file, take the adapter out and load the file back through `accelerate`."""
        self.accelerator.wait_for_everyone()
        if self.ema:
            self.ema.copy_to(self.params)
        pipe = self.pipe
        file = self.output / WEIGHT_NAME
        with torch.no_grad():
            text, _ = self._conditions(batch)
            z = torch.randn(self._encode(batch["pixels"]).shape, generator=torch.Generator().manual_seed(0))
            inputs = {"sample": z.to(pipe.device, pipe.unet.dtype), "timestep": torch.tensor(999), **text}
            expected = pipe.unet(**inputs, return_dict=False)[0]
        if self.accelerator.is_main_process:
            state, settings = export.state_of(pipe.unet), dataclasses.asdict(self.config)
            export.save(state, self.output, alpha=self.lora.lora_alpha, settings=settings)
        pipe.unet.delete_adapters(export.ADAPTER)
        pipe.unet.unload_lora()
        if self.accelerator.is_main_process:
            export.check(pipe, file, inputs, expected)
        self.accelerator.wait_for_everyone()
        return file


def _rate(step: int, config: DistillConfig) -> float:
    """The learning rate at a step, as a share of its peak."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
