"""What a pipeline's method takes, found once: which of its parameters are steps, guidance, strength and pictures."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, ParamSpec, TypeVar

import numpy as np
import torch
from PIL import Image

from .errors import CallError, brief, near_match

P = ParamSpec("P")
T = TypeVar("T")
_STEPS = ("num_inference_steps", "steps", "num_steps", "inference_steps", "sampling_steps", "ddim_steps")
_STRENGTH = ("strength", "noise_strength", "denoising_strength", "denoise_strength")
_GUIDANCE = ("guidance_scale", "true_guidance_scale", "true_cfg_scale", "cfg_scale", "text_guidance_scale")
_MORE_GUIDANCE = re.compile(r"((true|text|prompt|max|min)_)?(guidance|cfg)(_scales?)?(_(tiles?|regions?|text|\d+))?")
"""Classifier-free guidance by other names. `image_guidance_scale`, `pag_scale`, `clip_guidance_scale` and their like
are other things: docs/pitfalls.md says which."""
_PICTURE = re.compile(
    r"((init|initial|input|source|src|original|content|base|start)_)?(image|img|picture|video|frame)s?(_latents?)?"
    r"|(init|initial|input|source|original)_latents?"
)
"""Names of what image-to-image starts from."""
_OTHER_PICTURE = re.compile(r"mask|control|adapter|example|style|ref|embed|pose|depth|latent|generator")
_STRENGTH_OF_ANOTHER_KIND = {"AnimateDiffImgToVideoPipeline"}
"""Pipelines whose strength blends latents and leaves the number of steps alone; no structure tells."""


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of one method of a pipeline, `self` left out.

    Attributes:
        owner: the pipeline's class name.
        places: where those stand that may be given by position.
        defaults: every one's default, `inspect.Parameter.empty` where it must be given.
        open: whether arguments of any other name are taken.
        read: where arguments of any other name are taken, those that it looks up in its `**kwargs`; where these go on
            to something else, every string in the code of the class.
        steps, guidance, strength: their names here, None where there is none.
        more_guidance: further arguments that are classifier-free guidance.
        pictures: what a strength counts for, where one of them is given.
    """

    owner: str
    places: Mapping[str, int]
    defaults: Mapping[str, Any]
    open: bool
    read: frozenset[str]
    steps: str | None
    guidance: str | None
    strength: str | None
    more_guidance: tuple[str, ...]
    pictures: tuple[str, ...]

    @classmethod
    def of(cls, pipeline: type, name: str) -> Parameters:
        """Those of a class's method. One that hands `**kwargs` on to the class above takes that one's, too."""
        functions = _chain(pipeline, name)
        chain = [list(inspect.signature(function).parameters.values())[1:] for function in functions]
        kinds = [{parameter.kind for parameter in parameters} for parameters in chain]
        found = {p.name: p for parameters in reversed(chain) for p in parameters}
        fixed = _fixed(code_of(functions[0])) - {p.name for p in chain[0]}
        found = {p.name: p for p in [*chain[0], *found.values()] if p.kind not in _VARIADIC and p.name not in fixed}
        first = found.values() if inspect.Parameter.VAR_POSITIONAL in kinds[0] else chain[0]
        by_place = [p.name for p in first if p.kind not in (*_VARIADIC, p.KEYWORD_ONLY)]
        guidance = _first(_GUIDANCE, found)
        more = [key for key in found if key != guidance and (key in _GUIDANCE or _MORE_GUIDANCE.fullmatch(key))]
        is_open = inspect.Parameter.VAR_KEYWORD in kinds[-1]
        other_strength = pipeline.__name__ in _STRENGTH_OF_ANOTHER_KIND
        return cls(
            owner=pipeline.__name__,
            places={key: place for place, key in enumerate(by_place)},
            defaults={key: parameter.default for key, parameter in found.items()},
            open=is_open,
            read=_read(pipeline, functions) if is_open else frozenset(),
            steps=_first(_STEPS, found),
            guidance=guidance,
            strength=None if other_strength else _first(_STRENGTH, found),
            more_guidance=tuple(more),
            pictures=tuple(key for key in found if _PICTURE.fullmatch(key)),
        )

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """What a call gives, by name; None where the arguments do not fit."""
        given = dict(zip(self.places, args, strict=False))
        misfit = len(args) > len(self.places) or not given.keys().isdisjoint(kwargs)
        if misfit or not (self.open or kwargs.keys() <= self.defaults.keys()):
            return None
        return given | kwargs

    def replaced(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], changes: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments with changes. What was positional stays so: a decorator may look for names."""
        positional, named = list(args), dict(kwargs)
        for name, value in changes.items():
            place = self.places.get(name, len(args))
            if place < len(args):
                positional[place] = value
            else:
                named[name] = value
        return tuple(positional), named

    def strength_of(self, given: Mapping[str, Any]) -> float | None:
        """The strength that decides how many of the steps run; None where none does."""
        if not self.strength or is_split(given.get("denoising_start")):  # the latter stands in strength's place
            return None
        try:
            strength = float(given.get(self.strength, self.defaults[self.strength]))
        except (TypeError, ValueError):  # None, or lists of a pipeline's own
            return None
        return strength if self._starts_from_picture(given) else None

    def _starts_from_picture(self, given: Mapping[str, Any]) -> bool:
        if any(given.get(name) is not None for name in self.pictures):
            return True
        if any("image" in name for name in self.pictures):
            return False
        if given.get("latents") is not None:  # AnimateDiff's video to video takes them in the video's place
            return True
        return not self.pictures and any(
            _is_picture(value) for name, value in given.items() if not _OTHER_PICTURE.search(name)
        )

    def numbers(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a call's arguments that are steps, sizes, guidance and strength, as plain numbers.

        Raises:
            CallError: one that no call could use.
        """
        found: dict[str, Any] = {}
        for name in given.keys() & {self.steps, "width", "height", self.guidance, self.strength}:
            value = given[name]
            if name in (self.steps, "width", "height"):
                found[name] = None if value is None else whole(name, value, of=1 if name == self.steps else 8)
            elif value is not None and not isinstance(value, list | tuple | Mapping):  # one for each region or prompt
                number = as_weight(value)
                if number is None or not math.isfinite(number) or (name == self.strength and not 0 <= number <= 1):
                    limits = " from 0 to 1" * (name == self.strength)
                    raise CallError(f"{name}={brief(value)}: a number{limits} is expected.")
                found[name] = number
        return found

    def unknown(self, given: Iterable[str], also: Iterable[str] = ()) -> Iterable[tuple[str, str]]:
        """Arguments that the method does not take, each with the name that may be meant, or "".

        `also`: names that the caller understands beside the method's.
        """
        for name in sorted(set(given) - self.defaults.keys() - self.read):
            near = [key for key in (self.steps, self.guidance) if key and name in key]
            yield name, near[0] if near else near_match(name, (*also, *self.defaults))

    def refuse(self, name: str, near: str) -> NoReturn:
        """Say that the method takes no argument of that name.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"{self.owner}'s call takes no argument {name!r}.{meant(name, near)}")


def as_weight(value: Any) -> float | None:
    """A number as a plain float, numpy's and torch's too; None for everything else."""
    if isinstance(value, bool | str | bytes | Mapping) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # an array or tensor of several numbers
        return None


def whole(name: str, value: Any, least: int = 1, of: int = 1) -> int:
    """A whole number, numpy's and torch's too, as a plain one.

    Raises:
        CallError: it is none, is below `least`, no multiple of `of`, or too large for any seed.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = -1
    if not least <= number < 2**63 or number % of:
        multiple = f", a multiple of {of}," if of > 1 else f" from {least}"
        raise CallError(f"{name}={brief(value)}: a whole number{multiple} is expected.")
    return number


def is_text(value: Any) -> bool:
    """Whether a tokenizer takes a value: a string, without the halves of characters that a wrong encoding leaves."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def refuse(name: str, owner: str, near: str) -> NoReturn:
    """Say that there is no argument of that name.

    Raises:
        TypeError: always.
    """
    raise TypeError(f"{owner} takes no argument {name!r}.{f' Is {near} meant?' if near else ''}")


def meant(name: str, near: str) -> str:
    """What to say after an argument that a pipe's call does not take: the name that may be meant, or who takes it."""
    of_pictures = name in (*_STRENGTH, "mask", "mask_image") or _PICTURE.fullmatch(name)
    if of_pictures and "image" not in near:
        return " An image-to-image or inpainting pipeline does: diffusers.AutoPipelineForImage2Image.from_pipe(pipe)."
    return f" Is {near} meant?" if near else ""


def spelled(elsewhere: Mapping[str, str]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Have a verb say which of its arguments a wrong name may stand for.

    Args:
        elsewhere: other names that may be tried, each with what to type in its place.
    """

    def give(verb: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(verb)
        def called(*args: P.args, **kwargs: P.kwargs) -> T:
            _check_spelling(verb.__name__, signature, kwargs, elsewhere)
            return verb(*args, **kwargs)

        signature = inspect.signature(verb)
        return called

    return give


def _check_spelling(
    owner: str, signature: inspect.Signature, given: Mapping[str, Any], elsewhere: Mapping[str, str]
) -> None:
    for name in given.keys() - signature.parameters.keys():
        refuse(name, owner, elsewhere.get(name) or near_match(name, signature.parameters))


def block_of(
    verb: Callable[P, T], elsewhere: Mapping[str, str]
) -> Callable[[Callable[..., Iterator[Any]]], Callable[P, AbstractContextManager[T]]]:
    """Make a context manager of a generator that takes the arguments of a verb. Others are refused at the call, as
    `spelled` does.
    """

    def give(generator: Callable[..., Iterator[Any]]) -> Callable[P, AbstractContextManager[T]]:
        @functools.wraps(generator)
        def block(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
            _check_spelling(generator.__name__, signature, kwargs, elsewhere)
            signature.bind(*args, **kwargs)
            return contextmanager(generator)(*args, **kwargs)

        signature = inspect.signature(verb)
        block.__signature__ = signature.replace(return_annotation="AbstractContextManager[T]")  # type: ignore[attr-defined]
        return block

    return give


def is_split(value: Any) -> bool:
    """Whether diffusers takes a value for a place to split at (pipeline_..._xl_img2img.py, denoising_value_valid)."""
    return isinstance(value, float) and 0 < value < 1


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _chain(pipeline: type, name: str) -> list[Any]:
    """A class's method, and those of the classes above that it hands its `**kwargs` to through `super()`."""
    chain: list[Any] = []
    for function in (vars(cls)[name] for cls in pipeline.__mro__ if name in vars(cls)):
        chain.append(function)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
        if not open_ended or name not in code_of(function).co_names:
            break
    return chain


def code_of(function: Any) -> Any:
    """The code of a function, decorators seen through."""
    return inspect.unwrap(function).__code__


def _read(pipeline: type, functions: Iterable[Any]) -> frozenset[str]:
    """The names that functions look up in their `**kwargs`. Where one hands these on, all that its class may know."""
    found = [_looked_up(inspect.unwrap(function)) for function in functions]
    return _strings(pipeline) if None in found else frozenset().union(*(names for names in found if names))


@functools.lru_cache(maxsize=256)
def _looked_up(function: Any) -> frozenset[str] | None:
    """The names that a function looks up in its `**kwargs`, by its source; None where that can't be told."""
    try:
        source = inspect.getsource(function)
        tree = ast.parse(f"if 1:\n{source}" if source[:1].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return None
    kinds = inspect.signature(function).parameters.values()
    kwargs = next((parameter.name for parameter in kinds if parameter.kind is parameter.VAR_KEYWORD), None)
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == kwargs]
    found = [_key_of(use, above, function.__name__) for use in uses]
    return None if None in found else frozenset(name for name in found if name)


def _key_of(use: ast.Name, above: Mapping[ast.AST, ast.AST], method: str) -> str | None:
    """The name that `kwargs` is asked for in one place; "" where it goes to the same method of the class above."""
    node = above[use]
    match node, above[node]:
        case ast.Attribute(attr="pop" | "get" | "setdefault"), ast.Call(args=[ast.Constant(str(name)), *_]):
            return name
        case ast.Subscript(slice=ast.Constant(str(name))), _:
            return name
        case ast.Compare(left=ast.Constant(str(name)), ops=[ast.In() | ast.NotIn()]), _:
            return name
        case ast.keyword(arg=None), ast.Call(func=ast.Attribute(value=ast.Call(func=ast.Name("super")), attr=called)):
            return "" if called == method else None
    return None


def _strings(pipeline: type) -> frozenset[str]:
    """Every parameter's name and every string constant in the code of a class and of those above it."""
    functions = [value for cls in pipeline.__mro__ for value in vars(cls).values() if inspect.isfunction(value)]
    codes = [code_of(function) for function in functions]
    taken = {name for code in codes for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
    return frozenset(taken.union(*map(_constants, codes)))


def _constants(code: Any) -> set[str]:
    nested = [one for constant in code.co_consts for one in (constant if isinstance(constant, tuple) else (constant,))]
    return {text for text in nested if isinstance(text, str)}


def _fixed(code: Any) -> set[str]:
    """Names that a method may pass on with values of its own, `super().__call__(num_inference_steps=30, **kwargs)`:
    given once more, they are a TypeError. Not so where it asks whether they are given.
    """
    return set() if {"setdefault", "pop", "get", "update"} & set(code.co_names) else _constants(code)


def _first(names: Iterable[str], found: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in found), None)


def _is_picture(value: Any) -> bool:
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim > 2)
