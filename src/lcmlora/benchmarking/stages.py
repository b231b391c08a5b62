"""Where the seconds of a call go: stages, told apart on the pipe's own objects and for the length of one call.

Models are watched by torch's forward hooks, methods (`vae.decode`, `scheduler.step`) by a stand-in on the one object.
No class is patched, and afterwards nothing is left. A model compiled in place is called past its hooks (they would be
compiled with it), so there the compiled call gets the stand-in.

`torch.utils.benchmark.Timer` runs one statement over and over: it can neither let two pipes take turns nor see
stages. `torch.profiler` records every operator, which makes a call of small models slower by a good part; it serves
where a stage is suspect, and the advice names it there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

from torch import nn

from .. import compat

OTHER = "other"
"""What belongs to no stage: Python, the progress bar, checks, latents, whatever a pipeline does by itself."""


class Stage(NamedTuple):
    """A part of a call.

    Attributes:
        name: in JSON and CSV.
        title: in words.
        modules: the pipe's models whose calls it consists of.
        methods: methods of the pipe, or of its parts, that belong to it.
        grows: what its work grows with: the passes of the UNet, or the samples that go through them, of which guidance
            makes twice as many. None where a call has it once.
    """

    name: str
    title: str
    modules: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    grows: Literal["passes", "samples"] | None = None


_PROCESSORS = ("image_processor", "mask_processor", "control_image_processor", "video_processor")
_CONVERSIONS = ("preprocess", "postprocess", "preprocess_video", "postprocess_video")
_SCHEDULER = ("step", "scale_model_input", "set_timesteps", "add_noise")
STAGES = (
    Stage("text", "text encoding", ("text_encoder", "text_encoder_2"), compat.PROMPT_ENCODERS),
    Stage("condition", "image conditioning", ("image_encoder", "adapter")),
    Stage("vae_encode", "VAE encode", methods=("vae.encode",)),
    Stage("unet", "UNet", ("unet",), grows="samples"),
    Stage("controlnet", "ControlNet", ("controlnet",), grows="samples"),
    Stage("scheduler", "scheduler", methods=tuple(f"scheduler.{name}" for name in _SCHEDULER), grows="passes"),
    Stage("vae_decode", "VAE decode", methods=("vae.decode", "vae.to", "upcast_vae")),
    Stage("safety", "safety checker", methods=("run_safety_checker",)),
    Stage("picture", "picture conversion", methods=tuple(f"{p}.{c}" for p in _PROCESSORS for c in _CONVERSIONS)),
    Stage(OTHER, "other"),
)
"""`vae.to` and `upcast_vae` are how SDXL brings a half-precision VAE to float32 and back around its decoding."""


class Stopwatch:
    """Shares the time of a call out: each moment belongs to the innermost stage under way, so the stages add up.

    Args:
        clock: gives seconds.
        wait: called before the clock is read, to wait for the device.

    Attributes:
        seconds: by stage, `OTHER` included.
        passes: how often each stage was entered.
        samples: how many samples went through it, by the first tensor that it was called with.
    """

    def __init__(self, clock: Callable[[], float], wait: Callable[[], object]) -> None:
        self._clock, self._wait = clock, wait
        self._under_way: list[str] = []
        self._since = 0.0
        self.seconds: dict[str, float] = {}
        self.passes: dict[str, int] = {}
        self.samples: dict[str, int] = {}

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def enter(self, stage: str, samples: int = 1) -> None:
        """A stage begins; the one around it pauses."""
        self._account()
        self._under_way.append(stage)
        self.passes[stage] = self.passes.get(stage, 0) + 1
        self.samples[stage] = self.samples.get(stage, 0) + samples

    def leave(self) -> None:
        """The innermost stage is over."""
        self._account()
        self._under_way.pop()

    def _account(self) -> None:
        self._wait()
        now = self._clock()
        if self._under_way:
            stage = self._under_way[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now

    @contextmanager
    def stage(self, name: str, samples: int = 1) -> Iterator[None]:
        """A stage for the length of a block."""
        self.enter(name, samples)
        try:
            yield
        finally:
            self.leave()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stopwatch:
        return self  # a pipeline may copy its scheduler in the middle of a call


class _Timed:
    """Stands for a method on one object. A deep copy of the object gets one that calls the copy."""

    def __init__(self, watch: Stopwatch, stage: str, method: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)  # pipelines ask scheduler.step for its signature
        self._watch, self._stage, self._method = watch, stage, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._watch.stage(self._stage, _samples(args, kwargs)):
            return self._method(*args, **kwargs)


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    given = kwargs.get("sample", args[0] if args else None)
    shape = getattr(given, "shape", None)
    return int(shape[0]) if shape else 1


@contextmanager
def watched(pipe: Any, watch: Stopwatch) -> Iterator[None]:
    """A pipe whose calls the stopwatch sees, for the length of a block.

    A user's own hooks on a model are counted to its stage.
    """
    with ExitStack() as undo:
        for stage in STAGES:
            for path in stage.methods:
                owner_name, _, name = path.rpartition(".")
                owner = getattr(pipe, owner_name, None) if owner_name else pipe
                if owner is not None and callable(getattr(owner, name, None)):
                    _stand_in(owner, name, _Timed(watch, stage.name, getattr(owner, name)), undo)
            for part in stage.modules:
                found = getattr(pipe, part, None)
                for module in found if isinstance(found, list | tuple) else (found,):
                    if isinstance(module, nn.Module):
                        _watch_module(module, watch, stage.name, undo)
        yield


def _watch_module(module: nn.Module, watch: Stopwatch, stage: str, undo: ExitStack) -> None:
    if compat.is_compiled(module):
        slot = compat.COMPILED
        _stand_in(module, slot, _Timed(watch, stage, getattr(module, slot)), undo)
        return

    def enter(_: Any, args: Any, kwargs: Any) -> None:
        watch.enter(stage, _samples(args, kwargs))

    def leave(*_: Any) -> None:
        watch.leave()

    undo.callback(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
    undo.callback(module.register_forward_hook(leave).remove)


def _stand_in(owner: Any, name: str, value: Any, undo: ExitStack) -> None:
    """Put a value on an object itself, past its `__setattr__`: pipelines register what is set on them."""
    own = vars(owner)
    if name in own:
        undo.callback(own.__setitem__, name, own[name])
    else:
        undo.callback(own.pop, name, None)
    own[name] = value
