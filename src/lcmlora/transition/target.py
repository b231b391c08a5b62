"""What a pipe shall be: what the caller of `accelerate` says, and what stays as it is where nothing is said."""

from __future__ import annotations

import dataclasses
import enum
import math
import operator
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard

from torch import nn

from .. import base as bases
from .. import recipe as recipes
from .. import vae as vaes
from ..calls import Policy
from ..compiling import Compile
from ..errors import BaseModelError, CallError, PipelineError, brief
from ..lora.merge import Weight
from ..lora.originals import KEEPS, Keep
from ..lora.sources import Given, HubOptions, Source, not_a_source
from ..parameters import as_weight

LCM = "lcmlora_lcm"
"""The name of our own adapter where `adapter_name` gives no other. Styles have the names they are given."""
Fuse = Literal["auto", True, False]
"""Whether LoRAs are merged into the weights: wherever that is possible, always, or never."""


class Unset(enum.Enum):
    """An argument that was left out: what is stays as it is; on a pipe that is not accelerated, the default counts."""

    UNSET = "as it is"

    def __repr__(self) -> str:
        return "UNSET"


UNSET = Unset.UNSET


@dataclasses.dataclass(frozen=True)
class Style:
    """A style LoRA and how strongly it counts. Two styles are equal if they come from one place at one weight.

    Args:
        source: a safetensors file, a folder, a repository of the hub, or a dict of tensors.
        weight: what its change of the weights is multiplied with; 1 is as trained, 0.8 leaves LCM room (LCM-LoRA
            report).
        weight_name: the file's name in the repository or folder, if it is not `pytorch_lora_weights.safetensors`.
        subfolder: the folder inside the repository or folder.
        revision: the repository's branch, tag or commit.

    Raises:
        LoraFileError: the source is nothing that a LoRA can be given as.
    """

    source: Given = dataclasses.field(compare=False, repr=False)
    weight: float = 0.8
    weight_name: str | None = dataclasses.field(default=None, compare=False, repr=False)
    subfolder: str | None = dataclasses.field(default=None, compare=False, repr=False)
    revision: str | None = dataclasses.field(default=None, compare=False, repr=False)
    origin: Source = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.source is None:  # for an LCM-LoRA None is the base's own
            raise not_a_source(None)
        origin = Source.of(self.source, self.weight_name, self.subfolder, self.revision)
        object.__setattr__(self, "origin", origin)

    @staticmethod
    def of(source: Given | Style) -> Style:
        """A source alone stands for the style at its usual weight.

        Raises:
            LoraFileError: it is nothing that a LoRA can be given as.
        """
        return source if isinstance(source, Style) else Style(source)


Strength = float | Mapping[str, tuple[float, float]]
"""A style's weight; where it is not the same everywhere, the least and the greatest of each component."""
Wanted = Strength | Given | Style
"""A style as it is asked for: a weight, for one that is known, or what `status` gives for it; a source, or a `Style`,
for a new one."""
Styles = Mapping[str, Wanted]
"""Styles by name."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What the UNet and text encoders shall be. Two equal targets are the same acceleration.

    Attributes:
        base: the base's name, "auto" to find it.
        recipe: the recipe's name; None for what the file says, else what the UNet has already, else the default.
        lora: where the few-step LoRA is; None for the recipe's own.
        weight: what it counts with; None is the recipe's own.
        styles: every style that counts, and how strongly; None is as found. None in place of them: those that were
            active before.
        sources: where the styles are that are files.
        fuse, keep, compile, adapter_name: see `accelerate`.
        hub: how the hub is asked.
    """

    base: str = "auto"
    recipe: str | None = None
    lora: Source = dataclasses.field(default_factory=lambda: Source.of(None))
    weight: float | None = None
    styles: Mapping[str, Weight] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    fuse: Fuse = "auto"
    keep: Keep = "memory"
    compile: Compile = False
    adapter_name: str = LCM
    hub: HubOptions = dataclasses.field(default_factory=HubOptions)

    def check(self) -> None:
        """Refuse what no pipe can be.

        Raises:
            PipelineError, BaseModelError, CallError: naming the argument.
        """
        if not isinstance(self.base, str):
            raise PipelineError(f"base={brief(self.base)}: 'auto' or the name of a base is expected.")
        if self.base in {recipe.name for recipe in recipes.recipes()} - {base.name for base in bases.bases()}:
            raise BaseModelError(
                f"{self.base!r} is a recipe, not a base: type accelerate(pipe, recipe={self.base!r})."
            )
        if self.fuse not in ("auto", True, False):
            raise PipelineError(f"fuse={brief(self.fuse)}: 'auto', True or False is expected.")
        if self.keep not in KEEPS:
            raise PipelineError(f"keep={brief(self.keep)}: 'memory', 'disk', 'source' or None is expected.")
        if self.compile not in (True, False, "regional", "whole"):
            raise PipelineError(f"compile={brief(self.compile)}: False, True, 'regional' or 'whole' is expected.")
        if not is_adapter_name(self.adapter_name):
            raise PipelineError(f"adapter_name={brief(self.adapter_name)}: a name without a dot is expected.")
        if self.weight is not None:
            check_weight("the LCM-LoRA", self.weight)


@dataclasses.dataclass(frozen=True)
class PipeSettings:
    """What one pipe shall be, apart from its weights: see `accelerate`."""

    policy: Policy = dataclasses.field(default_factory=Policy)
    vae: vaes.Vae = None
    cache_prompts: int = 0

    def check(self, pipe: Any) -> None:
        """Refuse what this pipe can't be.

        Raises:
            PipelineError: naming the argument.
        """
        count = self.cache_prompts
        if isinstance(count, bool) or not hasattr(count, "__index__") or operator.index(count) < 0:
            raise PipelineError(f"cache_prompts={brief(count)}: a number of prompts is expected, 0 for none.")
        if count and not hasattr(type(pipe), "encode_prompt"):
            raise PipelineError(f"cache_prompts={count}: {type(pipe).__name__} has no encode_prompt to ask.")


def with_styles(target: Target, styles: Any, known: Mapping[str, Source | None], kept: Mapping[str, Weight]) -> Target:
    """The target with other styles.

    Args:
        target: the rest of it.
        styles: as the caller gave them; `UNSET` for one that counts as it was found.
        known: the styles that a weight may be given for; None in place of a source for those that are in the pipe.
        kept: the styles that count beside those that are named.

    Raises:
        PipelineError: a name is not known, or can't be used.
        LoraFileError: a source is none.
        CallError: a weight is none.
    """
    if not isinstance(styles, Mapping):
        raise PipelineError(
            f"styles={brief(styles)}: a dict is expected, of names and sources, such as "
            '{"ink": lcmlora.Style("ink.safetensors", 0.8)}.'
        )
    weights: dict[str, Weight] = dict(kept)
    sources = {name: source for name, source in known.items() if source is not None}
    for name, wanted in styles.items():
        if wanted is UNSET:
            weights[name] = None
            continue
        number = as_weight(wanted)
        if number is not None or isinstance(wanted, bool):
            if name not in known:
                there = f"; those that are there: {sorted(known)}" if known else ", nor any other"
                raise PipelineError(
                    f"there is no style {name!r}{there}. Give its source, or lcmlora.Style(source, weight)."
                )
            check_weight(f"style {name!r}", wanted)
            weights[name] = number
            continue
        if why := _why_no_name(name, target, known):
            raise PipelineError(f"style name {brief(name)} can't be used: {why}.")
        style = Style.of(wanted)
        check_weight(f"style {name!r}", style.weight)
        sources[name], weights[name] = style.origin, float(style.weight)
    return dataclasses.replace(target, styles=weights, sources=sources)


def is_strength(wanted: Any) -> TypeGuard[Mapping[str, tuple[float, float]]]:
    """Whether it is a weight by component, as `status` gives it."""
    pairs = list(wanted.values()) if isinstance(wanted, Mapping) else []
    return bool(pairs) and all(
        isinstance(pair, tuple | list) and len(pair) == 2 and None not in map(as_weight, pair) for pair in pairs
    )


def is_adapter_name(name: Any) -> bool:
    """Whether PEFT can call an adapter so."""
    return isinstance(name, str) and name != "" and "." not in name and not _is_torchs(name)


def _is_torchs(name: str) -> bool:
    return any(hasattr(holder, name) for holder in (nn.ModuleDict(), nn.ParameterDict()))  # "train", "keys", ...


def _why_no_name(name: Any, target: Target, known: Mapping[str, Source | None]) -> str | None:
    """Why no new style can have this name; None where it can."""
    if not isinstance(name, str) or not name:
        return "it is empty" if name == "" else "a string is expected"
    if known.get(name, UNSET) is None:
        return f"the pipe has an adapter of that name. Give that a weight, {{{name!r}: 0.8}}, or the style a new name"
    if name == target.adapter_name:
        return "it is the few-step LoRA's own (adapter_name=), which accelerate(weight=) changes"
    if "." in name:
        return "PEFT takes no dot in a name"
    return "torch's module containers have an attribute of that name" if _is_torchs(name) else None


def check_weight(what: str, weight: Any) -> None:
    """Refuse weights that are no numbers.

    Raises:
        CallError: naming what it was meant for.
    """
    number = as_weight(weight)
    if number is None or not math.isfinite(number) or not abs(number) < 100:
        raise CallError(f"{what}: weight {brief(weight)} is no number between -100 and 100; 1 is as trained.")
