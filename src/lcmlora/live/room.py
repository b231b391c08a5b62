"""A pipe and, where there is memory for it, the same without acceleration, drawing what visitors ask for now.

Of what a visitor asks for only the newest is drawn, so nothing queues. The accelerated picture goes before all others:
the base is drawn when no visitor waits for one, and is stopped inside a step as soon as one does.
"""

from __future__ import annotations

import copy
import inspect
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from .. import base as bases
from .. import recipe as recipes
from ..acceleration import accelerate, rehearse, restore
from ..calls import plain
from ..compat import progress_bar_config
from ..devices import device_of, hardware, synchronize
from ..errors import CallError, LcmLoraError, PipelineError, brief
from ..kinds import as_kind
from ..layers import unet_of
from ..parameters import Parameters
from ..quiet import TEXT_ENCODERS, hushed
from ..recipe import Recipe
from ..state import is_accelerated, status
from ..transition.records import baked_of, module_record_of, pipe_record_of
from ..transition.target import Style
from .scene import Choice, Drawn, Scene

NONE = "none"
"""The choice that draws with the model as it is."""
QUIET = 0.25
"""Seconds without a wish before the base is drawn: whoever types has it quiet."""
_CLOSED = "this room is closed: its pipe is what it was."
_MOST_STEPS = 8
_REMEMBERED = 8
_OF_ONE_FILE = {"recipe", "lora", "weight_name", "subfolder", "revision", "weight", "steps", "guidance"}
"""Arguments of `accelerate` that are about the recipe that was asked for, and no other."""


class _Stopped(Exception):  # noqa: N818
    """The base's picture is given up: somebody waits for an accelerated one, or nobody for this."""


class Room:
    """Draws scenes with a pipe, any number of visitors at once, each of whom gets the newest of his wishes.

    Args:
        pipe: a text-to-image pipeline that is not accelerated: the room accelerates it. A baked one is drawn with as
            it is, without a base. Nobody else may call it until `close`.
        base: whether there shall also be the model as it is, to compare with: it takes the memory of a second UNet.
        base_steps: `num_inference_steps` of the base's pictures.
        base_guidance: their `guidance_scale`; None is the pipeline's own default.
        size: width and height of the pictures; None is what the model is made for.
        settings: as for `accelerate`.

    Attributes:
        choices: what a scene's `recipe` may be, by name: first what was asked for, then the recipes for this base
            whose files are on this machine, and "none" where there is a base.
        styles: the styles' weights at the start, by name.
        model: its name.
        hardware: what it computes on, in words.
        size: width and height of the pictures.
        base: whether there is one.
        sketches: whether scenes may start from a picture.

    Raises:
        PipelineError: the pipe does not draw pictures from texts, is accelerated already, or its base can't have the
            styles. LcmLoraError: as `accelerate`.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        base: bool = True,
        base_steps: int = 25,
        base_guidance: float | None = None,
        size: tuple[int, int] | None = None,
        **settings: Any,
    ) -> None:
        takes = _require_drawing(pipe, settings)
        usual = takes.defaults.get("guidance_scale", 1.0)
        self.base_steps, self.base_guidance = base_steps, float(usual if base_guidance is None else base_guidance)
        self._asked_size, self.size = size, size or _usual_size(pipe)
        self._turn = threading.Lock()  # to draw: two at once would take each other's processors
        self._changed = threading.Condition()
        self._waiting, self._free_since = 0, 0.0
        self._newest: dict[str, Scene] = {}
        self._drawing_base: tuple[Scene, str] | None = None
        self._hooks: list[Any] = []
        self._remembered: list[tuple[Scene, Drawn]] = []
        self._made: dict[str, Any] = {}
        self._base_styles: Mapping[str, float] | None = None
        self._ours = not is_accelerated(pipe)
        self.base, self.sketches = base and self._ours, self._ours
        settings = {"cache_prompts": _REMEMBERED, **settings}
        styles = dict(settings.pop("styles", None) or {})
        self.styles = {name: Style.of(one).weight for name, one in styles.items()}
        self._pipes, self._device = {"text2img": pipe}, device_of(pipe)
        self.model, self.hardware = str(pipe.name_or_path or type(pipe).__name__), hardware(self._device)
        self._base_pipes = {"text2img": _copy(pipe, bool(styles))} if self.base else {}
        if self._ours:
            accelerate(pipe, **_with(settings, styles if styles else None))
        try:
            self._load_styles(styles)
            self._settings = self._recipes(settings)
            self.choices = {name: self._choice(name, recipe) for name, (recipe, _) in self._settings.items()}
        except BaseException:
            self.close()
            raise
        if self.base:
            guidance = max(self.base_guidance, 1.0)
            self.choices[NONE] = Choice(NONE, (1, _MOST_STEPS), 4, (1.0, guidance), guidance)
            self._listen()

    @property
    def of_pocket(self) -> bool:
        """Whether it draws with the embedded model."""
        return self.model.partition(":")[0] == "pocket"

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the pipe back as it was."""
        with self._turn:
            for kind in reversed(list(self._pipes)):
                pipe = self._pipes.pop(kind)
                if self._ours and is_accelerated(pipe):
                    restore(pipe)
            self._base_pipes.clear()
            self._remembered.clear()
            while self._hooks:
                self._hooks.pop().remove()

    # -- what visitors ask for ----------------------------------------------------------------------------------------

    def draw(self, scene: Scene, visitor: str = "") -> Drawn | None:
        """The accelerated picture of a scene: exactly what the pipe gives for it.

        Args:
            scene: what to draw.
            visitor: who asks. What he asked for before, and is not being drawn yet, is not drawn any more.

        Returns:
            None where the same visitor asked for another scene meanwhile.

        Raises:
            CallError: the scene names what is not there, or the pipe can't draw it. PipelineError: the room is
            closed.
        """
        choice = self._chosen(scene)
        with self._wish(scene, visitor), self._turn:
            if self._newest.get(visitor) is not scene:
                return None
            steps = choice.usual_steps if scene.steps is None else scene.steps
            guidance = choice.usual_guidance if scene.guidance is None else scene.guidance
            pipe = self._base_pipe(scene) if choice.name == NONE else self._pipe(scene, choice)
            return self._call(pipe, scene, steps, guidance)

    def draw_base(self, scene: Scene, visitor: str = "") -> Drawn | None:
        """The base's picture of a scene, drawn when no visitor waits for an accelerated one. It may take long.

        Returns:
            None where the visitor asked `draw` for a scene meanwhile that has another base's picture.

        Raises:
            CallError: the scene names what is not there, or the pipe can't draw it. PipelineError: there is no base.
        """
        if not self.base:
            raise PipelineError("this room has no base to draw with: Room(pipe, base=True), of a pipe that is plain.")
        self._chosen(scene)
        with self._changed:
            self._newest.setdefault(visitor, scene)
        while self._quiet(scene, visitor):
            for known, drawn in self._remembered:
                if known == scene.of_base:
                    return drawn
            with self._turn:
                self._drawing_base = scene, visitor
                try:
                    drawn = self._call(self._base_pipe(scene), scene, self.base_steps, self.base_guidance)
                except _Stopped:
                    continue
                finally:
                    self._drawing_base = None
            self._remembered = [*self._remembered[1 - _REMEMBERED :], (scene.of_base, drawn)]
            return drawn
        return None

    def leave(self, visitor: str) -> None:
        """Forget a visitor; a base's picture that is drawn for him is stopped."""
        with self._changed:
            self._newest.pop(visitor, None)
            self._changed.notify_all()

    @contextmanager
    def _wish(self, scene: Scene, visitor: str) -> Iterator[None]:
        with self._changed:
            self._newest[visitor] = scene
            self._waiting += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1
                self._free_since = time.monotonic()
                self._changed.notify_all()

    def _wanted(self, scene: Scene, visitor: str) -> bool:
        newest = self._newest.get(visitor)
        return newest is not None and (newest is scene or newest.of_base == scene.of_base)

    def _quiet(self, scene: Scene, visitor: str) -> bool:
        """Wait until nobody waits for an accelerated picture; False where the scene is no longer wanted."""
        with self._changed:
            while self._wanted(scene, visitor):
                left = None if self._waiting else QUIET - (time.monotonic() - self._free_since)
                if left is not None and left <= 0:
                    return True
                self._changed.wait(left)
        return False

    def _listen(self) -> None:
        """Have the base's models look, at each of their blocks, whether they are to stop."""
        pipe = self._base_pipes["text2img"]
        for module in (pipe.unet, getattr(pipe.vae, "decoder", pipe.vae)):
            parts = [
                [*part] if isinstance(part, nn.ModuleList | nn.Sequential) else [part] for part in module.children()
            ]
            for block in (block for part in parts for block in part):
                self._hooks.append(block.register_forward_pre_hook(lambda *_: self._stop_if_asked()))
        ahead = pipe.unet.register_forward_pre_hook(lambda *_: synchronize(self._device))  # it would be steps ahead
        self._hooks.append(ahead)

    def _stop_if_asked(self) -> None:
        if self._drawing_base is not None and (self._waiting or not self._wanted(*self._drawing_base)):
            raise _Stopped

    # -- which pipe, and in which state -------------------------------------------------------------------------------

    def _chosen(self, scene: Scene) -> Choice:
        """The choice that a scene makes.

        Raises:
            CallError: there is no such choice, or no such style.
        """
        if not self._pipes:
            raise PipelineError(_CLOSED)
        if scene.image is not None and not self.sketches:
            raise CallError("this room's model is baked, so it draws from texts alone.")
        if odd := sorted((scene.styles or {}).keys() - self.styles.keys()):
            there = f"; those that are there: {sorted(self.styles)}" if self.styles else ", nor any other"
            raise CallError(f"there is no style {odd[0]!r} in this room{there}.")
        name = next(iter(self.choices)) if scene.recipe is None else scene.recipe
        if name not in self.choices:
            raise CallError(f"recipe={brief(name)}: this room has {', '.join(self.choices)}.")
        return self.choices[name]

    def _weights(self, scene: Scene) -> dict[str, float]:
        wanted = self.styles if scene.styles is None else scene.styles
        return {name: weight for name, weight in wanted.items() if weight}

    def _pipe(self, scene: Scene, choice: Choice) -> Any:
        """The pipe for a scene, in the state that it wants."""
        kind, pipe = _of_kind(self._pipes, scene)
        key = choice.name, self._weights(scene)
        if self._ours and self._made.get(kind) != key:
            accelerate(pipe, **_with(self._settings[choice.name][1], key[1] if self.styles else None))
            self._made = {kind: key}  # the others' UNet changed with it
        return pipe

    def _base_pipe(self, scene: Scene) -> Any:
        _, pipe = _of_kind(self._base_pipes, scene)
        weights = self._weights(scene)
        if self.styles and weights != self._base_styles:
            self._base_styles = None
            first = self._base_pipes["text2img"]
            if weights:
                first.enable_lora()
                first.set_adapters(list(weights), list(weights.values()))
            else:
                first.disable_lora()
            self._base_styles = weights
        return pipe

    def _load_styles(self, styles: Mapping[str, Any]) -> None:
        """The styles' files into the base, by diffusers: it has nothing of ours in it.

        Raises:
            PipelineError: diffusers does not take one of them.
        """
        record = module_record_of(self._pipes["text2img"].unet)
        if not self.base or record is None or record.applied is None:
            return
        for name, file in record.applied.files.items():
            source: Any = Style.of(styles[name]).source  # a dict of tensors has no file
            where, given = (
                (source, {})
                if file.path is None
                else (str(file.path.parent), {"weight_name": file.path.name, "local_files_only": True})
            )
            try:
                with hushed(TEXT_ENCODERS):
                    self._base_pipes["text2img"].load_lora_weights(where, adapter_name=name, **given)
            except Exception as error:  # diffusers and PEFT raise many kinds
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise PipelineError(
                    f"style {name!r} can't be loaded into the base by diffusers ({reason}): pass base=False."
                ) from error

    def _recipes(self, settings: Mapping[str, Any]) -> dict[str, tuple[Recipe, dict[str, Any]]]:
        """What was asked for and the other recipes for this base whose files are here, each with its settings."""
        pipe = self._pipes["text2img"]
        record, now = pipe_record_of(pipe), status(pipe)
        assert record is not None, "it was accelerated just now"
        first = record.settings.policy.recipe
        found = {first.name: (first, {**settings, "recipe": first.name})}
        base = next((one for one in bases.bases() if one.name == now.base), None)
        if not self._ours or base is None:
            return found
        common = {name: value for name, value in settings.items() if name not in _OF_ONE_FILE}
        for recipe in recipes.recipes():
            own = {**common, "recipe": recipe.name, "local_files_only": True}
            if recipe.name in found or base.name not in recipe.on(base).loras:
                continue
            try:
                rehearse(pipe, **own)
            except LcmLoraError:
                continue  # not on this machine, or not for this pipe
            found[recipe.name] = recipe, own
        return found

    def _choice(self, name: str, recipe: Recipe) -> Choice:
        asked = self._settings[name][1]
        (least, most), (low, high) = recipe.within, recipe.guidance_range
        limit = asked.get("guidance", 1.0) is not None
        record = pipe_record_of(self._pipes["text2img"])
        own = record.settings.policy if record is not None and record.settings.policy.recipe.name == name else None
        guidance = (own.guidance if own else recipe.guidance) or 1.0
        return Choice(
            name,
            (least, min(most, max(_MOST_STEPS, least))),
            own.steps if own else recipe.steps,
            (max(low, 1.0), max(high, 1.0) if limit else max(high, 8.0)),
            max(guidance, low, 1.0),
        )

    # -- a call -------------------------------------------------------------------------------------------------------

    def _call(self, pipe: Any, scene: Scene, steps: int, guidance: float) -> Drawn:
        call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
        if scene.image is not None:
            call |= {"image": scene.image, "strength": scene.strength}
        elif self._asked_size:
            call |= {"width": self._asked_size[0], "height": self._asked_size[1]}
        notes = _unread(pipe, scene.prompt)
        began = time.perf_counter()
        try:
            image = pipe(scene.prompt, generator=torch.Generator().manual_seed(scene.seed), **call).images[0]
            synchronize(self._device)
        except (_Stopped, LcmLoraError):
            raise
        except Exception as error:  # diffusers and torch raise many kinds
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise CallError(f"this can't be drawn: {reason}") from error
        return Drawn(image, time.perf_counter() - began, steps, guidance, notes)


def _require_drawing(pipe: Any, settings: Mapping[str, Any]) -> Parameters:
    """What the pipe's call takes.

    Raises:
        PipelineError: it does not draw pictures from texts, or is accelerated already.
    """
    drawn = isinstance(unet_of(pipe), UNet2DConditionModel)
    takes = Parameters.of(plain(type(pipe)), "__call__") if drawn else None
    needed = [name for name, default in takes.defaults.items() if default is inspect.Parameter.empty] if takes else []
    if takes is None or "prompt" not in takes.defaults or "image" in takes.places or set(needed) - {"prompt"}:
        name = type(pipe).__name__
        raise PipelineError(f"a {name} does not draw pictures from texts: a text-to-image pipeline is expected.")
    record = pipe_record_of(pipe)
    if record is None and baked_of(pipe) is not None:
        raise PipelineError("this pipe was baked: lcmlora.accelerate(pipe) first gives it its call defaults.")
    if record is not None and not record.baked:
        raise PipelineError("this pipe is accelerated already, and the room does that: lcmlora.restore(pipe) first.")
    if record is not None and settings:
        raise PipelineError(f"this pipe was baked: there is nothing for {next(iter(settings))}= to do.")
    return takes


def _usual_size(pipe: Any) -> tuple[int, int]:
    """Width and height that a pipe draws by itself."""
    side = pipe.unet.config.sample_size
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


def _copy(pipe: Any, styles: bool) -> Any:
    """A pipe of the same parts, but those of its own that acceleration changes."""
    changed = ("unet", "scheduler", *(("text_encoder", "text_encoder_2") if styles else ()))
    own = [name for name in pipe.components if name in changed]
    return _with_bars_of(pipe, as_kind(pipe, "text2img", **{name: copy.deepcopy(getattr(pipe, name)) for name in own}))


def _with(settings: Mapping[str, Any], styles: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of `accelerate`; styles that the pipe has by itself are left alone where the room knows none."""
    return dict(settings) if styles is None else {**settings, "styles": styles}


def _with_bars_of(pipe: Any, other: Any) -> Any:
    """Another pipe, which shows a progress bar where the first does."""
    if (bars := progress_bar_config(pipe)) is not None:
        other.set_progress_bar_config(**bars)
    return other


def _of_kind(pipes: dict[str, Any], scene: Scene) -> tuple[str, Any]:
    """The pipe for scenes of this kind; of the same parts, where it is the first.

    Raises:
        PipelineError: the room was closed meanwhile, or there is no such pipe.
    """
    kind = "text2img" if scene.image is None else "img2img"
    if not pipes:
        raise PipelineError(_CLOSED)
    if kind not in pipes:
        pipes[kind] = _with_bars_of(pipes["text2img"], as_kind(pipes["text2img"], kind))
    return kind, pipes[kind]


def _unread(pipe: Any, prompt: str) -> tuple[str, ...]:
    """What the tokenizer leaves out of a prompt, in sentences."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return ()
    most, ids = tokenizer.model_max_length - 2, tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    if len(ids) <= most:
        return ()
    return (f"The prompt is too long: the model does not read {tokenizer.decode(ids[most:])!r}.",)
