"""How accelerated pipes are called in the field: rows C1 to C10 of the field cases, and others of their kinds."""

from __future__ import annotations

import copy
import inspect
import math
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

import lcmlora
from conftest import sd_pipe, sdxl_pipe, write_lora
from lcmlora.calls import Hooks, governed
from lcmlora.parameters import Parameters
from lcmlora.policy import Policy
from lcmlora.warn import warn

PICTURE = Image.new("RGB", (16, 16), "red")
MASK = Image.new("L", (16, 16), 255)


@pytest.fixture
def fast(tmp_path) -> Callable[..., Any]:
    """An accelerated pipe of a class."""

    def make(cls: type = StableDiffusionPipeline, **settings: Any) -> Any:
        pipe = sdxl_pipe(cls=cls) if issubclass(cls, XL) else sd_pipe(cls=cls)
        return lcmlora.accelerate(pipe, lora=write_lora(tmp_path / "lcm.safetensors", pipe.unet), **settings)

    return make


XL = (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline)


def passes(pipe: Any, method: str = "__call__", **arguments: Any) -> list[int]:
    """The batch size of each UNet pass of a call."""
    batches: list[int] = []
    with pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0])):
        getattr(pipe, method)(**{"prompt": "a fox", **arguments})
    return batches


def silently(pipe: Any, method: str = "__call__", **arguments: Any) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", lcmlora.LcmLoraWarning)
        return passes(pipe, method, **arguments)


def told(pipe: Any, method: str = "__call__", **arguments: Any) -> tuple[list[int], list[str]]:
    """The passes of a call and what it warned of; each warning names this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = passes(pipe, method, **arguments)
    ours = [warning for warning in caught if issubclass(warning.category, lcmlora.LcmLoraWarning)]
    assert all(warning.filename == __file__ for warning in ours)
    return batches, [str(warning.message) for warning in ours]


SMALL = {"height": 16, "width": 16, "output_type": "latent"}


class Hybrid(StableDiffusionPipeline):
    """Text to image, or image to image where a picture is given, as long-prompt-weighting pipelines do."""

    @torch.no_grad()
    def __call__(self, prompt=None, image=None, strength=0.8, num_inference_steps=50, guidance_scale=7.5, **kwargs):
        return self._draw(prompt, image, strength, num_inference_steps, guidance_scale)

    def _draw(self, prompt, image, strength, num_inference_steps, guidance_scale):
        self.scheduler.set_timesteps(num_inference_steps)
        skipped = 0 if image is None else num_inference_steps - int(num_inference_steps * strength)
        embeds, negative = self.encode_prompt(prompt, "cpu", 1, guidance_scale > 1)
        embeds = embeds if negative is None else torch.cat([negative, embeds])
        latents = torch.zeros(1, 4, 8, 8)
        for t in self.scheduler.timesteps[skipped:]:
            noise = self.unet(torch.cat([latents] * len(embeds)), t, embeds, return_dict=False)[0]
            if len(embeds) > 1:
                without, with_prompt = noise.chunk(2)
                noise = without + guidance_scale * (with_prompt - without)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


def hybrid(name: str) -> type:
    """A Hybrid whose picture has another name."""

    class Other(Hybrid):
        @torch.no_grad()
        def __call__(self, prompt=None, num_inference_steps=50, guidance_scale=7.5, **kwargs):
            return self._draw(
                prompt, kwargs.get(name), kwargs.get("strength", 0.8), num_inference_steps, guidance_scale
            )

    call = inspect.unwrap(Other.__call__)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [p for p in inspect.signature(call).parameters.values() if p.kind is not p.VAR_KEYWORD]
    extra = [inspect.Parameter(name, kind, default=None), inspect.Parameter("strength", kind, default=0.8)]
    Other.__call__.__signature__ = inspect.Signature([*parameters, *extra])
    return Other


# C1: strength counts only where there is a picture


def plainly(pipe, encode_prompt, args, kwargs):
    """No cache and no lock."""
    return encode_prompt(pipe, *args, **kwargs)


@pytest.mark.parametrize("strength", [None, 0.3, 0.05, 1.0])
@pytest.mark.parametrize("steps", [None, 2, 45])
def test_C1_strength_counts_only_with_an_image(fast, strength, steps):
    pipe = fast(Hybrid)
    arguments = {key: value for key, value in (("strength", strength), ("num_inference_steps", steps)) if value}
    batches, _ = told(pipe, **arguments)
    assert batches == [1] * (steps or 4)
    fits = min(steps or 4, int(50 * (strength or 0.8)))
    batches, _ = told(pipe, image=PICTURE, **arguments)
    assert batches == [1] * fits


@pytest.mark.parametrize("name", ["image", "init_image", "video", "frames", "source_image", "init_latents", "images"])
def test_C1_pictures_go_by_many_names(fast, name):
    pipe = fast(hybrid(name))
    assert silently(pipe, strength=0.5) == [1] * 4
    assert silently(pipe, **{name: PICTURE}, strength=0.5) == [1] * 4


def test_C1_latents_are_no_picture_where_a_picture_can_be_given(fast):
    class WithLatents(Hybrid):
        def __call__(self, prompt=None, image=None, strength=0.5, num_inference_steps=50, latents=None):
            return self._draw(prompt, image, strength, num_inference_steps, 1)

    assert silently(fast(WithLatents), latents=torch.zeros(1, 4, 8, 8)) == [1] * 4


@pytest.mark.parametrize("name", ["ip_adapter_image", "control_image", "mask_image", "style_image", "ref_image"])
def test_C1_other_pictures_are_not_what_a_call_starts_from(fast, name):
    pipe = fast(hybrid(name))
    pipe.scheduler.set_timesteps, seen = _spy(pipe.scheduler.set_timesteps)
    silently(pipe, **{name: PICTURE}, strength=0.5)
    assert seen == [4]


def _spy(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    seen: list[int] = []

    def spy(steps: int, *args: Any, **kwargs: Any) -> Any:
        seen.append(steps)
        return function(steps, *args, **kwargs)

    return spy, seen


def test_C1_a_required_picture_always_counts(fast):
    class Canvas(Hybrid):
        def __call__(self, prompt, canvas, strength=0.5, num_inference_steps=50):
            return self._draw(prompt, canvas, strength, num_inference_steps, 1)

    assert silently(fast(Canvas), canvas=PICTURE) == [1] * 4


# C2: programs that guard strength themselves


@pytest.mark.parametrize("cls", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
@pytest.mark.parametrize("enforce", [True, False])
def test_C2_a_program_that_guards_strength_works_over_its_whole_slider(fast, cls, enforce):
    pipe = fast(cls, enforce_inference_steps=enforce)
    mask = {"mask_image": MASK} if cls is StableDiffusionInpaintPipeline else {}
    for strength in (0.02, 0.03, 0.1, 0.33, 0.5, 0.99, 1.0):
        steps = 2
        if int(steps * strength) < 1:
            steps = math.ceil(1 / strength)
        batches, _ = told(pipe, image=PICTURE, **mask, strength=strength, num_inference_steps=steps)
        fit = min(steps, int(50 * strength)) if enforce else int(steps * strength)
        assert len(batches) == fit, strength


def test_C2_what_fits_is_run_with_one_warning_and_refused_when_strict(fast):
    pipe = fast(StableDiffusionImg2ImgPipeline)
    batches, messages = told(pipe, image=PICTURE, strength=0.1, num_inference_steps=10)
    assert len(batches) == 5
    assert len(messages) == 1
    assert "5 are run" in messages[0]
    assert "enforce_inference_steps=False" in messages[0]
    assert silently(pipe, image=PICTURE, strength=0.1, num_inference_steps=10) == [1] * 5
    with pytest.raises(lcmlora.CallError, match="leaves room for 5 of 50"):
        passes(fast(StableDiffusionImg2ImgPipeline, strict=True), image=PICTURE, strength=0.1, num_inference_steps=10)


@pytest.mark.parametrize("settings", [{}, {"enforce_inference_steps": False}])
def test_C2_no_step_at_all_is_refused(fast, settings):
    with pytest.raises(lcmlora.CallError, match=r"strength=0\.01"):
        passes(fast(StableDiffusionImg2ImgPipeline, **settings), image=PICTURE, strength=0.01)


def test_C2_diffusers_own_meaning_says_how_many_steps_a_strength_needs(fast):
    pipe = fast(StableDiffusionImg2ImgPipeline, enforce_inference_steps=False)
    with pytest.raises(lcmlora.CallError, match="pass 5 or more"):
        passes(pipe, image=PICTURE, strength=0.2)
    assert len(passes(pipe, image=PICTURE, strength=0.5)) == 2


def test_C2_policies_are_compared_by_value():
    assert Policy() == Policy(4, 1.0, False, True)
    assert Policy() != Policy(enforce_inference_steps=False)


# C3: public methods with the old defaults


class Methods(Hybrid):
    """A call, and methods beside it, as in lpw_stable_diffusion and interpolate_stable_diffusion."""

    def text2img(self, prompt, num_inference_steps=50, guidance_scale=7.5):
        return self(prompt=prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)

    def img2img(self, prompt, image, strength=0.8, num_inference_steps=50, guidance_scale=7.5):
        return self.__call__(prompt, image, strength, num_inference_steps, guidance_scale)

    def quick(self, prompt, steps=30, cfg=7):
        return self(prompt, num_inference_steps=steps, guidance_scale=cfg)

    def walk(self, prompt, num_inference_steps=50):
        return [self.text2img(word, num_inference_steps) for word in prompt.split()]

    def get_timesteps(self, num_inference_steps, strength):
        return num_inference_steps * strength

    @staticmethod
    def invert(num_inference_steps=50):
        return num_inference_steps


class OnlyMethods(DiffusionPipeline):
    """No call at all, as stable_diffusion_mega: methods that make a plain pipeline of its parts."""

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        safety_checker,
        feature_extractor,
        requires_safety_checker=False,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)

    def text2img(self, prompt, num_inference_steps=50, guidance_scale=7.5):
        inner = StableDiffusionPipeline(**self.components, requires_safety_checker=False)
        return inner(prompt, 16, 16, num_inference_steps, guidance_scale=guidance_scale)

    def img2img(self, prompt, image, strength=0.8, num_inference_steps=50, guidance_scale=7.5):
        inner = StableDiffusionImg2ImgPipeline(**self.components, requires_safety_checker=False)
        return inner(prompt, image, strength, num_inference_steps, guidance_scale=guidance_scale)


@pytest.mark.parametrize("cls", [Methods, OnlyMethods])
def test_C3_methods_get_the_policy_of_a_call(fast, cls):
    pipe = fast(cls)
    assert silently(pipe, "text2img") == [1] * 4
    assert silently(pipe, "text2img", num_inference_steps=3, guidance_scale=1.5) == [2] * 3
    for strength in (0.3, 0.8, 1.0):
        assert silently(pipe, "img2img", image=PICTURE, strength=strength) == [1] * 4
    batches, messages = told(pipe, "img2img", image=PICTURE, guidance_scale=7.5)
    assert batches == [2] * 4
    assert len(messages) == 1
    assert "guidance_scale=7.5" in messages[0]


def test_C3_methods_that_call_methods_that_call(fast):
    assert silently(fast(Methods), "walk", prompt="a b c") == [1] * 12


def test_C3_methods_with_other_names_for_steps_and_guidance(fast):
    pipe = fast(Methods)
    assert silently(pipe, "quick") == [1] * 4
    assert silently(pipe, "quick", steps=2, cfg=2) == [2] * 2


def test_C3_helpers_are_left_alone(fast):
    pipe = fast(Methods)
    assert pipe.get_timesteps(100, 0.5) == 50
    assert pipe.invert() == 50


# C4: calls inside calls


class CallsItself(Hybrid):
    @torch.no_grad()
    def __call__(self, prompt=None, image=None, strength=0.8, num_inference_steps=50, guidance_scale=7.5):
        if isinstance(image, list):
            return [self(prompt, one, strength, num_inference_steps, guidance_scale) for one in image]
        if prompt == "stop":
            raise KeyboardInterrupt
        return self._draw(prompt, image, strength, num_inference_steps, guidance_scale)


class TwoStages(Hybrid):
    """Draws, then refines what it drew: the steps of the second stage have not been raised for its strength yet."""

    def hires(self, prompt, num_inference_steps=50, guidance_scale=7.5):
        first = self(prompt, num_inference_steps=num_inference_steps)
        return self(prompt, first, 0.5, num_inference_steps)


class LeavesOut(Hybrid):
    def img2img(self, prompt, image, num_inference_steps=50):
        return self(prompt, image=image, strength=0.5)


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.55, 0.8])
def test_C4_a_call_inside_a_call_is_not_stretched_again(fast, strength):
    assert silently(fast(CallsItself), image=[PICTURE, PICTURE], strength=strength) == [1] * 8


def test_C4_what_a_call_inside_leaves_out_is_filled_in(fast):
    assert silently(fast(LeavesOut), "img2img", image=PICTURE) == [1] * 4


def test_C4_a_second_stage_runs_the_steps_asked_for_too(fast):
    assert silently(fast(TwoStages), "hires") == [1] * 8


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_C4_an_exception_ends_the_call_for_good(fast, error):
    pipe = fast(CallsItself)
    with pytest.raises(error):
        passes(pipe, prompt="stop" if error is KeyboardInterrupt else 7, image=[PICTURE], strength=0.5)
    assert silently(pipe, image=PICTURE, strength=0.5) == [1] * 4


def test_C4_another_pipe_called_from_a_callback_is_no_inner_call(fast, tmp_path):
    other = fast(StableDiffusionImg2ImgPipeline)
    counts: list[int] = []

    def look(pipe, step, t, values):
        if not counts:
            counts.append(len(passes(other, image=PICTURE, strength=0.5)))
        return values

    passes(fast(StableDiffusionImg2ImgPipeline), image=PICTURE, strength=0.5, callback_on_step_end=look)
    assert counts == [4]


def test_C4_each_outermost_call_is_entered_once(fast):
    entered: list[Any] = []

    class Enter:
        def __init__(self, pipe):
            entered.append(pipe)

        def __enter__(self):
            entered.append("in")

        def __exit__(self, *error):
            entered.append("out")

    pipe = sd_pipe(cls=CallsItself)
    pipe.__class__ = governed(type(pipe), Hooks(lambda pipe: Policy(), plainly, Enter, print))
    pipe("a", [PICTURE, PICTURE])
    assert entered == [pipe, "in", "out"]


def test_C4_threads_have_their_own_calls(fast):
    pipe = sd_pipe(cls=Hybrid)
    pipe.__class__ = governed(type(pipe), Hooks(lambda pipe: Policy(), plainly, nullcontext, print))
    seen: list[int] = []
    draw = Hybrid._draw

    def inner(self, prompt, image, strength, steps, guidance):
        seen.append(steps)
        if prompt == "outer":
            thread = threading.Thread(target=pipe, args=("inner", PICTURE, 0.5))
            thread.start()
            thread.join()

    Hybrid._draw = inner
    try:
        pipe("outer", PICTURE, 0.5)
    finally:
        Hybrid._draw = draw
    assert seen == [8, 8]


# C5: numbers of other kinds


NUMBERS = [4, np.int64(4), np.uint8(4), torch.tensor(4), np.array(4)]
GUIDANCES = [1.5, np.float32(1.5), np.float64(1.5), np.array(1.5), torch.tensor(1.5), torch.tensor(1.5).half()]


@pytest.mark.parametrize("steps", NUMBERS, ids=repr)
def test_C5_whole_numbers_of_any_kind(fast, steps):
    pipe = fast()
    pipe.scheduler.set_timesteps, seen = _spy(pipe.scheduler.set_timesteps)
    assert silently(pipe, **SMALL, num_inference_steps=steps) == [1] * 4
    assert [type(number) for number in seen] == [int]
    assert lcmlora.status(fast(steps=steps)).steps == 4


@pytest.mark.parametrize("guidance", GUIDANCES, ids=repr)
def test_C5_guidance_of_any_kind(fast, guidance):
    pipe = fast()
    assert silently(pipe, **SMALL, guidance_scale=guidance) == [2] * 4
    assert type(pipe.guidance_scale) is float
    assert type(lcmlora.status(fast(guidance=guidance)).guidance) is float


@pytest.mark.parametrize("strength", [np.float32(0.5), torch.tensor(0.5), np.float64(0.5)], ids=repr)
def test_C5_strength_of_any_kind(fast, strength):
    assert silently(fast(StableDiffusionImg2ImgPipeline), image=PICTURE, strength=strength) == [1] * 4


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), torch.tensor(True), "4", 4.0, 2.5, np.float32(4), [4]], ids=repr
)
def test_C5_what_is_no_whole_number_is_refused(fast, value):
    with pytest.raises(lcmlora.CallError, match="whole numbers"):
        passes(fast(), **SMALL, num_inference_steps=value)


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), "1.5", float("nan"), {}, 1j], ids=repr)
def test_C5_what_is_no_guidance_is_refused(fast, value):
    with pytest.raises(lcmlora.CallError, match="a number from 1 to 2"):
        passes(fast(), **SMALL, guidance_scale=value)


@pytest.mark.parametrize("none", ["num_inference_steps", "guidance_scale"])
def test_C5_none_counts_as_not_given(fast, none):
    assert silently(fast(), **SMALL, **{none: None}) == [1] * 4


class PerPrompt(Hybrid):
    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=50, guidance_scale=7.5):
        self.seen = guidance_scale
        return self._draw(prompt, None, 1, num_inference_steps, 1)


@pytest.mark.parametrize(
    ("given", "used"),
    [([0.5, 1.5, None, 7.5], [1.0, 1.5, None, 2.0]), ((1.5, [3]), (1.5, [2.0])), (np.array([1, 4]), np.array([1, 2]))],
    ids=repr,
)
def test_C5_several_guidances_are_kept_within_the_range_one_by_one(fast, given, used):
    pipe = fast(PerPrompt)
    _, messages = told(pipe, guidance_scale=given)
    assert len(messages) == 1
    assert type(pipe.seen) is type(used)
    np.testing.assert_equal(pipe.seen, used)


# C6: what programs ask of a pipe


@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionXLPipeline, Hybrid, PerPrompt, CallsItself])
def test_C6_a_pipe_answers_as_a_plain_one(fast, cls):
    pipe = fast(cls)
    assert inspect.getfullargspec(pipe.__call__.__wrapped__) == inspect.getfullargspec(cls.__call__.__wrapped__)
    assert inspect.unwrap(pipe.__call__) is inspect.unwrap(cls.__call__)
    assert inspect.signature(pipe.__call__) == inspect.signature(cls.__call__.__get__(pipe))
    assert inspect.getsource(pipe.__call__) == inspect.getsource(cls.__call__)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(pipe), name) == getattr(cls, name)
        assert getattr(pipe.__call__, name) == getattr(cls.__call__, name)


def test_C6_an_undecorated_call_shows_its_own_arguments(fast):
    class Bare(Hybrid):
        def __call__(self, prompt=None, num_inference_steps=50):
            return self._draw(prompt, None, 1, num_inference_steps, 1)

    pipe = fast(Bare)
    assert inspect.getfullargspec(pipe.__call__).args == ["self", "prompt", "num_inference_steps"]
    assert inspect.getfullargspec(pipe.__call__.__wrapped__).args == ["self", "prompt", "num_inference_steps"]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_C6_a_copy_is_called_as_the_pipe_is(fast, duplicate):
    pipe = fast(steps=3)
    twin = duplicate(pipe)
    assert isinstance(twin, StableDiffusionPipeline)
    assert type(twin) is not type(pipe)
    assert silently(twin, **SMALL) == [1] * 3


def test_C6_from_pipe_goes_on_working(fast):
    assert type(AutoPipelineForImage2Image.from_pipe(fast())) is StableDiffusionImg2ImgPipeline


def test_C6_positional_arguments_stay_positional(fast):
    class Picky(Hybrid):
        def __call__(self, *args, **kwargs):
            self.seen = args, set(kwargs)
            return super().__call__(*args, **kwargs)

    pipe = fast(Picky)
    pipe("a fox", None, 0.8, 2)
    assert pipe.seen == (("a fox", None, 0.8, 2), {"guidance_scale"})


# C7: arguments that vanish, and arguments without effect


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [
        ("num_inference_step", 2, "num_inference_steps"),
        ("guidance", 1.8, "guidance_scale"),
        ("cfg_scale", 1.8, "guidance_scale"),
        ("steps", 2, "num_inference_steps"),
        ("neg_prompt", "blur", "negative_prompt"),
        ("zzzzzzzz", 2, None),
    ],
)
@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_C7_an_unknown_argument_is_told_once_with_the_name_that_is_meant(fast, cls, name, value, near):
    pipe = fast(cls)
    _, messages = told(pipe, **SMALL, **{name: value})
    assert len(messages) == 1
    assert messages[0].startswith(f"{name}: {cls.__name__} names no such argument")
    assert messages[0].endswith(f"Is {near} meant?" if near else "effect.")
    silently(pipe, **SMALL, **{name: value})


def test_C7_names_that_a_pipeline_looks_up_are_known(fast):
    assert silently(fast(), **SMALL, callback=None, callback_steps=None) == [1] * 4


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["image", "mask_image", "strength"])
@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_C7_a_picture_given_to_text_to_image_is_told(fast, cls, name, strict):
    pipe = lcmlora.accelerate(fast(cls), strict=strict)
    _, messages = told(pipe, **SMALL, **{name: 0.5 if name == "strength" else Image.new("RGB", (16, 16))})
    assert len(messages) == 1
    assert messages[0].startswith(f"{name}: {cls.__name__} names no such argument")
    assert "AutoPipelineForImage2Image" in messages[0]


class LooksUp(StableDiffusionPipeline):
    def __call__(self, prompt=None, num_inference_steps=50, **kwargs):
        """The names in this text are no arguments: kwargs["documented"]
        and text at the margin is none of the code."""
        popped, got = kwargs.pop("popped", None), kwargs.get("got")
        one = kwargs["one"] if "asked" in kwargs and "denied" not in kwargs else None
        kwargs.setdefault("set", (popped, got, one))
        return super().__call__(prompt, num_inference_steps=num_inference_steps, **kwargs)

    def elsewhere(self, other, **kwargs):
        return kwargs.pop("in_another_method")


class HandsOn(LooksUp):
    def __call__(self, prompt=None, num_inference_steps=50, **kwargs):
        return self.elsewhere(prompt, **kwargs)


class Loops(LooksUp):
    def __call__(self, prompt=None, num_inference_steps=50, **kwargs):
        return [kwargs.pop(name) for name in ("looped",)]


@pytest.mark.parametrize(
    ("cls", "unknown"),
    [
        (LooksUp, {"documented", "other", "in_another_method", "zzz"}),
        (HandsOn, {"documented", "zzz"}),  # whatever a method or a text of the class names may be meant
        (Loops, {"documented", "zzz"}),
    ],
)
def test_C7_what_a_call_looks_up_in_its_open_arguments_is_known(cls, unknown):
    takes = Parameters.of(cls, "__call__")
    looked_up = {"looped"} if cls is Loops else {"popped", "got", "one", "asked", "denied", "set", "callback"}
    above = {"negative_prompt", "guidance_scale"}
    others = {"documented", "other", "in_another_method", "zzz"}
    assert {name for name, _ in takes.unknown({*looked_up, *above, *others})} == unknown


def test_C7_without_its_source_a_class_is_trusted():
    space: dict = {"Above": StableDiffusionPipeline}
    exec("class Typed(Above):\n    def __call__(self, steps=4, **kwargs):\n        return kwargs.pop('a'), 'b'", space)
    assert {name for name, _ in Parameters.of(space["Typed"], "__call__").unknown(["a", "b", "zzz"])} == {"zzz"}


def test_C7_arguments_handed_on_to_the_class_above_are_known(fast):
    class Above(StableDiffusionPipeline):
        def __call__(self, prompt, **kwargs):
            return super().__call__(prompt, **kwargs)

    pipe = fast(Above)
    assert silently(pipe, **SMALL) == [1] * 4
    assert silently(pipe, **SMALL, num_inference_steps=2, guidance_scale=1.5) == [2] * 2
    _, messages = told(pipe, **SMALL, guidance=2)
    assert len(messages) == 1


def test_C7_a_pipeline_without_open_arguments_raises_as_plain(fast):
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_inference_step'"):
        passes(fast(CallsItself), num_inference_step=2)
    with pytest.raises(TypeError, match="multiple values"):
        fast()("a fox", prompt="a fox")


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("guidance_rescale", 0.7, 0.0),
        ("eta", 0.5, 0.0),
        ("negative_prompt", "blur", ""),
        ("negative_prompt", ["blur"], [""]),
        ("negative_prompt_2", "blur", None),
        ("negative_original_size", (8, 8), None),
        ("negative_crops_coords_top_left", (8, 0), (0, 0)),
    ],
)
def test_C7_arguments_without_effect_are_told_once(fast, name, value, default):
    pipe = fast(StableDiffusionXLPipeline)
    assert silently(pipe, **SMALL, **{name: default}) == [1] * 4
    _, messages = told(pipe, **SMALL, **{name: value})
    assert len(messages) == 1
    assert messages[0].startswith(f"{name} has no effect")
    silently(pipe, **SMALL, **{name: value})


def test_C7_with_guidance_they_have_an_effect(fast):
    pipe = fast(StableDiffusionXLPipeline)
    assert silently(pipe, **SMALL, guidance_scale=1.5, guidance_rescale=0.7, negative_prompt="blur") == [2] * 4


# C8: pipelines that can't do without guidance


class Broken(Hybrid):
    """Fails in one of the ways of pipelines that look for the unconditional half of the batch."""

    fault: Callable[[torch.Tensor, Any], Any]

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=50, guidance_scale=7.5, callback=None):
        embeds, negative = self.encode_prompt(prompt, "cpu", 1, guidance_scale > 1)
        batch = embeds if negative is None else torch.cat([negative, embeds])
        noise = self.unet(torch.zeros(len(batch), 4, 8, 8), 999, batch, return_dict=False)[0]
        if callback:
            callback()
        type(self).fault(noise, negative)


def unpacks(noise, negative):
    without, with_prompt = noise.chunk(2)
    return without + with_prompt


FAULTS = {
    "cat": lambda noise, negative: torch.cat([negative, negative]),
    "index": lambda noise, negative: noise[1],
    "chunk": lambda noise, negative: noise.chunk(2)[1],
    "list": lambda noise, negative: list(noise)[1],
    "unpack": unpacks,
    "attribute": lambda noise, negative: negative.shape,
    "subscript": lambda noise, negative: negative[0],
    "arithmetic": lambda noise, negative: negative * 2,
    "view": lambda noise, negative: noise.view(2, 1, 4, 8, 8),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_C8_the_message_names_guidance_and_the_cause(fast, fault):
    pipe = fast(type("Broken", (Broken,), {"fault": FAULTS[fault], "__module__": __name__}))
    with pytest.raises(lcmlora.CallError, match=r"may need .* guidance.*guidance=1\.5") as raised:
        passes(pipe)
    assert str(raised.value.__cause__) in str(raised.value)
    assert passes(pipe, guidance_scale=1.5) == [2]


class Checks(Hybrid):
    def __call__(self, prompt=None, num_inference_steps=50, guidance_scale=7.5):
        self.check_mask(None)

    def check_mask(self, mask):
        raise TypeError(f"the mask is {type(mask).__name__}")


def test_C8_the_callers_own_faults_are_not_explained_away(fast):
    pipe = fast(type("Broken", (Broken,), {"fault": lambda noise, negative: None, "__module__": __name__}))

    def callback():
        return {}.get("mine")[0]

    with pytest.raises(TypeError, match="not subscriptable"):
        passes(pipe, callback=callback)
    with pytest.raises(TypeError, match="the mask is NoneType"):
        passes(fast(Checks))
    with pytest.raises(ValueError, match="Provide either `prompt`") as raised:
        passes(fast(), prompt=None)
    assert not isinstance(raised.value, lcmlora.CallError)
    with pytest.raises(ValueError, match="incorrect format") as raised:
        passes(fast(StableDiffusionInpaintPipeline), image=PICTURE, mask_image=None)
    assert not isinstance(raised.value, lcmlora.CallError)


def test_C8_a_pipe_that_ran_without_guidance_can_do_without(fast):
    class Sometimes(Broken):
        @staticmethod
        def fault(noise, negative):
            if noise.shape[0] == 1 and Sometimes.broken:
                raise IndexError("tuple index out of range")

    Sometimes.broken = False
    pipe = fast(Sometimes)
    passes(pipe)
    Sometimes.broken = True
    with pytest.raises(IndexError):
        passes(pipe)


# C9: arguments that LCMScheduler has not, steps by other names, methods only


class VarianceNoise(Hybrid):
    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=50, guidance_scale=7.5):
        for t in self.scheduler.timesteps:
            if t:
                self.scheduler.step(None, t, None, variance_noise=None)


class ReadsSigmas(Hybrid):
    def __call__(self, prompt=None, num_inference_steps=50):
        return self.scheduler.sigmas[0]


class HelpedSigmas(Hybrid):
    def __call__(self, prompt=None, num_inference_steps=50):
        return self._sigmas()

    def _sigmas(self):
        return self.scheduler.sigmas[0]


class NoSteps(StableDiffusionPipeline):
    def __call__(self, prompt=None):
        return prompt


class FixedSteps(StableDiffusionPipeline):
    def __call__(self, prompt=None, **kwargs):
        return super().__call__(prompt, num_inference_steps=30, **kwargs)


class DefaultsOfItsOwn(StableDiffusionPipeline):
    def __call__(self, prompt=None, **kwargs):
        kwargs.setdefault("num_inference_steps", 30)
        return super().__call__(prompt, **kwargs)


class HandsEverythingOn(StableDiffusionPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (NoSteps, "takes no num_inference_steps, neither in its call nor"),
        (FixedSteps, "takes no num_inference_steps, neither in its call nor"),
        (type("SdeDragPipeline", (Hybrid,), {}), "a sampler of its own"),
        (type("Mine", (type("StableDiffusionHDPainterPipeline", (Hybrid,), {}),), {}), "variance_noise"),
    ],
)
def test_C9_what_lcm_cannot_drive_is_refused_by_name(fast, cls, words):
    with pytest.raises(lcmlora.PipelineError, match=f"^{cls.__name__}.*{words}"):
        fast(cls)


@pytest.mark.parametrize(
    ("cls", "name"), [(VarianceNoise, "variance_noise"), (ReadsSigmas, "sigmas"), (HelpedSigmas, "sigmas")]
)
def test_C9_what_only_a_call_shows_is_told_then(fast, cls, name):
    pipe = fast(cls)
    pipe.scheduler.set_timesteps(4)
    with pytest.raises(lcmlora.CallError, match=f"{name}.*{cls.__name__} asks of its scheduler what LCMScheduler has"):
        passes(pipe)


@pytest.mark.parametrize("call", [DefaultsOfItsOwn, HandsEverythingOn])
def test_C9_steps_that_only_the_class_above_names(fast, call):
    assert silently(fast(call), **SMALL) == [1] * 4
    assert silently(fast(call), **SMALL, num_inference_steps=2, guidance_scale=1.5) == [2] * 2


@pytest.mark.parametrize("name", ["steps", "num_steps", "ddim_steps"])
def test_C9_steps_by_another_name(fast, name):
    class Steps(Hybrid):
        @torch.no_grad()
        def __call__(self, prompt=None, guidance_scale=7.5, **kwargs):
            return self._draw(prompt, None, 1, kwargs.get(name, 50), guidance_scale)

    parameters = list(inspect.signature(Steps.__call__).parameters.values())[:-1]
    steps = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=50)
    Steps.__call__.__signature__ = inspect.Signature([*parameters, steps])
    pipe = fast(Steps)
    assert silently(pipe) == [1] * 4
    assert silently(pipe, **{name: 2}) == [1] * 2
    with pytest.raises(lcmlora.CallError, match=f"{name}=51"):
        passes(pipe, **{name: 51})


# C10: further guidance arguments


class Tiles(Hybrid):
    @torch.no_grad()
    def __call__(
        self, prompt=None, num_inference_steps=50, guidance_scale=7.5, guidance_scale_tiles=None, pag_scale=3.0
    ):
        self.seen = guidance_scale_tiles, pag_scale
        return self._draw(prompt, None, 1, num_inference_steps, guidance_scale)


class TrueGuidance(Hybrid):
    @torch.no_grad()
    def __call__(
        self,
        prompt=None,
        num_inference_steps=50,
        guidance_scale=3.5,
        true_guidance_scale=4.0,
        image_guidance_scale=1.5,
        control_guidance_start=0.0,
    ):
        self.seen = true_guidance_scale, image_guidance_scale
        return self._draw(prompt, None, 1, num_inference_steps, guidance_scale)


def test_C10_guidance_of_tiles_is_clamped_like_guidance(fast):
    pipe = fast(Tiles)
    _, messages = told(pipe, guidance_scale=1.5, guidance_scale_tiles=[[7.5, None], [1.2, 0]], pag_scale=6.0)
    assert len(messages) == 1
    assert "guidance_scale_tiles=7.5" in messages[0]
    assert pipe.seen == ([[2.0, None], [1.2, 1.0]], 6.0)
    silently(pipe, guidance_scale=1.5, guidance_scale_tiles=None)
    _, messages = told(pipe, guidance_scale_tiles=[[1.5]])
    assert len(messages) == 1
    assert "guidance_scale_tiles has no effect at guidance_scale 1" in messages[0]


def test_C10_a_second_guidance_with_an_old_default_is_brought_down(fast):
    pipe = fast(TrueGuidance)
    silently(pipe)
    assert pipe.seen == (1.0, 1.5)
    _, messages = told(pipe, true_guidance_scale=5.0, guidance_scale=1.5, image_guidance_scale=4.0)
    assert len(messages) == 1
    assert "true_guidance_scale=5" in messages[0]
    assert pipe.seen == (2.0, 4.0)


def test_C10_strict_and_none_hold_for_them_too(fast):
    with pytest.raises(lcmlora.CallError, match=r"guidance_scale_tiles=7\.5 burns"):
        passes(fast(Tiles, strict=True), guidance_scale_tiles=[[7.5]])
    pipe = fast(TrueGuidance, guidance=None)
    silently(pipe)
    assert pipe.seen == (4.0, 1.5)


# E5, and where warnings point


@pytest.mark.parametrize("guidance", [0, 0.5, 1, np.float32(0)])
def test_E5_guidance_off_is_accepted_as_a_default(fast, guidance):
    assert silently(fast(guidance=guidance), **SMALL) == [1] * 4


@pytest.mark.parametrize("guidance", [-1, 2.5, "1", float("nan"), True])
def test_E5_guidance_that_no_call_could_use_is_refused(fast, guidance):
    with pytest.raises(lcmlora.CallError, match="1 to 2"):
        fast(guidance=guidance)


@pytest.mark.parametrize(
    ("module", "skipped"),
    [
        ("torch.utils._contextlib", True),
        ("lcmlora.plan", True),
        ("diffusers_modules.local.lpw", True),
        ("my_torch_app", False),
        ("torchvision_tools.app", False),
        ("lcmlora_server", False),
    ],
)
def test_warnings_point_to_the_users_file(module, skipped):
    namespace = {"__name__": module, "warn": warn}
    exec(compile("def between():\n    warn('hear')", f"{module}.py", "exec"), namespace)
    with pytest.warns(lcmlora.LcmLoraWarning, match="hear") as caught:
        namespace["between"]()
    assert caught[0].filename == (__file__ if skipped else f"{module}.py")
