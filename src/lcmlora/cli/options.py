"""What several commands take: which model, and how it is accelerated."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from .group import Say

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
THERE = click.Path(exists=True, dir_okay=False, path_type=Path)


class Numbers(click.ParamType[Any]):
    """Numbers and ranges: "1,2,4-8"."""

    name = "numbers"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int | float]:
        """What stands in the command line, or the default."""
        if not isinstance(value, str):
            return list(value)
        found: list[int | float] = []
        for part in value.split(","):
            ends = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part)
            if ends and int(ends[1]) <= int(ends[2]) < int(ends[1]) + 100_000:
                found += range(int(ends[1]), int(ends[2]) + 1)
                continue
            try:
                found.append(number(part))
            except ValueError:
                self.fail(f"{value!r}: numbers or ranges are expected, such as 1,2,4-8.", param, ctx)
        return found


def number(text: str) -> int | float:
    """A whole number where it is one."""
    return int(text) if re.fullmatch(r"\s*[+-]?\d+\s*", text) else float(text)


class Seeds(Numbers):
    """Seeds and ranges of them: "1-8"."""

    name = "seeds"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int | float]:
        """What stands in the command line, or the default."""
        found = super().convert(value, param, ctx)
        if not all(isinstance(one, int) and one >= 0 for one in found):
            self.fail(f"{value!r}: whole numbers from 0 are expected, such as 7 or 1-8.", param, ctx)
        return found


_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}


class Axis(click.ParamType[Any]):
    """An axis of a sheet: "steps=1,2,4-8"."""

    name = "name=values"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, list[Any]]:
        """What stands in the command line, or the default."""
        if isinstance(value, tuple):
            return value
        name, _, values = value.partition("=")
        if not name.strip() or not values.strip():
            self.fail(f"{value!r}: a name and values are expected, such as steps=1,2,4-8.", param, ctx)
        try:
            return name.strip(), Numbers().convert(values, param, ctx)
        except click.BadParameter:  # schedulers, recipes, styles
            return name.strip(), [_WORDS.get(part.strip().lower(), part.strip()) for part in values.split(",")]


class Pixels(click.ParamType[Any]):
    """Width and height: "512x768"."""

    name = "WxH"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """What stands in the command line, or the default."""
        found = re.fullmatch(r"(\d+)[xX](\d+)", value.strip())
        if not found or int(found[1]) % 8 or int(found[2]) % 8 or not int(found[1]) or not int(found[2]):
            self.fail(f"{value!r}: width and height are expected, multiples of 8, such as 512x768.", param, ctx)
        return f"{found[1]}x{found[2]}"


def sides(size: str) -> tuple[int, int]:
    """Width and height of what `Pixels` gives."""
    width, height = size.split("x")
    return int(width), int(height)


def gathered(name: str, cls: Any, *options: Any) -> Callable[[Any], Any]:
    """Options whose values a command's function gets as one thing of this class, as `name`."""

    def give(function: Any) -> Any:
        @functools.wraps(function)
        def run(**given: Any) -> Any:
            own = {field.name: given.pop(field.name) for field in dataclasses.fields(cls)}
            return function(**given, **{name: cls(**own)})

        decorated: Any = run
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return give


@dataclasses.dataclass(frozen=True)
class Model:
    """Which model, and where it computes."""

    model: str | None
    pipeline: str | None
    dtype: str | None
    device: str | None
    config: str | None
    variant: str | None
    local_files_only: bool

    def require(self) -> None:
        """Refuse that none is named."""
        if self.model is None:
            raise click.UsageError(
                "Missing option '--model' / '-m': a folder, a repository id, a .safetensors checkpoint, or 'pocket'."
            )

    @property
    def guidance(self) -> float | None:
        """That of the model without acceleration, where it is not its pipeline's own."""
        from ..pocket import GUIDANCE

        return GUIDANCE if str(self.model).split(":")[0] == "pocket" else None

    def load(self, say: Say, kind: str | None = None) -> Any:
        """The pipeline; of another kind where one is asked for."""
        self.require()
        with say.loading(self.model):
            pipe = self._load(kind)
        if say.quiet:
            pipe.set_progress_bar_config(disable=True)
        return pipe

    def _load(self, kind: str | None) -> Any:
        import torch

        from ..loading import load

        options: dict[str, Any] = {"variant": self.variant} if self.variant else {}
        if self.local_files_only:
            options["local_files_only"] = True
        dtype = getattr(torch, self.dtype) if self.dtype else None
        kind = self.pipeline or kind
        return load(str(self.model), dtype=dtype, device=self.device, kind=kind, config=self.config, **options)


model_options = gathered(
    "model",
    Model,
    click.option(
        "--model", "-m", help="A folder, a repository id, a .safetensors checkpoint, 'pocket', 'pocket:chalk'."
    ),
    click.option(
        "--pipeline",
        type=click.Choice(["text2img", "img2img", "inpaint"]),
        help="What for; by itself what the model says, or what --image and --mask need.",
    ),
    click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of the weights."),
    click.option("--device", help="Such as cuda, cuda:1, mps, cpu; by itself an accelerator where there is one."),
    click.option("--config", help="For a checkpoint: a folder of the same kind, whose configs describe it (offline)."),
    click.option("--variant", help="Of the weights' files in a folder or repository, such as fp16."),
    click.option("--local-files-only", is_flag=True, help="Never ask the hub."),
)


@dataclasses.dataclass(frozen=True)
class Speed:
    """How the pipe is accelerated, or that it is not."""

    accelerate: bool
    recipe: str | None
    base: str | None
    lora: str | None
    weight_name: str | None
    weight: float | None
    style: tuple[str, ...]
    vae: str | None
    fuse: bool | None
    guidance_limit: bool
    diffusers_steps: bool

    def arguments(self) -> dict[str, Any]:
        """Those of `lcmlora.accelerate` that were said."""
        names = ("recipe", "base", "lora", "weight_name", "weight", "vae", "fuse")
        said = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.style:
            said["styles"] = sources(self.style)
        if not self.guidance_limit:
            said["guidance"] = None
        if self.diffusers_steps:
            said["enforce_inference_steps"] = False
        if said and not self.accelerate:
            raise click.UsageError(f"--no-accelerate leaves nothing for {_option(next(iter(said)))} to do.")
        return said

    def apply(self, pipe: Any, local_files_only: bool) -> Any:
        """The pipe, accelerated where that was asked for and it is not yet."""
        from ..acceleration import accelerate
        from ..state import is_accelerated

        said = self.arguments()
        if self.accelerate and (said or not is_accelerated(pipe)):
            accelerate(pipe, **said, local_files_only=local_files_only)
        return pipe


def sources(texts: tuple[str, ...]) -> dict[str, Any]:
    """The styles of `--style`, by name."""
    from ..generating.reading import style_of
    from ..transition.target import Style

    found = dict(style_of(text, Path.cwd()) for text in texts)
    if odd := [name for name, style in found.items() if not isinstance(style, Style)]:
        name = Path(odd[0]).stem
        raise click.UsageError(
            f"--style {odd[0]}: a name and a source are expected, such as {name}={name}.safetensors:0.8."
        )
    return found


def _option(name: str) -> str:
    return {"styles": "--style", "guidance": "--no-guidance-limit"}.get(name, "--" + name.replace("_", "-"))


speed_options = gathered(
    "speed",
    Speed,
    click.option("--accelerate/--no-accelerate", default=True, help="Few steps (the default), or the model as it is."),
    click.option("--recipe", help="How it is accelerated: lcm (the default), hyper-8, dmd2, ... (lcmlora recipes)."),
    click.option("--base", help="Checked, where it is given (lcmlora bases)."),
    click.option("--lora", help="The few-step LoRA: a file, folder or repository, where it is not the base's own."),
    click.option("--weight-name", help="That file's name in a folder or repository."),
    click.option("--weight", type=float, help="What it counts with."),
    click.option(
        "--style", multiple=True, metavar="NAME=SOURCE:WEIGHT", help="A style LoRA beside it; several times."
    ),
    click.option("--vae", help="'tiny', 'fp16-fix', a folder or repository."),
    click.option("--fuse/--no-fuse", default=None, help="Merge the LoRAs into the weights, or leave them adapters."),
    click.option("--guidance-limit/--no-guidance-limit", default=True, help="Keep guidance in the recipe's range."),
    click.option("--diffusers-steps", is_flag=True, help="Image-to-image runs steps x strength, as in diffusers."),
)


def call_options(function: Any) -> Any:
    """What every picture of a command is called with, as `call`."""
    return gathered(
        "call",
        Call,
        click.option("--steps", type=click.IntRange(1), help="Of every picture; 4 when accelerated."),
        click.option("--guidance", type=float, help="Guidance scale; 1 when accelerated."),
        click.option("--negative", help="Negative prompt (works above guidance 1)."),
        click.option("--size", type=Pixels(), help="Width and height, such as 512x768."),
        click.option("--image", type=THERE, help="Start from this picture (image-to-image)."),
        click.option("--mask", type=THERE, help="Paint only where this picture is white (inpainting)."),
        click.option("--strength", type=click.FloatRange(0, 1), help="How far to go from --image."),
    )(function)


@dataclasses.dataclass(frozen=True)
class Call:
    """What every picture is called with."""

    steps: int | None
    guidance: float | None
    negative: str | None
    size: str | None
    image: Path | None
    mask: Path | None
    strength: float | None

    def __post_init__(self) -> None:
        if self.mask and not self.image:
            raise click.UsageError("--mask says where to paint on --image, which is missing.")

    @property
    def kind(self) -> str | None:
        """The kind of pipeline that it needs."""
        return "inpaint" if self.mask else "img2img" if self.image else None

    def row(self) -> dict[str, Any]:
        """As keys of a row of `generate`."""
        named = {**vars(self), "mask_image": self.mask}
        named.pop("mask")
        paths = {name: str(value.absolute()) for name, value in named.items() if isinstance(value, Path)}
        return {name: value for name, value in {**named, **paths}.items() if value is not None}

    def arguments(self) -> dict[str, Any]:
        """As arguments of a pipeline's call."""
        from ..generating.rows import picture

        row = self.row()
        names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "negative": "negative_prompt"}
        given: dict[str, Any] = {names.get(name, name): value for name, value in row.items()}
        fit = sides(given.pop("size")) if self.size else None
        if fit and not self.image:
            given["width"], given["height"] = fit
        for name in given.keys() & {"image", "mask_image"}:
            given[name] = picture(Path(given[name]), fit)
        return given


def require_file(path: Path | None) -> None:
    """See that a file can be written, before anything is computed; one that is there stays as it is.

    Raises:
        DataError: it can't.
    """
    from ..errors import DataError
    from ..writing import require_writable

    if path is not None:
        if path.is_dir():
            raise DataError(f"{path} is a folder: a file's name is expected.")
        require_writable(path.absolute().parent)


def as_data(rows: Any) -> Any:
    """Values that JSON can hold."""
    from ..pictures import described

    return described(rows) if isinstance(rows, Mapping | list | tuple) else rows
