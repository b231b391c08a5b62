"""Train the pocket model itself: UNet and text encoder together, on latents of the vector drawings.

    python train_base.py --data DIR --vae DIR/vae --output DIR/base --steps 5000

Epsilon prediction on Stable Diffusion's scaled-linear schedule, loss weighted by min-SNR (gamma 5, Hang et al. 2023),
captions dropped one time in ten for guidance, an average of the weights (EMA) kept as the result. The rate warms up,
stays, and falls over the last `--decay` steps; a checkpoint is resumed from, also with a larger `--steps`.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from pictures import CHANNELS, FACTOR, SIZE, TAUGHT, THINGS, Scene, Sprites, caption, training_scenes
from tokenizers import Tokenizer as BpeTokenizer
from tokenizers import models, pre_tokenizers, trainers
from train_vae import to_tensor
from training import Log, MuonAndAdamW, save
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 16  # length of every prompt, start and end marks included
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learnt from the captions."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    learner = BpeTokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        special_tokens=[start, end],
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // FACTOR,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(48, 80, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, sprites: Sprites, scenes: list[Scene], look: str, cache: Path) -> torch.Tensor:
    """Latents of the scenes' pictures, scaled, shape (scenes, CHANNELS, side, side), kept in the file `cache`."""
    if cache.exists():
        return torch.load(cache, weights_only=True).float()
    vae.to(memory_format=torch.channels_last)
    latents = []
    for first in range(0, len(scenes), 100):
        pictures = [
            sprites.compose(s, look, random.Random(first + i)) for i, s in enumerate(scenes[first : first + 100])
        ]
        latents.append(vae.encode(to_tensor(pictures)).latent_dist.mode() * vae.config.scaling_factor)
    cache.parent.mkdir(parents=True, exist_ok=True)
    save(torch.cat(latents).half(), cache)
    return torch.cat(latents)


def snr_weight(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    snr = alphas_cumprod[timesteps] / (1 - alphas_cumprod[timesteps])
    return snr.clamp(max=gamma) / snr


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


@torch.no_grad()
def encode_prompts(pipe: StableDiffusionPipeline, scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Text embeddings of the scenes' captions, shape (scenes, tokens, width), and those of the empty prompt."""
    captions = [caption(s) for s in scenes]
    parts = [
        pipe.text_encoder(tokenize(pipe.tokenizer, captions[i : i + 500]))[0] for i in range(0, len(captions), 500)
    ]
    return torch.cat(parts), pipe.text_encoder(tokenize(pipe.tokenizer, [""]))[0]


def further_training(
    args: argparse.Namespace, look: str, seed: int
) -> tuple[StableDiffusionPipeline, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What training on from `args.base` starts with: the pipe, and a look's latents, embeddings and empty prompt."""
    pipe = StableDiffusionPipeline.from_pretrained(args.base)
    scenes = training_scenes(args.pictures, seed=seed)
    latents = encode_pictures(pipe.vae, Sprites(args.data), scenes, look, args.output / "latents.pt")
    return pipe, latents, *encode_prompts(pipe, scenes)


def rate(step: int, steps: int, decay: int, peak: float, warmup: int = 150) -> float:
    """Warm up, stay, then fall linearly over the last `decay` steps."""
    falling = max(0.01, (steps - step) / decay) if decay else 1.0
    return peak * min(1.0, (step + 1) / warmup, falling)


def finished(output: Path) -> int:
    """How many steps the checkpoint in a folder stands for."""
    file = output / "checkpoint.pt"
    return int(torch.load(file, weights_only=True)["step"]) if file.exists() else 0


def train(
    models_: dict,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    empty: torch.Tensor,
    args: argparse.Namespace,
    decay: int,
) -> None:
    """Train every parameter of `models_` ({"unet", and "text_encoder" or not}) that wants a gradient; EMA at the end.

    Without a text encoder `tokens` are embeddings already. Shared by the base and the fine-tune.
    """
    noise_schedule = DDPMScheduler(**SCHEDULE)
    alphas_cumprod = noise_schedule.alphas_cumprod
    unet, text_encoder = models_["unet"], models_.get("text_encoder")
    optimizer = MuonAndAdamW(models_.values(), weight_decay=1e-3)
    params = optimizer.params
    ema = [p.detach().clone() for p in params]
    args.output.mkdir(parents=True, exist_ok=True)
    checkpoint, start = args.output / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for p, value in zip(params, state["params"], strict=True):
            p.data.copy_(value)
        ema, start = state["ema"], state["step"]
        optimizer.load_state_dict(state["optimizer"])
    log = Log(args.output / "log.jsonl")
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(step)
        picked = torch.randint(len(latents), (args.batch,), generator=generator)
        clean = latents[picked]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(1000, (args.batch,), generator=generator)
        late = torch.rand(args.batch, generator=generator) < 0.15  # a ground's colour is settled in the first step
        timesteps = torch.where(late, 900 + timesteps // 10, timesteps)
        dropped = torch.rand(args.batch, generator=generator) < 0.1
        condition = torch.where(dropped.view(-1, *[1] * (tokens.ndim - 1)), empty, tokens[picked])
        if text_encoder is not None:
            condition = text_encoder(condition)[0]
        noisy = noise_schedule.add_noise(clean, noise, timesteps).to(memory_format=torch.channels_last)
        predicted = unet(noisy, timesteps, condition, return_dict=False)[0]
        error = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
        loss = (error * snr_weight(alphas_cumprod, timesteps)).mean()
        optimizer.step(loss, rate(step, args.steps, decay, args.lr), clip=1.0)
        keep = min(args.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - keep)
        log.add(step + 1, loss=error.mean(), weighted=loss)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {
                "params": [p.detach() for p in params],
                "ema": ema,
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            save(state, checkpoint)
    for p, average in zip(params, ema, strict=True):
        p.data.copy_(average)


def training_arguments(parser: argparse.ArgumentParser, steps: int, lr: float, decay: int, pictures: int) -> None:
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--decay", type=int, default=decay, help="steps at the end over which the rate falls")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--pictures", type=int, default=pictures, help="pictures rendered and encoded beforehand")
    parser.add_argument("--save-every", type=int, default=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_arguments(parser, steps=5000, lr=1.5e-3, decay=1200, pictures=30000)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--all-until", type=int, default=0, help="steps on all THINGS; after that on the TAUGHT ones")
    args = parser.parse_args()

    torch.manual_seed(0)
    sprites, vae = Sprites(args.data), AutoencoderKL.from_pretrained(args.vae)
    tokenizer = build_tokenizer([caption(s) for s in training_scenes(30000, seed=1, things=tuple(THINGS))])
    text_encoder, unet = build_text_encoder(tokenizer), build_unet().to(memory_format=torch.channels_last)
    total = args.steps
    for things, until in ((tuple(THINGS), min(args.all_until, total)), (TAUGHT, total)):
        args.steps = until
        if finished(args.output) >= args.steps:
            continue
        scenes = training_scenes(args.pictures, seed=1, things=things)
        latents = encode_pictures(vae, sprites, scenes, "noto", args.output / f"latents-{len(things)}.pt")
        tokens, empty = tokenize(tokenizer, [caption(s) for s in scenes]), tokenize(tokenizer, [""])
        decay = args.decay if args.steps == total else 0
        train({"unet": unet, "text_encoder": text_encoder}, latents, tokens, empty, args, decay)

    # As Stable Diffusion 1.5 ships it
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(args.output / "pipeline")


if __name__ == "__main__":
    main()
