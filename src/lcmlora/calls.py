"""How an accelerated pipe's calls go through its policy: which methods, nested calls, what a failure may mean."""

from __future__ import annotations

import functools
import inspect
import re
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline

from .compat import PROMPT_ENCODERS
from .errors import CallError, PipelineError, how_to_load
from .parameters import Parameters
from .policy import Policy as Policy
from .policy import steps_at_strength as steps_at_strength

_CANNOT = {
    "CycleDiffusionPipeline": "it needs DDIM's eta",
    "EDICTPipeline": "it has a sampler of its own, coupled DDIM",
    "SdeDragPipeline": "it has a sampler of its own, for an SDE",
    "StableDiffusionDiffEditPipeline": "the latents of its invert() lie at DDIM's timesteps, not at LCM's",
    "StableDiffusionHDPainterPipeline": "it passes variance_noise to scheduler.step, which LCMScheduler does not take",
    "StableDiffusionLatentUpscalePipeline": "it reads scheduler.sigmas, which LCMScheduler has not",
    "StableDiffusionParadigmsPipeline": "it needs a parallel scheduler",
    "StableDiffusionRepaintPipeline": "it needs RePaintScheduler's undo_step",
}
"""Pipelines with a UNet of the right shape whose own `__call__` rules LCM out; no structure tells."""
_NO_GENERATION = re.compile(r"_|(get|check|prepare|encode|decode|invert|set|enable|disable|train|retrieve)(_|$)")
"""Methods that take num_inference_steps and draw nothing, or run an inversion's own schedule."""
_SYMPTOMS = re.compile(
    r"NoneType|not enough values to unpack|index out of range|local variable|division by zero"
    r"|index (\d+) is out of bounds for (dimension|axis) 0 with size \1\b|non-singleton dimension 0"
    r"|size (1 but got size 2|2 but got size 1)\b|shape '\[2, |guidance_scale|do_classifier_free"
)
"""What Python and torch say where the unconditional half of a batch is looked for and is not there."""


_PLAIN = "_lcmlora_plain"


class Hooks(NamedTuple):
    """What a governed class asks of its instances, at each call.

    Attributes:
        policy_of: an instance's policy; None leaves its calls alone.
        encode: what stands in the place of its `encode_prompt(*args, **kwargs)`.
        entered: entered around each call that is not made from another of the same pipe; may refuse by raising.
        saving: asked before its `save_pretrained`.
    """

    policy_of: Callable[[Any], Policy | None]
    encode: Callable[[Any, Any, tuple[Any, ...], Any], Any]
    entered: Callable[[Any], AbstractContextManager[Any]]
    saving: Callable[[Any], None]


def methods_of(cls: type) -> list[str]:
    """The names of a pipeline class's methods that draw in a number of steps: its call, and public ones like it."""
    return [name for name in dir(cls) if inspect.isfunction(inspect.getattr_static(cls, name)) and _draws(cls, name)]


def _draws(cls: type, name: str) -> bool:
    if name != "__call__" and (_NO_GENERATION.match(name) or hasattr(DiffusionPipeline, name)):
        return False
    takes = Parameters.of(cls, name)
    if name == "__call__" or takes.steps == "num_inference_steps":
        return takes.steps is not None
    return bool(takes.steps and "prompt" in takes.defaults and (takes.guidance or takes.more_guidance))


def why_not(cls: type) -> str | None:
    """Why LCMScheduler can't drive a pipeline class; None where nothing says so."""
    for ancestor in cls.__mro__:
        if reason := _CANNOT.get(ancestor.__name__):
            return f"{cls.__name__} can't be driven by LCMScheduler: {reason}."
    if not methods_of(cls):
        return (
            f"{cls.__name__} takes no num_inference_steps, neither in its call nor in another public method, so it "
            "can't be told to run LCM's few steps."
        )
    return None


def governed(cls: type, hooks: Hooks) -> type:
    """A subclass of the class that bears its name and sends its calls through `hooks`.

    `__call__` is looked up on the type, so an accelerated pipe gets a subclass of its own: `isinstance`, `help`,
    `inspect.signature` and `from_pipe` see no difference, and no other pipe is touched.
    """
    members: dict[str, Any] = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    members.update({name: _driven(cls, name, hooks) for name in methods_of(cls)})
    members.update({name: _encoding(getattr(cls, name), hooks) for name in PROMPT_ENCODERS if hasattr(cls, name)})
    if hasattr(cls, "save_pretrained"):  # a class of one's own may have none
        members["save_pretrained"] = _saving(cls.save_pretrained, hooks)
    # A copy, or a pickle, is made of the plain class and the state: this class can't be found by its name.
    members["__reduce_ex__"] = lambda self, protocol: (_rebuild, (cls, hooks), self.__dict__)
    members[_PLAIN] = cls
    return type(cls.__name__, (cls,), members)


def plain(cls: type) -> type:
    """The class itself, or the one that a governed class was made from."""
    return getattr(cls, _PLAIN, cls)


def parameters_of(pipe: Any) -> Parameters:
    """What the call of a pipe takes.

    Raises:
        PipelineError: it has none.
    """
    if not callable(pipe):
        raise PipelineError(f"{type(pipe).__name__} has no __call__ that draws{how_to_load(pipe)}.")
    return Parameters.of(plain(type(pipe)), "__call__")


def _rebuild(cls: type, hooks: Hooks) -> Any:
    pipe: Any = object.__new__(cls)
    pipe.__class__ = governed(cls, hooks)
    return pipe


def _encoding(encode_prompt: Any, hooks: Hooks) -> Any:
    @functools.wraps(encode_prompt)
    def encoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hooks.encode(self, encode_prompt, args, kwargs)

    return encoding


def _saving(save_pretrained: Any, hooks: Hooks) -> Any:
    @functools.wraps(save_pretrained)
    def saving(self: Any, *args: Any, **kwargs: Any) -> Any:
        hooks.saving(self)
        return save_pretrained(self, *args, **kwargs)

    return saving


def _driven(cls: type, name: str, hooks: Hooks) -> Any:
    """A method of the class that goes through the policy."""
    function, takes = getattr(cls, name), Parameters.of(cls, name)

    @functools.wraps(function)
    def driven(self: Any, *args: Any, **kwargs: Any) -> Any:
        policy = hooks.policy_of(self)
        if policy is None:
            return function(self, *args, **kwargs)
        return _call(hooks, policy, takes, function, self, args, kwargs)

    # Programs ask pipe.__call__.__wrapped__ for its arguments: what is there on the plain class stays there.
    driven.__wrapped__ = getattr(function, "__wrapped__", function)
    driven.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return driven


class _Running(threading.local):
    """The calls under way in this thread: the pipe, and whether its steps were raised for a strength."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, bool]] = []


_running = _Running()


def _call(
    hooks: Hooks, policy: Policy, takes: Parameters, function: Any, pipe: Any, args: tuple[Any, ...], kwargs: Any
) -> Any:
    calls, depth = _running.calls, len(_running.calls)
    outer = [stretched for other, stretched in calls if other is pipe]
    with nullcontext() if outer else hooks.entered(pipe):
        call = policy.complete(takes, pipe, args, kwargs, outer)
        try:
            calls.append((pipe, call.stretched))
            result = function(pipe, *call.args, **call.kwargs)
        except Exception as error:
            if not outer and (message := _diagnosis(error, policy, pipe, call)):
                raise CallError(message) from error
            raise
        finally:  # an interruption between the two lines above loses nothing
            del calls[depth:]
        policy.ran_unguided |= call.unguided
        if not outer:
            policy.ran = call.ran
        return result


def _diagnosis(error: Exception, policy: Policy, pipe: Any, call: Any) -> str | None:
    """What a failure inside the pipeline may come from; None where it tells enough by itself."""
    name, text = type(pipe).__name__, f"{type(error).__name__}: {error}"
    scheduler = type(pipe.scheduler).__name__
    if isinstance(error, TypeError | AttributeError) and scheduler in str(error):
        return f"{text}: {name} asks of its scheduler what {scheduler} has not; lcmlora can't drive it."
    if not call.unguided or policy.ran_unguided or not _SYMPTOMS.search(str(error)):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    given = {getattr(value, "__code__", None) for value in (*call.args, *call.kwargs.values())}
    if any(frame.f_code.co_name.startswith("check_") or frame.f_code in given for frame in frames):
        return None  # the arguments were refused, or the caller's own callback failed
    modules = [frame.f_globals.get("__name__", "") for frame in frames]
    inner = [module for module in modules if module.partition(".")[0] != "torch"][-1]
    if inner.partition(".")[0] != "diffusers" and inner not in {cls.__module__ for cls in type(pipe).__mro__}:
        return None
    return (
        f"{text}. {name} may need classifier-free guidance, and this call runs without (guidance_scale 1): pass "
        "guidance_scale=1.5, or accelerate(guidance=1.5)."
    )
