"""Train an AutoencoderTiny for the latents of the pocket model's VAE: what `accelerate(pipe, vae="tiny")` puts in.

    python train_tiny.py --data DIR --vae DIR/vae --output DIR/tiny

Its decoder learns pictures from the latents of the VAE, scaled as the UNet sees them, with a little noise as a UNet
leaves it; its encoder learns the latents from the pictures.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from pictures import CHANNELS, FACTOR, Sprites
from train_vae import draw_batch, edge_error, rise_and_fall
from training import Checkpoint, Log, MuonAndAdamW


def build() -> AutoencoderTiny:
    stages = {4: 3, 8: 4}[FACTOR]
    widths = (24,) * stages
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 2, 2)[-stages:],
        num_decoder_blocks=(3, 2, 1, 1)[:stages],
        latent_channels=CHANNELS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()

    torch.manual_seed(0)
    sprites = Sprites(args.data)
    vae = AutoencoderKL.from_pretrained(args.vae).requires_grad_(False).to(memory_format=torch.channels_last)
    tiny = build().to(memory_format=torch.channels_last)
    optimizer = MuonAndAdamW([tiny])
    checkpoint = Checkpoint(args.output / "checkpoint.pt", tiny=tiny, optimizer=optimizer)
    log = Log(args.output / "log.jsonl")
    for step in range(checkpoint.step, args.steps):
        x = draw_batch(sprites, random.Random(step), 2 * args.batch, cropped=False)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(x).latent_dist.mode().float() * vae.config.scaling_factor
            decoded = tiny.decode(latents + 0.05 * torch.randn_like(latents)).sample.float()
            encoded = tiny.encode(x).latents.float()
        squared, edge, latent = (
            (decoded - x).square().mean(),
            edge_error(decoded, x),
            (encoded - latents).square().mean(),
        )
        loss = (decoded - x).abs().mean() + 4 * squared + 0.5 * edge + latent
        optimizer.step(loss, args.lr * rise_and_fall(step, args.steps), clip=5.0)
        log.add(step + 1, squared=squared, edge=edge, latent=latent)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            checkpoint.save(step + 1)
    tiny.save_pretrained(args.output)


if __name__ == "__main__":
    main()
