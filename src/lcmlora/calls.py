"""How an accelerated pipe is called: defaults where the caller gave none, guidance kept where LCM works."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import warnings
from typing import Any

from .errors import CallError, LcmLoraWarning

GUIDANCE_RANGE = (1.0, 2.0)
"""Where an LCM-LoRA works (diffusers docs, latent_consistency_models.md): it has guidance distilled in already."""
MAX_STEPS = 50
"""LCMScheduler's `original_inference_steps`: more steps than that it can't place (scheduling_lcm.py, l. 520)."""
GOOD_STEPS = 8
"""Above this quality falls again (PCM paper, tables 1 to 7: FID of LCM on SDXL 11.2 at 4 steps, 23.3 at 16)."""


@dataclasses.dataclass
class Policy:
    """What an accelerated pipe does with the arguments of a call.

    Args:
        steps: `num_inference_steps` where the caller gives none, 1 to 50.
        guidance: `guidance_scale` where the caller gives none. None leaves every call's guidance alone.
        strict: raise `CallError` where guidance would be clamped.
    """

    steps: int = 4
    guidance: float | None = 1.0
    strict: bool = False
    _warned: set[str] = dataclasses.field(default_factory=set, repr=False, compare=False)

    def check(self) -> None:
        """Refuse defaults that no call could use.

        Raises:
            CallError: as for a call.
        """
        self._steps({"num_inference_steps": self.steps}, inspect.Signature())
        if self.guidance is not None and not GUIDANCE_RANGE[0] <= self._number(self.guidance) <= GUIDANCE_RANGE[1]:
            raise CallError(
                f"guidance={self.guidance!r}: {GUIDANCE_RANGE[0]:g} to {GUIDANCE_RANGE[1]:g} works with an LCM-LoRA."
            )

    def apply(
        self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> inspect.BoundArguments:
        """The call's arguments, completed and checked; `signature` is the pipeline's `__call__`'s, self included.

        Raises:
            CallError: steps outside 1 to 50, a strength with which no step is left, or guidance outside 1 to 2 when
                strict.
            TypeError: as the pipeline itself would raise.
        """
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        if given.get("timesteps") is None and given.get("sigmas") is None:
            given["num_inference_steps"] = self._steps(given, signature)
            self._sides(given, bound.args[0])
        if "guidance_scale" in signature.parameters and self.guidance is not None:
            given["guidance_scale"] = self._guidance(given)
        self._without_effect(given, bound.args[0])
        return bound

    def _steps(self, given: dict[str, Any], signature: inspect.Signature) -> int:
        steps = given.get("num_inference_steps", self.steps)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
            raise CallError(
                f"num_inference_steps={steps!r}: an accelerated pipe takes whole numbers from 1 to {MAX_STEPS}; "
                "4 is usual."
            )
        if steps > GOOD_STEPS:
            self._once(
                "steps",
                f"num_inference_steps={steps}: an LCM-LoRA is best at 4 to {GOOD_STEPS} steps and gets worse above.",
            )
        strength = given.get("strength", _default(signature, "strength"))
        if strength is None or given.get("denoising_start") is not None:  # the latter stands in strength's place
            return steps
        asked = steps_at_strength(steps, strength)
        return steps if given.get("enforce_inference_steps") else asked  # AnimateDiff's own way to the same end

    @staticmethod
    def _sides(given: dict[str, Any], pipe: Any) -> None:
        """Refuse a split between two pipelines that leaves this one no step (SDXL, get_timesteps; pipeline_..._xl, l.
        1195).
        """
        start, end = given.get("denoising_start"), given.get("denoising_end")
        if start is None and end is None:
            return
        steps = given["num_inference_steps"]
        timesteps = lcm_timesteps(pipe.scheduler, steps)
        total = pipe.scheduler.config.num_train_timesteps
        left = [
            t
            for t in timesteps
            if (start is None or t < round(total - start * total)) and (end is None or t >= round(total - end * total))
        ]
        if not left:
            raise CallError(
                f"denoising_start={start!r}, denoising_end={end!r}: none of the {steps} LCM timesteps {timesteps} "
                "lies there. Pass more num_inference_steps, or split elsewhere."
            )

    def _guidance(self, given: dict[str, Any]) -> float:
        low, high = GUIDANCE_RANGE
        guidance = self._number(given.get("guidance_scale", self.guidance))
        if guidance <= high:  # 1 and below is "off": the same picture as at 1, and no cost
            return max(guidance, low)
        message = (
            f"guidance_scale={guidance:g} burns pictures made with an LCM-LoRA, which has guidance distilled in; "
            f"{low:g} to {high:g} works"
        )
        if self.strict:
            raise CallError(message + ".")
        self._once("guidance", f"{message}: {high:g} is used. accelerate(guidance=None) turns this off.")
        return high

    @staticmethod
    def _number(guidance: Any) -> float:
        if isinstance(guidance, bool) or not isinstance(guidance, int | float) or math.isnan(guidance):
            raise CallError(
                "guidance_scale={!r}: a number from {:g} to {:g} is expected.".format(guidance, *GUIDANCE_RANGE)
            )
        return guidance

    def _without_effect(self, given: dict[str, Any], pipe: Any) -> None:
        """Warn of arguments that do nothing here, or something else than the caller may think."""
        if given.get("guidance_scale", 2.0) <= 1:
            if given.get("negative_prompt") or given.get("negative_prompt_embeds") is not None:
                self._once(
                    "negative",
                    "negative_prompt has no effect at guidance_scale 1: pass guidance_scale=1.5 (up to 2) with it. "
                    "Each step then takes two UNet passes instead of one.",
                )
            for name in ("image_guidance_scale", "editing_prompt", "source_embeds"):
                if given.get(name) is not None:
                    self._once(
                        name, f"{name} has no effect at guidance_scale 1: pass guidance_scale=1.5 (up to 2) with it."
                    )
        if (given.get("cross_attention_kwargs") or {}).get("scale") is not None:
            merged = not any(hasattr(module, "lora_A") for module in pipe.unet.modules())
            self._once(
                "scale",
                'cross_attention_kwargs["scale"] '
                + ("has no effect on merged LoRAs" if merged else "scales the LCM-LoRA together with the styles")
                + ": lcmlora.set_styles(pipe, {name: weight}) changes the styles alone.",
            )

    def _once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, LcmLoraWarning, stacklevel=caller_depth())


def steps_at_strength(steps: int, strength: float) -> int:
    """The `num_inference_steps` with which an image-to-image pipeline runs `steps` steps at this strength.

    Those pipelines run int(num_inference_steps * strength) of the steps they are asked for
    (pipeline_stable_diffusion_img2img.py, get_timesteps).

    Raises:
        CallError: the strength is not in (0, 1], or so small that fewer than `steps` of the 50 LCM steps lie below it.
    """
    if not 0 < strength <= 1:
        raise CallError(f"strength={strength!r}: a number above 0 and up to 1 is expected.")
    if strength >= 0.999:  # SDXL inpainting's default of 0.9999 stands for 1
        return min(steps + (int(steps * strength) < steps), MAX_STEPS)
    asked = math.ceil(steps / strength)
    asked += int(asked * strength) < steps  # 3 / 0.6 and its like, a hair below the whole number in floating point
    if asked > MAX_STEPS:
        most = int(MAX_STEPS * strength)
        raise CallError(
            f"strength={strength:g} leaves room for {most} of {MAX_STEPS} LCM steps, and {steps} were asked for: "
            f"pass num_inference_steps={most} or less, or a strength of {steps / MAX_STEPS:g} or more."
            if most
            else f"strength={strength:g} changes nothing: the least that makes a step is {1 / MAX_STEPS:g}."
        )
    return asked


def lcm_timesteps(scheduler: Any, steps: int) -> list[int]:
    """The timesteps of an LCM schedule, descending; the scheduler is left as it is."""
    own = type(scheduler).from_config(scheduler.config)
    own.set_timesteps(steps)
    return [int(t) for t in own.timesteps]


def _default(signature: inspect.Signature, name: str) -> Any:
    parameter = signature.parameters.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def caller_depth() -> int:
    """How far up the stack the first caller outside this module (and torch's no_grad wrapper) is, for `warnings`."""
    frame, depth = inspect.currentframe(), 0
    while frame is not None and (
        frame.f_globals.get("__name__") == __name__ or "torch" in frame.f_globals.get("__name__", "")
    ):
        frame, depth = frame.f_back, depth + 1
    return depth


def install(pipe: Any, policy: Policy, cache: Any = None) -> None:
    """Let this one pipe's calls go through the policy, and its prompts through a `PromptCache`, where there is one.
    Giving it back its class undoes it.

    `__call__` is looked up on the type, so the pipe gets a subclass of its own that bears the class's name:
    `isinstance`, `help`, `inspect.signature`, `save_pretrained` and `from_pipe` see no difference, and no other pipe
    is touched.
    """
    cls = type(pipe)
    signature = inspect.signature(cls.__call__)

    @functools.wraps(cls.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = policy.apply(signature, (self, *args), kwargs)
        return cls.__call__(*bound.args, **bound.kwargs)

    names = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    methods = {"__call__": __call__}
    if cache is not None and hasattr(cls, "encode_prompt"):

        @functools.wraps(cls.encode_prompt)
        def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
            return cache.encode(cls.encode_prompt, self, args, kwargs)

        methods["encode_prompt"] = encode_prompt
    pipe.__class__ = type(cls.__name__, (cls,), {**names, **methods})
