"""What the numbers suggest: a table of rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..base import find_base, structure_of
from ..compat import is_offloaded, uncompiled
from ..devices import device_of
from .result import Advice, Row, seconds

_TINY = 0.1
"""A tiny VAE's part of the other's time, at most; docs/performance.md has 0.07."""
_ADAPTERS = 0.17
"""What unmerged adapters add to a UNet pass; docs/performance.md, "One UNet pass"."""
_COMPILED = 0.77
"""A compiled UNet's part of the other's time: 2.54 of 3.31 s, SDXL, A100 (diffusers, tutorials/fast_diffusion)."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the rules ask of a pipe, beside its figures.

    Attributes:
        device: where it computes.
        dtype, vae_dtype: of the UNet and of the VAE, "float16".
        upcasts: whether a half-precision VAE is brought to float32 to decode, as SDXL's is.
        scheduler: the class name of the base's.
        tiny_vae, fp16_vae: whether its base names such a VAE.
        text_device: where the text encoder waits.
        offloaded: whether hooks bring its weights to the device.
        settings: arguments of `accelerate` that it was measured with.
        unguided: whether the recipe works without guidance.
    """

    device: str = "cpu"
    dtype: str = "float32"
    vae_dtype: str = "float32"
    upcasts: bool = False
    scheduler: str = "DDIMScheduler"
    tiny_vae: bool = False
    fp16_vae: bool = False
    text_device: str = "cpu"
    offloaded: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unguided: bool = True

    @classmethod
    def of(cls, pipe: Any, settings: Mapping[str, Any], unguided: bool) -> Facts:
        """Of a pipe that is not accelerated now."""
        unet, vae = uncompiled(pipe.unet), getattr(pipe, "vae", None)
        base = find_base(structure_of(unet))
        config: Any = getattr(vae, "config", {})
        return cls(
            device=device_of(pipe).type,
            dtype=_dtype(unet),
            vae_dtype=_dtype(vae),
            upcasts=bool(config.get("force_upcast")) and _dtype(vae) == "float16",
            scheduler=type(pipe.scheduler).__name__,
            tiny_vae=bool(base and base.tiny_vae),
            fp16_vae=bool(base and base.fp16_vae),
            text_device=_device(getattr(pipe, "text_encoder", None)),
            offloaded=is_offloaded(pipe),
            settings=settings,
            unguided=unguided,
        )


def _dtype(module: Any) -> str:
    found = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return "" if found is None else str(found.dtype).removeprefix("torch.")


def _device(module: Any) -> str:
    found = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return "" if found is None else found.device.type


class Case(NamedTuple):
    """What a rule looks at.

    Attributes:
        row: the accelerated pipe's.
        base: the base's.
        facts: the pipe's.
        rows: all.
    """

    row: Row
    base: Row
    facts: Facts
    rows: tuple[Row, ...]

    @property
    def vae(self) -> float:
        """Seconds of a call for encoding and decoding."""
        return self.row.of("vae_decode") + self.row.of("vae_encode")

    @property
    def adapters(self) -> float:
        """Seconds that unmerged adapters cost a UNet pass: measured where there is a merged row to compare with."""
        same = (self.row.recipe, self.row.batch, self.row.passes, True)
        merged = [row for row in self.rows if (row.recipe, row.batch, row.passes, row.fused) == same]
        here = self.row.seconds_per_pass
        return here - merged[0].seconds_per_pass if merged else here * (1 - 1 / (1 + _ADAPTERS))

    def part(self, stage: str) -> str:
        """A stage's part of the accelerated call in words."""
        return f"is {self.row.share(stage):.0%} of the call ({seconds(self.row.of(stage))} s)"


def _is_slow(row: Row) -> bool:
    """Whether the scheduler takes longer than schedulers do: they compute a few sums of latents."""
    return row.share("scheduler") >= 0.1 or (
        row.of("scheduler") / max(row.passes, 1) >= 0.01 and row.share("scheduler") >= 0.005
    )


class Rule(NamedTuple):
    """When to say what.

    Attributes:
        name: of the rule.
        when: whether it applies.
        text: what the numbers say.
        code: the line to try.
        saves: seconds of the call that it is about, None where nobody can tell.
        settings: arguments of `accelerate` that do the same.
        base: whether it is about the base's call.
    """

    name: str
    when: Callable[[Case], bool]
    text: Callable[[Case], str]
    code: str
    saves: Callable[[Case], float | None] = lambda case: None
    settings: Mapping[str, Any] | None = None
    base: bool = False

    def apply(self, case: Case) -> Advice:
        """What it says of a case."""
        saved, row = self.saves(case), case.base if self.base else case.row
        expected = None if saved is None else row.seconds.median - saved
        text = self.text(case)
        return Advice(self.name, text[0].upper() + text[1:], self.code, expected, self.settings)


RULES = (
    Rule(
        "tiny VAE",
        lambda c: c.vae >= 0.2 * c.row.seconds.median and c.facts.tiny_vae and not c.facts.settings.get("vae"),
        lambda c: f"the VAE {c.part('vae_decode')}: a tiny one takes about a tenth of that, with a little less detail",
        'lcmlora.accelerate(pipe, vae="tiny")',
        lambda c: c.vae * (1 - _TINY),
        {"vae": "tiny"},
    ),
    Rule(
        "no tiny VAE",
        lambda c: c.vae >= 0.2 * c.row.seconds.median and not c.facts.tiny_vae and not c.facts.settings.get("vae"),
        lambda c: f"the VAE {c.part('vae_decode')}, and no tiny one is known for this base: pass one if there is any",
        'lcmlora.accelerate(pipe, vae="folder/of/an/AutoencoderTiny")',
        lambda c: c.vae * (1 - _TINY),
    ),
    Rule(
        "upcast VAE",
        lambda c: c.facts.device != "cpu" and c.facts.upcasts and c.facts.fp16_vae and not c.facts.settings.get("vae"),
        lambda c: f"the VAE runs in float32, as half precision overflows it, and {c.part('vae_decode')}",
        'lcmlora.accelerate(pipe, vae="fp16-fix")',
        lambda c: c.vae / 2,
        {"vae": "fp16-fix"},
    ),
    Rule(
        "float32 VAE",
        lambda c: (
            c.facts.device != "cpu" and c.facts.vae_dtype == "float32" and c.facts.dtype in ("float16", "bfloat16")
        ),
        lambda c: f"the VAE is in float32 beside a UNet in {c.facts.dtype}, and {c.part('vae_decode')}",
        "pipe.vae.to(torch.bfloat16)",
        lambda c: c.vae / 2,
    ),
    Rule(
        "unmerged",
        lambda c: c.row.fused is False and c.facts.settings.get("fuse") is False,
        lambda c: f"unmerged adapters cost about {seconds(c.adapters)} s a UNet pass",
        "lcmlora.accelerate(pipe, fuse=True)",
        lambda c: c.adapters * c.row.passes,
        {"fuse": True},
    ),
    Rule(
        "text encoder on the CPU",
        lambda c: c.facts.text_device == "cpu" != c.facts.device and not c.facts.offloaded,
        lambda c: f"the text encoder waits on the CPU; text encoding {c.part('text')}",
        "pipe.text_encoder.to(pipe.unet.device)",
        lambda c: c.row.of("text"),
    ),
    Rule(
        "text encoding",
        lambda c: c.row.share("text") >= 0.05 and not c.facts.settings.get("cache_prompts"),
        lambda c: f"text encoding {c.part('text')}: prompts that come again need not be encoded again",
        "lcmlora.accelerate(pipe, cache_prompts=16)",
        lambda c: c.row.of("text"),
        {"cache_prompts": 16},
    ),
    Rule(
        "guidance",
        lambda c: (c.row.guidance or 0) > 1 and c.facts.unguided,
        lambda c: f"guidance {c.row.guidance:g} sends each picture through the UNet twice a step",
        "lcmlora.accelerate(pipe, guidance=1)",
        lambda c: c.row.of("unet") / 2,
        {"guidance": 1.0},
    ),
    Rule(
        "compile",
        lambda c: c.row.share("unet") >= 0.5 and c.facts.device != "cpu" and not c.facts.settings.get("compile"),
        lambda c: f"the UNet {c.part('unet')}: compiling it takes a while once, and pays where many steps follow",
        'lcmlora.accelerate(pipe, compile="regional")',
        lambda c: c.row.of("unet") * (1 - _COMPILED),
        {"compile": "regional"},
    ),
    Rule(
        "scheduler",
        lambda c: _is_slow(c.row),
        lambda c: f"the scheduler {c.part('scheduler')}: a larger batch has it once for all its pictures",
        "lcmlora.benchmark(pipe, batch_sizes=(1, 4))",
    ),
    Rule(
        "the base's scheduler",
        lambda c: _is_slow(c.base),
        lambda c: (
            f"the base's {c.facts.scheduler} is {c.base.share('scheduler'):.0%} of its call "
            f"({seconds(c.base.of('scheduler'))} s): another one may be faster, the base's call without it takes "
            f"{seconds(c.base.seconds.median - c.base.of('scheduler'))} s"
        ),
        "pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)",
        base=True,
    ),
    Rule(
        "half precision on a CPU",
        lambda c: c.facts.device == "cpu" and c.facts.dtype == "float16",
        lambda c: "most CPUs compute float16 slowly; float32, or bfloat16 where the CPU has it, may be faster",
        "pipe.to(dtype=torch.float32)",
    ),
    Rule(
        "off-loading",
        lambda c: c.facts.offloaded,
        lambda c: (
            "weights wait elsewhere and are brought to the device in each call: without that it is faster, if they fit"
        ),
        "pipe.remove_all_hooks(); pipe.to('cuda')",
    ),
    Rule(
        "safety checker",
        lambda c: c.row.share("safety") >= 0.05,
        lambda c: f"the safety checker {c.part('safety')}: where pictures are checked elsewhere, it can go",
        "pipe.safety_checker = None",
        lambda c: c.row.of("safety"),
    ),
    Rule(
        "picture conversion",
        lambda c: c.row.share("picture") >= 0.1,
        lambda c: f"the conversion of pictures {c.part('picture')}: as tensors they stay where they are",
        'pipe(prompt, output_type="pt")',
        lambda c: c.row.of("picture"),
    ),
    Rule(
        "other",
        lambda c: c.row.share("other") >= 0.1,
        lambda c: f"what belongs to no model, scheduler or conversion {c.part('other')}: a profile names it",
        "with torch.profiler.profile(with_stack=True) as profile: pipe(prompt)",
    ),
)


def advise(rows: Iterable[Row], facts: Facts) -> tuple[Advice, ...]:
    """What the first accelerated row and the base's suggest; what would save most comes first."""
    rows = tuple(rows)
    row, base = (next(r for r in rows if r.accelerated is fast) for fast in (True, False))
    case = Case(row, base, facts, rows)
    found = [rule.apply(case) for rule in RULES if rule.when(case)]
    return tuple(sorted(found, key=lambda advice: float("inf") if advice.expected is None else advice.expected))
