"""What a benchmark found: a row for each way to call the pipe, and what the rows say together."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..pages import write
from ..pictures import described
from .stages import STAGES


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds, measured several times.

    Attributes:
        median: of the values.
        least: of the values.
        most: of the values.
        repeats: how many they are.
    """

    median: float
    least: float
    most: float
    repeats: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of measured values."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found), len(found))

    def __str__(self) -> str:
        if self.repeats == 1:
            return seconds(self.median)
        return f"{seconds(self.median)} ({seconds(self.least)} to {seconds(self.most)})"


def seconds(value: float) -> str:
    """Seconds with three digits that count, and no more than four after the point."""
    size = abs(value)
    return f"{value:.{next((n for least, n in ((99.5, 0), (9.95, 1), (0.995, 2), (0.0095, 3)) if size >= least), 4)}f}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to call the pipe, and what its calls took.

    Attributes:
        name: "base", or the recipe; what else tells it from the others.
        accelerated: whether the pipe was.
        recipe: how its few-step LoRA is driven; None for the base.
        fused: whether the LoRAs were merged; None for the base.
        steps: of a call; for the base those asked for.
        guidance: of a call; None where the pipeline has none.
        batch: pictures a call.
        passes: of the UNet in a call.
        samples: that went through the UNet in a call: with guidance two a picture and step.
        seconds: of a call.
        stages: seconds of a call by stage. They add up to those of the call, up to what medians may differ.
        peak_bytes: the most memory in use during a call: of the device, or of the process on a CPU.
        to_accelerate: seconds that `accelerate` took; None for the base.
        to_restore: seconds that `restore` took; None for the base.
    """

    name: str
    accelerated: bool
    recipe: str | None
    fused: bool | None
    steps: int | None
    guidance: float | None
    batch: int
    passes: int
    samples: int
    seconds: Spread
    stages: Mapping[str, Spread]
    peak_bytes: int | None
    to_accelerate: Spread | None = None
    to_restore: Spread | None = None

    @property
    def seconds_per_picture(self) -> float:
        """The median call's, divided by its pictures."""
        return self.seconds.median / self.batch

    def of(self, stage: str) -> float:
        """A stage's seconds in a call; 0 where there is no such stage."""
        return self.stages[stage].median if stage in self.stages else 0.0

    def share(self, stage: str) -> float:
        """A stage's share of a call."""
        return self.of(stage) / self.seconds.median

    @property
    def seconds_per_pass(self) -> float:
        """Of the UNet."""
        return self.of("unet") / max(self.passes, 1)


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of the LCM-LoRA announcement: SDXL, 1024 x 1024 pixels, batch 1, seconds a picture."""

    hardware: str
    lcm_4_steps: float
    base_25_steps: float

    @property
    def speedup(self) -> float:
        """How many times faster."""
        return self.base_25_steps / self.lcm_4_steps


PUBLISHED = (
    Published("Mac, M1 Max", 6.5, 64),
    Published("2080 Ti", 4.7, 10.2),
    Published("3090", 1.4, 7),
    Published("4090", 0.7, 3.4),
    Published("T4", 8.4, 26.5),
    Published("A100 (80 GB)", 1.2, 3.8),
    Published("Intel i9-10980XE, 1 of 36 cores", 29, 219),
)
"""https://huggingface.co/blog/lcm_lora, "Benchmark" (lcm_lora.md in huggingface/blog)."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """Something that the numbers suggest.

    Attributes:
        rule: its name.
        text: what the numbers say.
        code: the line to try.
        expected: seconds that a call of the accelerated pipe (or of the base, where the text says so) would take, as
            estimated; None where nobody can tell.
        settings: arguments of `accelerate` that do it; None where the line is for the user to run.
        tried: seconds of a call with them, where `try_advice` tried them.
        without: seconds of a call without, in the same turns.
        failed: why it could not be tried.
    """

    rule: str
    text: str
    code: str
    expected: float | None = None
    settings: Mapping[str, Any] | None = None
    tried: float | None = None
    without: float | None = None
    failed: str = ""

    @property
    def outcome(self) -> str:
        """What it would bring, or brought, in words; empty where nobody can tell."""
        if self.failed:
            return f"could not be tried: {self.failed}"
        if self.tried is not None and self.without is not None:
            return f"tried: {seconds(self.tried)} s a call instead of {seconds(self.without)} s"
        return "" if self.expected is None else f"would give about {seconds(self.expected)} s a call"


@dataclasses.dataclass(frozen=True, repr=False)
class Benchmark:
    """How fast a pipe is as it is and accelerated, where its time goes, and what to try.

    Attributes:
        pipeline: the pipe's class, its model, where that is known, its dtype and the size of its pictures.
        hardware: the device that it ran on.
        rows: the base's, then those of the accelerated pipe, for each batch size.
        advice: what the numbers suggest, what would save most first.
        seconds_to_load: None where a pipeline was given and not its folder.
        interrupted: whether it was stopped before all turns were over.
    """

    pipeline: str
    hardware: str
    rows: tuple[Row, ...]
    advice: tuple[Advice, ...] = ()
    seconds_to_load: float | None = None
    interrupted: bool = False

    @property
    def base(self) -> Row:
        """The pipe as it is, at the first batch size."""
        return next(row for row in self.rows if not row.accelerated)

    @property
    def fast(self) -> Row:
        """The accelerated pipe, at the first batch size: the first of them, which the others may be compared with."""
        return next(row for row in self.rows if row.accelerated)

    def speedup_of(self, row: Row) -> float:
        """How many times faster than the base at the same batch size it makes a picture."""
        base = next((r for r in self.rows if not r.accelerated and r.batch == row.batch), self.base)
        return base.seconds_per_picture / row.seconds_per_picture

    @property
    def speedup(self) -> float:
        """How many times faster the accelerated pipe is."""
        return self.speedup_of(self.fast)

    @property
    def seconds_to_accelerate(self) -> float | None:
        """Of the accelerated pipe, median."""
        return self.fast.to_accelerate.median if self.fast.to_accelerate else None

    @property
    def seconds_to_restore(self) -> float | None:
        """Of the accelerated pipe, median."""
        return self.fast.to_restore.median if self.fast.to_restore else None

    @property
    def allowed(self) -> dict[str, float]:
        """Seconds of a call, by stage, if the base's stages shrank as far as steps and guidance do and no more.

        The UNet's and the ControlNet's with the samples that go through them, the scheduler's with the UNet's passes;
        the others stay.
        """
        ratio = {
            "samples": self.fast.samples / max(self.base.samples, 1),
            "passes": self.fast.passes / max(self.base.passes, 1),
            None: 1.0,
        }
        grows = {stage.name: ratio[stage.grows] for stage in STAGES}
        return {stage: spread.median * grows[stage] for stage, spread in self.base.stages.items()}

    @property
    def possible_speedup(self) -> float:
        """How many times faster the stages allow it to be: see `allowed`."""
        return sum(spread.median for spread in self.base.stages.values()) / sum(self.allowed.values())

    @property
    def reached(self) -> float:
        """Which part of what is possible was reached. Above 1 where stages shrank that need not have."""
        return self.speedup / self.possible_speedup

    @property
    def lost(self) -> dict[str, float]:
        """Where the rest went: by stage, seconds that a call takes beyond what is allowed; negative where less."""
        return {stage: self.fast.of(stage) - self.allowed.get(stage, 0.0) for stage in self.stages}

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages that any row has."""
        return tuple(stage.name for stage in STAGES if any(stage.name in row.stages for row in self.rows))

    @property
    def published(self) -> tuple[Published, ...]:
        """The announcement's figures, to have beside one's own."""
        return PUBLISHED

    def __repr__(self) -> str:
        return (
            f"<Benchmark: {self.pipeline}: {seconds(self.base.seconds_per_picture)} s a picture, accelerated "
            f"{seconds(self.fast.seconds_per_picture)} s, {self.speedup:.1f} times faster>"
        )

    def __str__(self) -> str:
        from .show import text

        return text(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON: all that was measured, and what follows from it."""
        follows = ("speedup", "possible_speedup", "reached", "lost", "seconds_to_accelerate", "seconds_to_restore")
        plain: dict[str, Any] = described(dataclasses.asdict(self))
        plain["published"] = [{**dataclasses.asdict(row), "speedup": row.speedup} for row in self.published]
        plain["rows"] = [
            {**one, "seconds_per_picture": row.seconds_per_picture, "speedup": self.speedup_of(row)}
            for one, row in zip(plain["rows"], self.rows, strict=True)
        ]
        return {**plain, **{name: described(getattr(self, name)) for name in follows}}

    def to_json(self, path: str | Path) -> Path:
        """Write `to_dict()`; returns the path.

        Raises:
            DataError: it can't be written there.
        """
        return write(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def to_csv(self, path: str | Path) -> Path:
        """Write a line for each row, seconds of a call in columns by stage; returns the path.

        Raises:
            DataError: it can't be written there.
        """
        from .show import comma_separated

        return write(path, comma_separated(self))

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page; returns the path.

        Raises:
            DataError: it can't be written there.
        """
        from .show import page

        return write(path, page(self))

    def figure(self) -> Any:
        """A matplotlib figure of the stages, a bar a row; needs the extra `plots`.

        Raises:
            DataError: matplotlib is not installed.
        """
        from .show import figure

        return figure(self)

    def _repr_html_(self) -> str:
        from .show import fragment

        return fragment(self)
