"""What one UNet pass costs, bare and accelerated, and what lcmlora adds to a call.

    python benchmarks/passes.py [--repeats 9] [--calls-only]

SD 1.5's UNet, 64 x 64 latents, bfloat16. Bare; the LCM-LoRA as a PEFT adapter; it and one style; merged, with one
style and with three. All of them take turns in one process. The call: a pipeline whose own `__call__` does nothing,
around the embedded model and around SDXL's UNet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

import lcmlora
from shapes import build, in_attention, interleaved, save, summary, write_lora


class Silent:
    """A pipeline that does nothing when it is called."""

    def __call__(
        self,
        prompt: Any = None,
        height: Any = None,
        width: Any = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: Any = None,
        **others: Any,
    ) -> None:
        return None


class SilentSD(Silent, StableDiffusionPipeline):
    pass


class SilentXL(Silent, StableDiffusionXLPipeline):
    pass


def passes(folder: Path, repeats: int) -> dict[str, Any]:
    shape, dtype = "sd15", torch.bfloat16
    first = build(shape, dtype)
    lora = write_lora(first.unet, folder / "lcm.safetensors")
    styles = {
        f"style{i}": write_lora(first.unet, folder / f"style{i}.safetensors", rank=32, only=in_attention, seed=i)
        for i in range(3)
    }
    one = dict(list(styles.items())[:1])
    pipes = {
        "bare": first,
        "adapters": lcmlora.accelerate(build(shape, dtype), lora=lora, fuse=False),
        "adapters + style": lcmlora.accelerate(build(shape, dtype), lora=lora, styles=one, fuse=False),
        "merged + style": lcmlora.accelerate(build(shape, dtype), lora=lora, styles=one, keep=None),
        "merged + 3 styles": lcmlora.accelerate(build(shape, dtype), lora=lora, styles=styles, keep=None),
    }
    sample, text = torch.randn(1, 4, 64, 64, dtype=dtype), torch.randn(1, 77, 768, dtype=dtype)

    def one_pass(pipe: Any) -> None:
        with torch.no_grad():
            pipe.unet(sample, torch.tensor(999), encoder_hidden_states=text)

    times = interleaved({name: lambda pipe=pipe: one_pass(pipe) for name, pipe in pipes.items()}, repeats)
    # each against the bare pass of the same turn: the machine's speed drifts over a run
    ratios = {
        name: statistics.median(a / b for a, b in zip(t, times["bare"], strict=True)) for name, t in times.items()
    }
    return {name: {**summary(t), "ratio": ratios[name]} for name, t in times.items()}


def per_call(pipe: Any, calls: int = 300, **options: Any) -> float:
    """Seconds that lcmlora adds to a call."""

    def seconds_a_call() -> float:
        began = time.perf_counter()
        for _ in range(calls):
            pipe("a fox", num_inference_steps=4, guidance_scale=1.5, negative_prompt="a cat")
        return (time.perf_counter() - began) / calls

    plain = min(seconds_a_call() for _ in range(5))
    lcmlora.accelerate(pipe, **options)
    return min(seconds_a_call() for _ in range(5)) - plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--calls-only", action="store_true", help="no passes; the figures are shown alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pocket = SilentSD(**lcmlora.load_pocket().components, requires_safety_checker=False)
        result = {"seconds_added_per_call": per_call(pocket)}
        xl = SilentXL(**build("sdxl").components, add_watermarker=False)
        lora = write_lora(xl.unet, Path(folder) / "xl.safetensors")
        result["seconds_added_per_call_sdxl"] = per_call(xl, lora=lora, keep=None)
        del xl
        if args.calls_only:
            print(json.dumps(result, indent=1))
        else:
            save("passes", {"passes": passes(Path(folder), args.repeats), **result})


if __name__ == "__main__":
    main()
