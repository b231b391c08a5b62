"""SDXL's shape on a GPU, 1024 x 1024 pixels, four steps: the article's recipe, merged, compiled, with a tiny VAE.

    python benchmarks/gpu.py [--batch 1 8] [--repeats 10]

(1) plain diffusers: LoRA as a PEFT adapter, LCMScheduler, eager; (2) lcmlora, merged; (3) and compiled; (4) and the
tiny VAE. Random weights in half precision; prompts come as embeddings. Times of the whole call, of the UNet's four
passes and of the decoder, peak memory, and seconds to accelerate and to restore.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, LCMScheduler, StableDiffusionXLPipeline

import lcmlora
from shapes import build, build_vae, save, summary, write_lora

DTYPE = torch.float16


def pipeline() -> Any:
    small = build("sdxl", DTYPE)
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    parts = {
        "vae": build_vae(DTYPE, sample_size=1024, force_upcast=False),
        "unet": small.unet,
        "scheduler": small.scheduler,
    }
    pipe = StableDiffusionXLPipeline(**none, **parts, add_watermarker=False).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Clock:
    """Seconds that a module's calls took on the GPU."""

    def __init__(self, module: torch.nn.Module, method: str = "forward") -> None:
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._module, self._method, inner = module, method, getattr(module, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = inner(*args, **kwargs)
            end.record()
            self.events.append((start, end))
            return result

        setattr(module, method, timed)

    def stop(self) -> float:
        delattr(self._module, self._method)  # the class's own is seen again
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.events) / 1000


def seconds(work: Any) -> float:
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def measure(pipe: Any, batch: int, repeats: int) -> dict[str, Any]:
    like = {"device": "cuda", "dtype": DTYPE}
    embeddings = {
        "prompt_embeds": torch.randn(batch, 77, 2048, **like),
        "pooled_prompt_embeds": torch.randn(batch, 1280, **like),
    }

    def call() -> None:
        pipe(**embeddings, num_inference_steps=4, guidance_scale=1.0, height=1024, width=1024, output_type="pt")

    for _ in range(3):
        call()
    torch.cuda.reset_peak_memory_stats()
    times = [seconds(call) for _ in range(repeats)]
    row: dict[str, Any] = {"call": summary(times), "peak_bytes": torch.cuda.max_memory_allocated()}
    clocks = {"unet": Clock(pipe.unet), "decoder": Clock(pipe.vae, "decode")}
    call()
    return row | {name: clock.stop() for name, clock in clocks.items()}


def ways(pipe: Any, lora: Path, batches: list[int], repeats: int) -> dict[str, Any]:
    result: dict[str, Any] = {}

    def note(name: str) -> None:
        result[name] = {f"batch {batch}": measure(pipe, batch, repeats) for batch in batches}

    own = pipe.scheduler
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipe.scheduler = LCMScheduler.from_config(own.config)
    note("diffusers, unfused")
    pipe.unload_lora_weights()
    pipe.scheduler = own
    for _ in range(3):  # the last counts: the first reads the file from the disk
        there = seconds(lambda: lcmlora.accelerate(pipe, lora=lora))
        back = seconds(lambda: lcmlora.restore(pipe))
    result["accelerate_s"], result["restore_s"] = there, back
    tiny = AutoencoderTiny().to("cuda", DTYPE).eval()
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
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device.")
    pipe = pipeline()
    with tempfile.TemporaryDirectory() as folder:
        lora = write_lora(pipe.unet, Path(folder) / "lcm.safetensors")
        save("gpu", ways(pipe, lora, args.batch, args.repeats))


if __name__ == "__main__":
    main()
