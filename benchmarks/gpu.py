"""SDXL's shape on a GPU, 1024 x 1024 pixels, four steps: the article's recipe, merged, compiled, with a tiny VAE.

    python benchmarks/gpu.py [--batch 1 8] [--repeats 10]

(1) plain diffusers: LoRA as a PEFT adapter, LCMScheduler, eager; (2) lcmlora, merged; (3) and compiled; (4) and the
tiny VAE. Random weights in half precision; prompts come as embeddings. Times of the whole call, of the UNet's four
passes, of the scheduler's steps and of the decoder, peak memory, and seconds to accelerate and to restore.

`--dry-run` does the same with a tiny model on the CPU and writes nothing: it shows that the script runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, LCMScheduler, StableDiffusionXLPipeline

import lcmlora
from shapes import build, build_vae, save, summary, write_lora


class Machine:
    """Where to measure, and how large. Times include all that was queued on the device."""

    def __init__(self, dry: bool) -> None:
        self.device, self.dtype = ("cpu", torch.float32) if dry else ("cuda", torch.float16)
        self.dry, self.side = dry, 64 if dry else 1024

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def peak_bytes(self, work: Callable[[], object]) -> int:
        if self.dry:
            work()
            return 0
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()

    def stage_seconds(self, work: Callable[[], object], stages: dict[str, tuple[Any, str]]) -> dict[str, float]:
        """Seconds that each stage, a method of an object, took in one run of the work."""
        took = dict.fromkeys(stages, 0.0)

        def timed(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                result: list[Any] = []
                took[name] += self.seconds(lambda: result.append(inner(*args, **kwargs)))
                return result[0]

            return call

        with ExitStack() as undo:
            for name, (owner, method) in stages.items():
                own = vars(owner).get(method)
                setattr(owner, method, timed(name, getattr(owner, method)))
                # without an own one before, the class's is seen again
                undo.callback(*((setattr, owner, method, own) if own else (delattr, owner, method)))
            work()
        return took


def pipeline(machine: Machine) -> Any:
    small = build("sdxl-tiny" if machine.dry else "sdxl", machine.dtype)
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    channels = {"block_out_channels": (32, 32, 32, 32)} if machine.dry else {}
    parts = {
        "vae": build_vae(machine.dtype, sample_size=machine.side, force_upcast=False, **channels),
        "unet": small.unet,
        "scheduler": small.scheduler,
    }
    pipe = StableDiffusionXLPipeline(**none, **parts, add_watermarker=False).to(machine.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(machine: Machine, pipe: Any, batch: int, repeats: int) -> dict[str, Any]:
    like = {"device": machine.device, "dtype": machine.dtype}
    embeddings = {
        "prompt_embeds": torch.randn(batch, 77, pipe.unet.config.cross_attention_dim, **like),
        "pooled_prompt_embeds": torch.randn(batch, 1280, **like),
    }
    size = {"height": machine.side, "width": machine.side}

    def call() -> None:
        pipe(**embeddings, **size, num_inference_steps=4, guidance_scale=1.0, output_type="pt")

    for _ in range(3):
        call()
    times = [machine.seconds(call) for _ in range(repeats)]
    # what a compiled module is called through; another `forward` would be compiled anew
    unet = "_compiled_call_impl" if pipe.unet._compiled_call_impl else "forward"
    stages = {"unet": (pipe.unet, unet), "step": (pipe.scheduler, "step"), "decoder": (pipe.vae, "decode")}
    return {
        "call": summary(times),
        "peak_bytes": machine.peak_bytes(call),
        **machine.stage_seconds(call, stages),
    }


def ways(machine: Machine, pipe: Any, lora: Path, batches: list[int], repeats: int) -> dict[str, Any]:
    result: dict[str, Any] = {}

    def note(name: str) -> None:
        result[name] = {f"batch {batch}": measure(machine, pipe, batch, repeats) for batch in batches}

    own = pipe.scheduler
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipe.scheduler = LCMScheduler.from_config(own.config)
    note("diffusers, unfused")
    pipe.unload_lora_weights()
    pipe.scheduler = own
    for _ in range(3):  # the last counts: the first reads the file from the disk
        there = machine.seconds(lambda: lcmlora.accelerate(pipe, lora=lora))
        back = machine.seconds(lambda: lcmlora.restore(pipe))
    result["accelerate_s"], result["restore_s"] = there, back
    tiny = AutoencoderTiny().to(machine.device, machine.dtype).eval()
    for name, options in {
        "merged": {},
        "merged, compiled": {"compile": "whole"},
        "merged, compiled, tiny VAE": {"compile": "whole", "vae": tiny},
    }.items():
        with lcmlora.accelerated(pipe, lora=lora, **options):
            note(name)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not (args.dry_run or torch.cuda.is_available()):
        raise SystemExit("benchmarks/gpu.py needs a CUDA device, or --dry-run.")
    machine = Machine(args.dry_run)
    pipe = pipeline(machine)
    with tempfile.TemporaryDirectory() as folder:
        lora = write_lora(pipe.unet, Path(folder) / "lcm.safetensors")
        result = ways(machine, pipe, lora, args.batch, args.repeats)
    if machine.dry:
        print(json.dumps(result, indent=1))
    else:
        save("gpu", result)


if __name__ == "__main__":
    main()
