"""Studio: drafts in four steps and finals at full quality, of one fine-tuned pipeline.

A small library that others build on, written as a user of lcmlora would, from its docs alone.

    with Studio(pipe, styles={"ink": "ink.safetensors"}) as studio:
        draft = studio.draft("a fox", seed=3, styles={"ink": 0.5})
        final = studio.final("a fox", seed=3)
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from PIL.Image import Image

import lcmlora


class StudioError(Exception):
    """What was asked of a studio can't be done."""


class Studio:
    """Drafts and finals of one pipeline, from any thread.

    Args:
        pipe: a pipeline of diffusers. It is given back as it was by `close`, or at the end of a `with` block.
        lora: a few-step LoRA other than its base's own.
        styles: style LoRAs for drafts, by name.
        final_steps: of finals, which are drawn by the pipe as it came.
    """

    def __init__(
        self, pipe: Any, *, lora: Any = None, styles: Mapping[str, Any] | None = None, final_steps: int = 30
    ) -> None:
        if lcmlora.is_accelerated(pipe):
            raise StudioError("the pipe is accelerated already: lcmlora.restore(pipe) first")
        self.pipe, self.final_steps = pipe, final_steps
        self._lora, self._styles = lora, dict(styles or {})
        self._lock = threading.Lock()
        self.fast = True
        try:  # refused here rather than at the first draft
            self._accelerate({})
        except (lcmlora.BaseModelError, lcmlora.LoraFileError, lcmlora.LoraMismatchError) as error:
            if lora is not None or styles:
                raise StudioError(str(error)) from error
            self.fast = False  # no few-step LoRA is known or to be had: drafts are slow ones
        except lcmlora.PipelineError as error:
            raise StudioError(str(error)) from error

    def draft(self, prompt: str, *, seed: int = 0, styles: Mapping[str, float] | None = None, **call: Any) -> Image:
        """Draw quickly: four steps, unless `num_inference_steps` says otherwise."""
        if not self.fast:
            return self.final(prompt, seed=seed, **call)
        with self._lock:
            try:
                self._accelerate(styles or {})
                return self._draw(prompt, seed, call)
            except lcmlora.LcmLoraError as error:
                raise StudioError(str(error)) from error

    def final(self, prompt: str, *, seed: int = 0, **call: Any) -> Image:
        """Draw with the pipe as it came."""
        with self._lock:
            self._restore()
            return self._draw(prompt, seed, {"num_inference_steps": self.final_steps, **call})

    def close(self) -> None:
        """Give the pipe back as it came."""
        with self._lock:
            self._restore()

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accelerate(self, weights: Mapping[str, float]) -> None:
        if not lcmlora.is_accelerated(self.pipe):
            lcmlora.accelerate(self.pipe, lora=self._lora, styles=self._styles)
        lcmlora.set_styles(self.pipe, weights)

    def _restore(self) -> None:
        if lcmlora.is_accelerated(self.pipe):
            lcmlora.restore(self.pipe)

    def _draw(self, prompt: str, seed: int, call: Mapping[str, Any]) -> Image:
        image: Image = self.pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]
        return image
