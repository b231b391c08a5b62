"""A whole call: 4 accelerated steps against the base's 25 with guidance, and against what the stages allow.

    python benchmarks/whole_call.py [--repeats 3]

SD 1.5's shape with its VAE and text encoder, 256 x 256 pixels (`--size`), bfloat16. The stages (text encoder, UNet at
batch 1 and 2, decoder) are timed alone, in turn with the calls. What they allow is the ratio of their sums; the rest
of a call (scheduler, wrapper, picture conversion) can only lower it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

import lcmlora
from shapes import build, build_vae, interleaved, save, summary, write_lora

DTYPE = torch.bfloat16


def pipeline() -> Any:
    tokenizer = lcmlora.load_pocket().tokenizer
    tokenizer.model_max_length = 77
    text_config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    text_encoder = CLIPTextModel(text_config).to(DTYPE).eval()  # buffers with values: not made empty
    small = build("sd15", DTYPE)
    pipe = StableDiffusionPipeline(
        vae=build_vae(DTYPE, sample_size=512),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=small.unet,
        scheduler=small.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stages(pipe: Any, size: int) -> dict[str, Callable[[], object]]:
    tokens = {n: torch.ones(n, 77, dtype=torch.long) for n in (1, 2)}
    sample = {n: torch.randn(n, 4, size // 8, size // 8, dtype=DTYPE) for n in (1, 2)}
    text = {n: torch.randn(n, 77, 768, dtype=DTYPE) for n in (1, 2)}
    tiny = AutoencoderTiny().to(DTYPE).eval()

    def without_gradients(work: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(work)

    return {
        "text": without_gradients(lambda: pipe.text_encoder(tokens[1])),
        "unet, batch 1": without_gradients(lambda: pipe.unet(sample[1], 999, encoder_hidden_states=text[1])),
        "unet, batch 2": without_gradients(lambda: pipe.unet(sample[2], 999, encoder_hidden_states=text[2])),
        "decoder": without_gradients(lambda: pipe.vae.decode(sample[1])),
        "tiny decoder": without_gradients(lambda: tiny.decode(sample[1])),
    }


def measure(folder: Path, repeats: int, size: int) -> dict[str, Any]:
    base, fast = pipeline(), pipeline()
    lora = write_lora(base.unet, folder / "lcm.safetensors")
    lcmlora.accelerate(fast, lora=lora, keep=None)
    shape = {"height": size, "width": size}
    works = {
        "base, 25 steps": lambda: base("a fox", num_inference_steps=25, guidance_scale=7.5, **shape),
        "accelerated, 4 steps": lambda: fast("a fox", **shape),
        **stages(fast, size),
    }
    times = interleaved(works, repeats)
    result = {name: summary(t) for name, t in times.items()}
    median = {name: row["median"] for name, row in result.items()}
    base_sum = 2 * median["text"] + 25 * median["unet, batch 2"] + median["decoder"]
    fast_sum = median["text"] + 4 * median["unet, batch 1"] + median["decoder"]
    ratio = median["base, 25 steps"] / median["accelerated, 4 steps"]
    return {
        "size": size,
        "times": result,
        "ratio": ratio,
        "ratio_of_stages": base_sum / fast_sum,
        "share": ratio / (base_sum / fast_sum),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=256, help="pixels, both ways")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save("whole_call", measure(Path(folder), args.repeats, args.size))


if __name__ == "__main__":
    main()
