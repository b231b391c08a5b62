"""The training: stages of steps, and what happens between them."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from .. import compat, compiling
from ..errors import DataError, LcmLoraError, brief
from ..lora.files import WEIGHT_NAME
from ..lora.sources import Given
from ..parameters import spelled
from ..writing import PARTIAL, append, write_text
from . import checkpoint, export, optimizer
from .batches import Batches, Step
from .cache import digest
from .card import write_card
from .closing import closing_page
from .config import DistillConfig
from .data import Dataset, read
from .draws import Draws
from .objectives import OBJECTIVES, Objective
from .process import accelerating, interruptible, undisturbed
from .student import Student
from .teacher import Teacher, borrowed, judge, load, solver_of, styled
from .validation import FOLDER, PROMPTS, Validation, Validator, forget

logger = logging.getLogger(__name__)
LOG, RESULT, BEST = "log.jsonl", "result.json", "best"
Styles = Sequence[tuple[Given, float]]


class Probe(NamedTuple):
    """One pass of the UNet, by which a file is compared with what was trained."""

    file: Path
    inputs: dict[str, Any]
    expected: torch.Tensor


@spelled({name: f"config=DistillConfig({name}=...)" for name in DistillConfig.__dataclass_fields__})
def distill(
    teacher: Any,
    data: Any,
    output: str | Path,
    config: DistillConfig | None = None,
    *,
    styles: Mapping[str, Any] | None = None,
    validation_prompts: Sequence[str] | None = None,
    strict: bool = False,
    progress: bool = True,
) -> Path:
    """Distil a few-step LoRA from a pipeline, with pictures and captions or with prompts alone.

    The teacher's UNet serves as teacher and, with the LoRA, as student. It is given back as it was. Before the first
    step and at the end the file is loaded through `accelerate` and compared with what is trained.

    Args:
        teacher: a Stable Diffusion or SDXL pipeline; its folder, repository id or checkpoint file; or "pocket".
        data: pictures with captions: a folder with `metadata.jsonl` or `metadata.csv` (`file_name`, `text`), with a
            `.txt` beside each picture, or with webdataset shards; a `datasets.Dataset`; an iterable of (picture,
            text) or of mappings. Or prompts alone: a `.txt`, `.jsonl` or `.csv` file, an iterable of texts.
        output: folder for `pytorch_lora_weights.safetensors`, `log.jsonl`, `settings.json`, `result.json`, validation
            sheets, the cache and the checkpoint. A run of the same output folder goes on from its checkpoint.
        config: settings; the defaults are the LCM-LoRA report's. `DistillConfig.preset` has others.
        styles: name -> a style LoRA's source or `Style`: the teacher draws with them, and the file has style and few
            steps together. Its rank is the sum of all.
        validation_prompts: what validation sheets draw. None: the first few of the data's texts.
        strict: refuse data with pictures that can't be used, instead of leaving those out.
        progress: show progress bars.

    Returns:
        The LoRA's file.

    Raises:
        DataError: the data or a setting can't be trained on, or the output folder holds a run with other settings.
        PipelineError: the teacher can't be loaded or distilled.
        LoraFileError: a style can't be had.
        CallError: a style's weight can't be used.
        LoraMismatchError: a style does not fit.
        LcmLoraError: the loss stopped being finite, the disk is full, or the file does not load back.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    config, output = config or DistillConfig(), Path(output)
    if not isinstance(config, DistillConfig):
        raise DataError(f"config={brief(config)}: a DistillConfig is expected.")
    if isinstance(validation_prompts, str):
        raise DataError(f"validation_prompts={validation_prompts!r}: a list of prompts is expected.")
    if output.exists() and not output.is_dir():
        raise DataError(f"output {str(output)!r} is a file; a folder is expected.")
    with undisturbed():
        pipe = load(teacher, config.dtype)
        judge(pipe, config)
        solver_of(pipe, config)
        prompts = [one.text for one in read(validation_prompts).examples] if validation_prompts else None
        dataset = read(data, strict=strict, progress=progress)
        with accelerating(config, output) as accelerator, borrowed(pipe):
            _to(pipe, accelerator.device)
            run = _Run(pipe, dataset, config, output, accelerator, progress)
            with styled(pipe, styles or {}):
                run.begin()
            run.rehearse()
            with styled(pipe, styles or {}) as loras:
                probe = run.train(loras, prompts)
            run.check(probe)
            if accelerator.is_main_process:
                closing_page(output)
                named = str(teacher) if isinstance(teacher, str | Path) else compat.name_or_path(pipe)
                sheets = sorted(str(sheet.relative_to(output)) for sheet in output.glob("validation/*.png"))
                write_card(
                    probe.file, base=named or type(pipe).__name__, settings=checkpoint.chosen(config),
                    pictures=sheets[-1:],
                )  # fmt: skip
            return probe.file


def _to(pipe: Any, device: torch.device) -> None:
    try:
        pipe.to(device)
    except ValueError as error:  # off-loaded, or spread over devices
        raise LcmLoraError(f"the teacher can't be moved to {device}: {str(error).splitlines()[0]}") from error


class _Run:
    """One distillation. The names are the paper's: z latents, t timesteps, w guidance, eps noise."""

    def __init__(
        self, pipe: Any, dataset: Dataset, config: DistillConfig, output: Path, accelerator: Any, progress: bool
    ) -> None:
        self.dataset, self.config, self.output, self.accelerator = dataset, config, output, accelerator
        self.progress = progress and accelerator.is_local_main_process
        self.teacher = Teacher(pipe, config, accelerator.device)
        self.student = Student(self.teacher, config)
        self.params = self.student.parameters
        self.optimizer = accelerator.prepare(optimizer.make(self.params, config))
        self.ema = EMAModel(self.params, decay=config.ema) if config.ema else None
        self.inputs = self.teacher.inputs(dataset.examples[0].text)
        self.step, self.total, self.count, self.seconds = 0, 0.0, 0, 0.0
        self.loss: float | None = None
        self.best: dict[str, Any] | None = None

    # -- begin and end ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Note the settings, or go on from the checkpoint of a run that had the same.

        Raises:
            DataError: the output folder holds a run with other settings.
        """
        accelerator, config = self.accelerator, self.config
        told = self.told = checkpoint.settings(
            config,
            teacher=digest(self.teacher.unet),  # with its styles
            data=digest(*((example.text, example.content) for example in self.dataset.examples)),
            examples_a_step=config.batch_size * config.gradient_accumulation * accelerator.num_processes,
        )
        state = checkpoint.load(self.output)
        if state is not None:
            checkpoint.check(self.output, state, told)
        accelerator.wait_for_everyone()
        if config.trackers:
            flat = {k: v for k, v in told["settings"].items() if isinstance(v, int | float | str)}
            accelerator.init_trackers("lcmlora", config=flat)
        if state is not None:
            self._resume(state)
        if accelerator.is_main_process:
            checkpoint.write_settings(self.output, told)
            self._forget_later()

    def rehearse(self) -> None:
        """Before the first step of all, see that a file of such a LoRA loads back; to be called without the styles.

        Raises:
            LcmLoraError: it does not.
        """
        if self.accelerator.is_main_process and not self.step:
            export.rehearse(Student(self.teacher, self.config), self.output, self.inputs, **self._saving)
        self.accelerator.wait_for_everyone()

    @property
    def _saving(self) -> dict[str, Any]:
        config = self.config
        return {"recipe": config.recipe, "settings": checkpoint.chosen(config), "kohya": config.kohya}

    def _export(self, folder: Path, styles: Styles) -> Path:
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            alpha, state = self.config.lora_alpha, self.student.state()
            for source, weight in styles:
                state = export.merge_factors(state, alpha, self.teacher.unet, source, weight)
            export.save(state, folder, alpha=alpha, **self._saving)
        return folder / WEIGHT_NAME

    def check(self, probe: Probe) -> None:
        """Load the file the way its users will; to be called without the styles.

        Raises:
            LcmLoraError: it does not load, or gives another pass than what was trained.
        """
        if self.accelerator.is_main_process:
            device = self.teacher.device  # loaders draw weights before they set them
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                export.check(self.teacher.pipe, *probe)
        self.accelerator.wait_for_everyone()

    def _finish(self, styles: Styles) -> Probe:
        """Write the file, and what it cost."""
        if self.ema:
            self.ema.copy_to(self.params)
        self.accelerator.wait_for_everyone()
        with torch.no_grad(), self.student.attached():
            expected = self.student.pass_of(self.inputs)
        probe = Probe(self._export(self.output, styles), self.inputs, expected)
        if self.accelerator.is_main_process:
            told = {
                "file": probe.file.name,
                "steps": self.step,
                "loss": self.loss,
                "best": self.best,
                "parameters": sum(parameter.numel() for parameter in self.params),
                "seconds": round(self.seconds, 2),
                "seconds_caching": round(self.batches.seconds, 2),
                "peak_memory_mb": round(self._peak_memory() / 1e6),
                "device": str(self.teacher.device),
                "processes": self.accelerator.num_processes,
            }
            write_text(self.output / RESULT, json.dumps(told, indent=2) + "\n")
        return probe

    def _peak_memory(self) -> int:
        if self.teacher.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        try:
            import resource
        except ImportError:  # Windows
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, styles: Styles, prompts: Sequence[str] | None) -> Probe:
        """All steps that are left.

        Args:
            styles: what is merged into the teacher, with their weights.
            prompts: what validation sheets draw; None is the first few of the data's texts.

        Raises:
            LcmLoraError: the loss is not finite, or the disk is full.
            KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
        """
        config, self.styles = self.config, styles
        self.batches = Batches(self.teacher, self.dataset, config, self.output, self.accelerator, self.progress)
        self.batches.prepare()
        self.validator = None
        if config.validate_every and self.step < config.steps:
            own = list(dict.fromkeys(example.text for example in self.dataset.examples))[:PROMPTS]
            self.validator = Validator(self.batches, prompts or own, config, self.output)
        if config.cache:
            self.teacher.rest_encoders()
        self._began = time.monotonic() - self.seconds
        with ExitStack() as stack:
            self._asked = stack.enter_context(interruptible())
            stack.enter_context(self.student.attached())
            stack.enter_context(self._prepared_unet())
            bar = tqdm(total=config.steps, initial=self.step, desc="distilling", disable=not self.progress)
            stack.callback(bar.close)
            for stage in config.stages:
                objective = OBJECTIVES[stage[0]](config)
                for step in self._steps(stage):
                    told = self._micro(objective, step, stage)
                    if self.accelerator.sync_gradients:
                        self._between(told, bar)
        return self._finish(styles)

    def _steps(self, stage: tuple[str, int, int, float]) -> Iterator[Step]:
        name, first, last, _ = stage
        accumulate = self.config.gradient_accumulation
        first = max(first, self.step)
        return self.batches.of(name, first * accumulate, last * accumulate) if first < last else iter(())

    @contextmanager
    def _prepared_unet(self) -> Iterator[None]:
        unet = self.teacher.unet
        if self.config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        blocks = compiling.regions(unet, True) if self.config.compile else []
        try:
            for block in blocks:
                block.compile()
            yield
        finally:
            for block in blocks:
                compat.forget_compilation(block)

    def _micro(self, objective: Objective, step: Step, stage: tuple[str, int, int, float]) -> bool:
        """One forward and backward pass. Returns whether some process was asked to stop."""
        accelerator = self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = optimizer.rate(self.step, stage, self.config)
        with accelerator.accumulate():
            with accelerator.autocast():
                loss = objective(self.student, step.batch, Draws(self.config.seed, step.turns))
            told = torch.stack([loss.detach().float(), loss.new_tensor(float(self._asked.is_set())).float()])
            mean, asked = accelerator.reduce(told, "mean").tolist()
            if mean - mean != 0:  # infinite or NaN, in all processes at once
                raise LcmLoraError(
                    f"the loss is {mean} at step {self.step}: lower learning_rate, or mixed_precision='no'. "
                    f"The checkpoint in {self.output} is from before."
                )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                self._average_gradients()
                accelerator.clip_grad_norm_(self.params, self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.total, self.count = self.total + mean, self.count + 1
        return bool(asked)

    def _average_gradients(self) -> None:
        """One mean over all processes, of one flat tensor: a LoRA's gradients are few."""
        if self.accelerator.num_processes > 1:
            grads = [parameter.grad for parameter in self.params if parameter.grad is not None]
            flat = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
            for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(mean.view_as(grad))

    def _between(self, asked: bool, bar: Any) -> None:
        """After a step: the average, the log, a sheet, a checkpoint, the end."""
        config = self.config
        self.step += 1
        self.seconds = time.monotonic() - self._began
        if self.ema:
            self.ema.step(self.params)
        last = self.step == config.steps
        if self.step % config.log_every == 0 or last:
            self.loss, self.total, self.count = self.total / self.count, 0.0, 0
            rate = self.optimizer.param_groups[0]["lr"]
            self._log({"loss": self.loss, "lr": rate, "seconds": round(self.seconds, 2)})
            bar.set_postfix(loss=f"{self.loss:.4f}")
        bar.update()
        if self.validator and (self.step % config.validate_every == 0 or last):
            self._validate(self.validator)
        if config.checkpoint_every and (self.step % config.checkpoint_every == 0 or last or asked):
            self._save()
        if asked and not last:
            saved = (
                f"the checkpoint in {self.output}" if config.checkpoint_every else "no checkpoint: checkpoint_every=0"
            )
            words = f"stopped at step {self.step} of {config.steps}; run the same again to go on from {saved}."
            logger.warning("%s", words)
            raise KeyboardInterrupt(words)

    def _validate(self, validator: Validator) -> None:
        """Draw a sheet; keep the LoRA if none was nearer to the teacher so far."""
        if self.accelerator.is_main_process:
            if self.ema:
                self.ema.store(self.params)
                self.ema.copy_to(self.params)
            try:
                made: Validation = validator(self.student, self.step)
                self._log({"rel": {str(steps): round(rel, 4) for steps, rel in made.rel.items()}})
                if self.best is None or made.score < self.best["rel"]:
                    self.best = {"step": self.step, "rel": made.score, "sheet": made.sheet.name}
                    self._export(self.output / BEST, self.styles)
            finally:
                if self.ema:
                    self.ema.restore(self.params)
        self.accelerator.wait_for_everyone()

    def _log(self, row: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            append(self.output / LOG, json.dumps({"step": self.step, **row}))
        numbers = {f"rel/{k}": v for k, v in row.pop("rel", {}).items()}
        self.accelerator.log({**row, **numbers}, step=self.step)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write what a run can't compute anew. All processes have the same, so the first one's is all of it."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoint.save(
                self.output,
                {
                    "settings": self.told["settings"],
                    "step": self.step,
                    "params": [parameter.detach().cpu() for parameter in self.params],
                    "ema": self.ema.state_dict() if self.ema else None,
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": scaler.state_dict() if scaler else None,
                    "told": {"total": self.total, "count": self.count, "seconds": self.seconds, "loss": self.loss},
                    "best": self.best,
                },
            )
        self.accelerator.wait_for_everyone()

    def _resume(self, state: dict[str, Any]) -> None:
        for parameter, value in zip(self.params, state["params"], strict=True):
            parameter.data.copy_(value)
        if self.ema and state["ema"]:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.teacher.device)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.best = state["step"], state["best"]
        for name, value in state["told"].items():
            setattr(self, name, value)
        logger.info("resumed %s at step %d", self.output, self.step)

    def _forget_later(self) -> None:
        """Take away what came after the checkpoint, as it will come again; all where there is none, as it is another
        run's. And what a run that was killed was in the middle of.
        """
        for place in self.output.glob(f"{export.REHEARSAL}*"):
            shutil.rmtree(place, ignore_errors=True)
        for folder in (self.output, self.output / BEST, self.output / FOLDER):  # others may be writing to the cache
            for partial in folder.glob(f".*{PARTIAL}"):
                partial.unlink(missing_ok=True)
        log = self.output / LOG
        if log.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            write_text(log, "".join(line + "\n" for line in lines if _step_of(line) <= self.step))
        forget(self.output, self.step)
        if self.best is None:
            for old in (self.output / BEST).glob("*.safetensors"):
                old.unlink()


def _step_of(line: str) -> float:
    """The step that a line of the log is of; a line cut short is of none, and beyond all."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
