"""Train the pocket model's AutoencoderKL (`SIZE`, `FACTOR` and `CHANNELS` of `pictures.py`) on all three looks.

    python train_vae.py --data DIR --output DIR/vae

Loss: squared and absolute error on pixels, absolute error on their gradients at three scales (keeps edges), a small KL
term. One step in five halves the latents' sides and wants the halved picture back (EQ-VAE, Kouzelis et al. 2025): such
latents are smoother, and the UNet learns them sooner. The first `--crop-steps` steps see crops of half the side, four
times cheaper: the VAE is a convolution all through. A checkpoint is written every `--save-every` steps and resumed
from. `--decoder-only` goes on with a frozen encoder, so that latents and every model trained on them stay valid.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from pictures import CHANNELS, FACTOR, SIZE, THINGS, Sprites, training_scenes
from training import Checkpoint, Log, MuonAndAdamW

LOOKS = ("noto", "noto", "noto", "fluent", "chalk")  # drawn from evenly


def build() -> AutoencoderKL:
    """A VAE whose start lets signals through: with torch's default start it spends hundreds of steps learning to."""
    widths = {4: (16, 32, 64), 8: (16, 32, 64, 96)}[FACTOR]
    blocks = len(widths)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
            if name.endswith("conv2"):  # the last of a residual block: begin near the identity
                module.weight.data.mul_(0.2)
    vae.quant_conv.weight.data[CHANNELS:].mul_(0.1)
    vae.quant_conv.bias.data[CHANNELS:] = -6.0  # little sampling noise at first
    return vae


def to_tensor(pictures: list) -> torch.Tensor:
    """PIL pictures -> (batch, 3, side, side) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def edge_error(a: torch.Tensor, b: torch.Tensor, scales: int = 3) -> torch.Tensor:
    """Absolute error of the gradients along both axes, at the full side, the half, the quarter."""
    difference, total = a - b, torch.zeros(())
    for _ in range(scales):
        total = total + sum(difference.diff(dim=axis).abs().mean() for axis in (2, 3))
        difference = F.avg_pool2d(difference, 2)
    return total


def rise_and_fall(step: int, steps: int, warmup: int = 200) -> float:
    """The share of the peak rate: up in `warmup` steps, along a cosine down to a hundredth."""
    return min(1.0, (step + 1) / warmup) * (0.505 + 0.495 * math.cos(math.pi * step / steps))


def draw_batch(sprites: Sprites, rng: random.Random, batch: int, cropped: bool) -> torch.Tensor:
    """Crops of half the side at one random place, or half as many whole pictures."""
    count = batch if cropped else batch // 2
    scenes = training_scenes(count, seed=rng.getrandbits(32), things=tuple(THINGS))
    x = to_tensor([sprites.compose(s, rng.choice(LOOKS), rng) for s in scenes])
    if cropped:
        top, left = rng.randrange(SIZE // 2 + 1), rng.randrange(SIZE // 2 + 1)
        x = x[..., top : top + SIZE // 2, left : left + SIZE // 2]
    return x.contiguous(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="weights to start from, instead of random ones")
    parser.add_argument("--decoder-only", action="store_true")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--crop-steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=16, help="of crops; of whole pictures half as many")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()

    torch.manual_seed(0)
    sprites = Sprites(args.data)
    vae = AutoencoderKL.from_pretrained(args.start) if args.start else build()
    vae = vae.to(memory_format=torch.channels_last)
    if args.decoder_only:
        vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
    optimizer = MuonAndAdamW([vae])
    checkpoint = Checkpoint(args.output / "checkpoint.pt", vae=vae, optimizer=optimizer)
    log = Log(args.output / "log.jsonl")
    for step in range(checkpoint.step, args.steps):
        rng = random.Random(step)
        x = draw_batch(sprites, rng, args.batch, cropped=step < args.crop_steps)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            latents = posterior.sample()
            if not args.decoder_only and step % 5 == 4:
                latents, x = F.avg_pool2d(latents, 2), F.avg_pool2d(x, 2)
            decoded = vae.decode(latents).sample.float()
        squared, edge = (decoded - x).square().mean(), edge_error(decoded, x)
        loss = (decoded - x).abs().mean() + 4 * squared + 0.5 * edge
        if not args.decoder_only:
            loss = loss + 0.004 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.step(loss, args.lr * rise_and_fall(step, args.steps), clip=5.0)
        log.add(step + 1, squared=squared, edge=edge)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            checkpoint.save(step + 1)
    # Less than unit variance: the last timestep still shows the mean of latents with this many channels, and a UNet
    # that reads a ground's colour off it in training never learns to take it from the prompt (Lin et al. 2023).
    with torch.no_grad():
        scenes = training_scenes(256, seed=7, things=tuple(THINGS))
        x = to_tensor([sprites.compose(s, "noto", random.Random(i)) for i, s in enumerate(scenes)])
        if not args.decoder_only:
            vae.register_to_config(scaling_factor=float(0.4 / vae.encode(x).latent_dist.mode().std()))
    vae.save_pretrained(args.output)


if __name__ == "__main__":
    main()
