"""LoRA files in every spelling there is: what inspect_lora tells of them, what they do, which are refused.

What a file does has two judges: up @ down written out by hand, and plain diffusers' load_lora_weights.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import lcmlora
from conftest import PIPES, assert_same, sd_pipe, sdxl_pipe, snapshot, tiny_unet, write_lora
from lcmlora.layers import layers, lcm_layers

Halves = dict[str, tuple[torch.Tensor, torch.Tensor]]
Alpha = Callable[[str], torch.Tensor | None]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Plain diffusers logs an error for every part that a file has nothing for."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


# -- files ------------------------------------------------------------------------------------------------------------


def halves(wanted: Mapping[str, nn.Module], ranks: tuple[int, ...] = (2, 3, 4), seed: int = 1) -> Halves:
    """Random halves for the layers given, the ranks in turn."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for i, (name, layer) in enumerate(wanted.items()):
        out, *rest = layer.weight.shape
        rank = ranks[i % len(ranks)]
        down = torch.randn(rank, *rest, generator=generator) * 0.2
        made[name] = (down, torch.randn(out, rank, *(1,) * (len(rest) - 1), generator=generator) * 0.2)
    return made


def some(found: Mapping[str, nn.Module], pattern: str) -> dict[str, nn.Module]:
    return {name: layer for name, layer in found.items() if re.search(pattern, name)}


def keys(made: Halves, spelling: Callable[[str], str], alpha: Alpha = lambda name: None) -> dict[str, torch.Tensor]:
    """The tensors of a file; `spelling` gives a layer's key, with {} for the side."""
    tensors = {}
    for name, (down, up) in made.items():
        key = spelling(name)
        sides = ("A", "B") if ".lora_{}" in key and not key.startswith("lora_") else ("down", "up")
        tensors |= {key.format(sides[0]): down.clone(), key.format(sides[1]): up.clone()}
        if (value := alpha(name)) is not None:
            tensors[re.sub(r"\.lora[._].*", ".alpha", key)] = value.clone()
    return tensors


def write(path: Path, made: Halves, spelling: Callable[[str], str], alpha: Alpha = lambda name: None) -> Path:
    save_file(keys(made, spelling, alpha), path)
    return path


def by_hand(module: nn.Module, made: Halves, alpha: Alpha = lambda name: None) -> dict[str, torch.Tensor]:
    """Every layer's weight as it has to be with the LoRA in it, at weight 1."""
    weights = weights_of(module)
    for name, (down, up) in made.items():
        value = alpha(name)
        scale = 1.0 if value is None else float(value) / len(down)
        change = scale * up.double().flatten(1) @ down.double().flatten(1)
        weights[name] = weights[name] + change.view_as(weights[name])
    return weights


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().double() for name, layer in layers(module).items()}


def by_diffusers(pipe: StableDiffusionPipeline, file: Path) -> StableDiffusionPipeline:
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora()
    return pipe


def assert_weights(module: nn.Module, expected: dict[str, torch.Tensor], untouched: nn.Module) -> None:
    torch.testing.assert_close(weights_of(module), expected, atol=1e-6, rtol=1e-5)
    before = weights_of(untouched)
    assert any((before[name] - weight).abs().max() > 0.05 for name, weight in expected.items()), "a vain test"


def as_style(pipe: StableDiffusionPipeline, file: Path, **options: object) -> StableDiffusionPipeline:
    """The file as a style and nothing else, at weight 1: the LCM-LoRA counts with 0."""
    lcm = write_lora(file.parent / "counts-nothing.safetensors", pipe.unet)
    return lcmlora.accelerate(pipe, lora=lcm, weight=0.0, styles={"s": lcmlora.Style(file, 1.0)}, **options)


# -- spellings of UNet layers -----------------------------------------------------------------------------------------


def kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}.lora_{{}}.weight"


SPELLINGS: dict[str, Callable[[str], str]] = {
    "kohya": kohya,
    "peft": lambda name: f"unet.{name}.lora_{{}}.weight",
    "peft-with-adapter-name": lambda name: f"unet.{name}.lora_{{}}.default.weight",
    "diffusers": lambda name: f"unet.{name}.lora.{{}}.weight",
    "bare": lambda name: f"{name}.lora_{{}}.weight",
    "peft-in-unet": lambda name: f"unet.base_model.model.{name}.lora_{{}}.weight",
    "unet-in-peft": lambda name: f"base_model.model.unet.{name}.lora_{{}}.weight",
    "peft-alone": lambda name: f"base_model.model.{name}.lora_{{}}.weight",
}
ALPHAS = {"no-alpha": None, "scalar": torch.tensor(3.0), "list-of-one": torch.tensor([3.0])}


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_told_and_does_what_it_says(spelling, alpha, tmp_path):
    pipe, value = sd_pipe(), ALPHAS[alpha]
    made = halves(lcm_layers(pipe.unet))
    expected = by_hand(pipe.unet, made, lambda name: value)
    file = write(tmp_path / "lora.safetensors", made, SPELLINGS[spelling], lambda name: value)
    info = lcmlora.inspect_lora(file)
    assert info.format == ("kohya" if spelling == "kohya" else "diffusers")
    assert info.ranks == (2, 3, 4)
    assert info.alphas == ((2.0, 3.0, 4.0) if value is None else (3.0,))
    assert (len(info.modules), info.text_modules, info.cross_attention_dim) == (79, {}, 32)
    assert info.describe() == "lora.safetensors (79 modules, rank 2/3/4, text width 32)"
    lcmlora.accelerate(pipe, lora=file)
    assert_weights(pipe.unet, expected, sd_pipe().unet)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_kohya_file_does_what_plain_diffusers_makes_of_it(alpha, tmp_path):
    pipe = sd_pipe()
    file = write(tmp_path / "lora.safetensors", halves(lcm_layers(pipe.unet)), kohya, lambda name: ALPHAS[alpha])
    expected = weights_of(by_diffusers(sd_pipe(), file).unet)
    assert_weights(lcmlora.accelerate(pipe, lora=file).unet, expected, sd_pipe().unet)


@pytest.mark.parametrize("spelling", ["peft", "diffusers", "bare"])
def test_diffusers_file_does_what_plain_diffusers_makes_of_it(spelling, tmp_path):
    pipe, plain = sd_pipe(), sd_pipe()
    file = write(tmp_path / "lora.safetensors", halves(lcm_layers(pipe.unet)), SPELLINGS[spelling])
    if spelling == "bare":
        plain.unet.load_lora_adapter(str(file), prefix=None)
        plain.fuse_lora()
    else:
        by_diffusers(plain, file)
    assert_weights(lcmlora.accelerate(pipe, lora=file).unet, weights_of(plain.unet), sd_pipe().unet)


def processor(name: str) -> str:
    """A key of the time when attention processors held LoRAs: attn1.processor.to_out_lora.down.weight."""
    front, last = name.replace("to_out.0", "to_out").rsplit(".", 1)
    return f"unet.{front}.processor.{last}_lora.{{}}.weight"


def test_old_attention_processor_keys(tmp_path):
    pipe = sd_pipe()
    made = halves(some(lcm_layers(pipe.unet), r"attn.\.to_"))
    file = write(tmp_path / "old.safetensors", made, processor)
    assert any(key.endswith("attn2.processor.to_out_lora.down.weight") for key in load_file(file))
    info = lcmlora.inspect_lora(file)
    assert (info.format, info.ranks, len(info.modules), info.cross_attention_dim) == ("diffusers", (2, 3, 4), 32, 32)
    expected = by_hand(pipe.unet, made)
    torch.testing.assert_close(weights_of(by_diffusers(sd_pipe(), file).unet), expected, atol=1e-6, rtol=1e-5)
    assert_weights(as_style(pipe, file).unet, expected, sd_pipe().unet)


def test_alpha_of_its_own_for_every_module(tmp_path):
    """Plain diffusers 0.42 is no judge here: it gives attention layers the commonest alpha, with a warning."""
    pipe = sd_pipe()
    made = halves(lcm_layers(pipe.unet))
    alphas = {name: torch.tensor(1.0 + i % 4) for i, name in enumerate(made)}
    file = write(tmp_path / "lora.safetensors", made, kohya, alphas.get)
    assert lcmlora.inspect_lora(file).alphas == (1.0, 2.0, 3.0, 4.0)
    expected = by_hand(pipe.unet, made, alphas.get)
    assert_weights(lcmlora.accelerate(pipe, lora=file).unet, expected, sd_pipe().unet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_halves_of_every_float_type(dtype, tmp_path):
    pipe = sd_pipe()
    made = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in halves(lcm_layers(pipe.unet)).items()}
    file = write(tmp_path / "lora.safetensors", made, kohya, lambda name: torch.tensor(2.0).to(dtype))
    expected = by_hand(pipe.unet, made, lambda name: torch.tensor(2.0))
    assert_weights(lcmlora.accelerate(pipe, lora=file).unet, expected, sd_pipe().unet)


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_one_by_one_convolution_and_linear_layer_are_the_same(fuse, tmp_path):
    """proj_in is a convolution in SD 1.x; some trainers write its halves as matrices."""
    pipe = sd_pipe()
    made = halves(lcm_layers(pipe.unet))
    flat = {n: (a.flatten(1), b.flatten(1)) if "proj_in" in n else (a, b) for n, (a, b) in made.items()}
    assert sum(made[name][0].shape != flat[name][0].shape for name in made) == 4
    file = write(tmp_path / "lora.safetensors", flat, kohya)
    expected = by_hand(pipe.unet, made)
    lcmlora.accelerate(pipe, lora=file, fuse=fuse)
    if not fuse:
        pipe.fuse_lora()
    assert_weights(pipe.unet, expected, sd_pipe().unet)


# -- Stability's own block names --------------------------------------------------------------------------------------

SGM = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "down_blocks.2.resnets.0": "input_blocks.7.0",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.resnets.1": "input_blocks.8.0",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.resnets.2": "output_blocks.2.0",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.0.upsamplers.0": "output_blocks.2.2",
    "up_blocks.1.resnets.0": "output_blocks.3.0",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.resnets.1": "output_blocks.4.0",
    "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.1.resnets.2": "output_blocks.5.0",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
    "up_blocks.1.upsamplers.0": "output_blocks.5.2",
    "up_blocks.2.resnets.0": "output_blocks.6.0",
    "up_blocks.2.resnets.1": "output_blocks.7.0",
    "up_blocks.2.resnets.2": "output_blocks.8.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
"""SDXL's parts, as diffusers and as Stability's code call them."""


def sgm(name: str) -> str:
    front = max((part for part in SGM if f"{name}.".startswith(f"{part}.")), key=len)
    rest = name.removeprefix(front).removeprefix(".")
    return kohya(".".join(filter(None, (SGM[front], SGM.get(rest, rest)))))


def xl_pipe() -> StableDiffusionPipeline:
    """SDXL's three levels with two resnets each, tiny."""
    pipe = sdxl_pipe()
    unet = tiny_unet(
        width=64,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
    )
    pipe.register_modules(unet=unet)
    return pipe


def test_sgm_names_are_those_of_the_official_code():
    assert sgm("up_blocks.0.upsamplers.0.conv") == "lora_unet_output_blocks_2_2_conv.lora_{}.weight"
    assert sgm("down_blocks.0.downsamplers.0.conv") == "lora_unet_input_blocks_3_0_op.lora_{}.weight"
    assert sgm("mid_block.resnets.1.conv2") == "lora_unet_middle_block_2_out_layers_3.lora_{}.weight"
    long = "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_out.0"
    assert sgm(long) == "lora_unet_input_blocks_8_1_transformer_blocks_1_attn2_to_out_0.lora_{}.weight"
    spelled = {sgm(name) for name in layers(xl_pipe().unet)}
    assert len(spelled) == len(layers(xl_pipe().unet))
    assert not [name for name in spelled if re.search("down_blocks|mid_block|up_blocks|resnets|attentions", name)]


@pytest.mark.parametrize("value", [None, 2.0], ids=["no-alpha", "alpha"])
def test_sgm_file_does_what_plain_diffusers_makes_of_it(value, tmp_path):
    pipe = xl_pipe()
    made = halves(lcm_layers(pipe.unet))
    alpha = lambda name: None if value is None else torch.tensor(value)  # noqa: E731
    file = write(tmp_path / "lora.safetensors", made, sgm, alpha)
    info = lcmlora.inspect_lora(file)
    assert (info.format, info.ranks, info.cross_attention_dim) == ("kohya-sgm", (2, 3, 4), 64)
    assert (len(info.modules), info.alphas) == (257, (2.0,) if value else (2.0, 3.0, 4.0))
    expected = by_hand(pipe.unet, made, alpha)
    torch.testing.assert_close(weights_of(by_diffusers(xl_pipe(), file).unet), expected, atol=1e-6, rtol=1e-5)
    assert_weights(lcmlora.accelerate(pipe, lora=file).unet, expected, xl_pipe().unet)


def test_sgm_style_may_touch_the_layers_outside_the_blocks(tmp_path):
    """conv_in, conv_out and the embeddings have names of their own in Stability's code; diffusers knows them."""
    pipe = xl_pipe()
    outside = {name: layer for name, layer in layers(pipe.unet).items() if name not in lcm_layers(pipe.unet)}
    made = halves({**outside, **some(layers(pipe.unet), r"mid_block\.resnets\.0\.conv1")})
    file = write(tmp_path / "style.safetensors", made, sgm)
    expected = by_hand(pipe.unet, made)
    assert len(made) == 7
    torch.testing.assert_close(weights_of(by_diffusers(xl_pipe(), file).unet), expected, atol=1e-6, rtol=1e-5)
    assert_weights(as_style(pipe, file).unet, expected, xl_pipe().unet)


# -- what PEFT's configuration in the metadata says -------------------------------------------------------------------

CONFIGS = {
    "alpha": dict(lora_alpha=16),
    "rank-stabilised": dict(lora_alpha=16, use_rslora=True),
    "alpha-pattern": dict(lora_alpha=16, alpha_pattern={"attn2.to_k": 32, "conv1": 2}),
    "patterns-rank-stabilised": dict(
        lora_alpha=16, rank_pattern={"attn2.to_k": 2}, alpha_pattern={"attn2.to_k": 32}, use_rslora=True
    ),
    "whole-name-pattern": dict(lora_alpha=16, alpha_pattern={"^down_blocks.0.resnets.0.conv1": 3}),
    "regular-expression": dict(lora_alpha=16, alpha_pattern={r".*attn1\.to_[qk]": 3, "to_v|proj_in": 5}),
}


def save_with_metadata(pipe: StableDiffusionPipeline, file: Path) -> Path:
    StableDiffusionPipeline.save_lora_weights(
        str(file.parent),
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        weight_name=file.name,
        **_collate_lora_metadata({"unet": pipe.unet}),
    )
    return file


@pytest.mark.parametrize("case", CONFIGS)
def test_alpha_from_the_metadata(case, tmp_path):
    author = sd_pipe()
    config = LoraConfig(r=4, target_modules=list(lcm_layers(author.unet)), init_lora_weights=False, **CONFIGS[case])
    author.unet.add_adapter(config)
    file = save_with_metadata(author, tmp_path / "lora.safetensors")
    tuners = {name: tuner for name, tuner in author.unet.named_modules() if hasattr(tuner, "base_layer")}
    deltas = {name: tuner.get_delta_weight("default").detach().double() for name, tuner in tuners.items()}
    before = weights_of(sd_pipe().unet)
    expected = {name: weight + deltas.get(name, 0) for name, weight in before.items()}
    torch.testing.assert_close(weights_of(by_diffusers(sd_pipe(), file).unet), expected, atol=1e-6, rtol=1e-5)
    assert_weights(lcmlora.accelerate(sd_pipe(), lora=file).unet, expected, sd_pipe().unet)


def test_mixed_ranks_survive_being_saved_again_by_diffusers(tmp_path):
    """diffusers writes ranks and alphas that differ as patterns that begin with ^."""
    again = sd_pipe()
    made = halves(lcm_layers(again.unet))
    first = write(tmp_path / "first.safetensors", made, SPELLINGS["peft"])
    again.load_lora_weights(str(tmp_path), weight_name=first.name, adapter_name="default")
    file = save_with_metadata(again, tmp_path / "second.safetensors")
    pipe = sd_pipe()
    expected = by_hand(pipe.unet, made)
    assert lcmlora.inspect_lora(file).alphas == (2.0, 3.0, 4.0)
    assert_weights(lcmlora.accelerate(pipe, lora=file).unet, expected, sd_pipe().unet)


def test_the_files_own_alpha_goes_before_the_metadata(tmp_path):
    file = write(
        tmp_path / "a.safetensors",
        halves(lcm_layers(sd_pipe().unet)),
        SPELLINGS["peft"],
        lambda name: torch.tensor(3.0),
    )
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 64}'})
    assert lcmlora.inspect_lora(file).alphas == (3.0,)


def test_metadata_of_a_text_encoder(tmp_path):
    pipe, file = sd_pipe(), tmp_path / "s.safetensors"
    made = halves(some(layers(pipe.text_encoder), "q_proj"))
    tensors = keys(made, lambda name: text_key("peft", "text_encoder", name))
    save_file(tensors, file, metadata={"lora_adapter_metadata": '{"text_encoder.lora_alpha": 9}'})
    info = lcmlora.inspect_lora(file)
    assert (info.alphas, info.modules, len(info.text_modules["text_encoder"])) == ((9.0,), {}, 2)
    expected = by_hand(pipe.text_encoder, made, lambda name: torch.tensor(9.0))
    assert_weights(as_style(pipe, file).text_encoder, expected, sd_pipe().text_encoder)


# -- text encoders ----------------------------------------------------------------------------------------------------


def text_key(spelling: str, part: str, name: str) -> str:
    """A text encoder's layer in a file; files say text_model where transformers 5 does not any more."""
    long = name if name == "text_projection" or name.startswith("text_model.") else f"text_model.{name}"
    if spelling.startswith("lora_te"):
        front = "lora_te2_" if part == "text_encoder_2" else spelling
        return f"{front}{long.replace('.', '_')}.lora_{{}}.weight"
    if spelling == "peft":
        return f"{part}.{long}.lora_{{}}.weight"
    if spelling == "to_q_lora" and "self_attn" in long:
        front, last = long.rsplit(".", 1)
        return f"{part}.{front}.to_{last.removesuffix('_proj')}_lora.{{}}.weight"
    return f"{part}.{long}.lora_linear_layer.{{}}.weight"


TEXT_SPELLINGS = [
    ("sd", "lora_te_"),
    ("sd", "peft"),
    ("sd", "lora_linear_layer"),
    ("sd", "to_q_lora"),
    ("sdxl", "lora_te1_"),
    ("sdxl", "peft"),
    ("sdxl", "lora_linear_layer"),
]


def text_style(file: Path, pipe: StableDiffusionPipeline, spelling: str, alpha: Alpha = lambda name: None, **options):
    """A style with halves for one kind of UNet layer and all layers of the text encoders; and what those become."""
    made = halves(some(lcm_layers(pipe.unet), r"attn1\.to_q"), **options)
    tensors = keys(made, kohya if spelling.startswith("lora_te") else SPELLINGS["diffusers"], alpha)
    expected = {"unet": by_hand(pipe.unet, made, alpha)}
    for seed, part in enumerate(text_encoders(pipe)):
        made = halves(layers(getattr(pipe, part)), seed=5 + seed, **options)
        tensors |= keys(made, lambda name, part=part: text_key(spelling, part, name), alpha)
        expected[part] = by_hand(getattr(pipe, part), made, alpha)
    save_file(tensors, file)
    return expected


def text_encoders(pipe: StableDiffusionPipeline) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]


def embeddings(pipe: StableDiffusionPipeline) -> list[torch.Tensor]:
    with torch.no_grad():
        found = pipe.encode_prompt(
            prompt="a fox", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize(("kind", "spelling"), TEXT_SPELLINGS)
def test_style_reaches_the_text_encoders_as_in_plain_diffusers(kind, spelling, fuse, tmp_path):
    pipe, plain, file = PIPES[kind](), PIPES[kind](), tmp_path / "s.safetensors"
    value = torch.tensor(1.5) if spelling.startswith("lora_te") else None  # plain diffusers refuses the others' alphas
    expected = text_style(file, pipe, spelling, lambda name: value, ranks=(3,))
    info = lcmlora.inspect_lora(file)
    assert info.format == ("kohya" if value is not None else "diffusers")
    assert {part: len(found) for part, found in info.text_modules.items()} == (
        {"text_encoder": 12} if kind == "sd" else {"text_encoder": 12, "text_encoder_2": 13}
    )
    assert (info.ranks, info.alphas) == ((3,), (1.5,) if value is not None else (3.0,))
    before, state = embeddings(pipe), snapshot(pipe)
    plain.load_lora_weights(str(tmp_path), weight_name=file.name)
    as_style(pipe, file, fuse=fuse)
    if fuse:
        for part, weights in expected.items():
            assert_weights(getattr(pipe, part), weights, getattr(PIPES[kind](), part))
    for ours, theirs, bare in zip(embeddings(pipe), embeddings(plain), before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert (ours - bare).abs().max() > 0.01, "the style makes no difference: a vain test"
    lcmlora.restore(pipe)
    assert_same(state, snapshot(pipe))


@pytest.mark.parametrize(("kind", "spelling"), TEXT_SPELLINGS)
def test_mixed_ranks_and_alphas_in_text_encoders(kind, spelling, tmp_path):
    """Plain diffusers 0.42 is no judge here: it drops patterns of alphas in text encoders."""
    pipe, file = PIPES[kind](), tmp_path / "s.safetensors"

    def alpha(name: str) -> torch.Tensor | None:
        return torch.tensor([1.0 + len(name) % 3]) if spelling.startswith("lora_te") else None

    expected = text_style(file, pipe, spelling, alpha)
    assert lcmlora.inspect_lora(file).ranks == (2, 3, 4)
    as_style(pipe, file)
    for part, weights in expected.items():
        assert_weights(getattr(pipe, part), weights, getattr(PIPES[kind](), part))


def test_style_for_the_text_encoder_alone(tmp_path):
    pipe, file = sd_pipe(), tmp_path / "s.safetensors"
    made = halves(layers(pipe.text_encoder))
    save_file(keys(made, lambda name: text_key("peft", "text_encoder", name)), file)
    info = lcmlora.inspect_lora(file)
    assert (len(info.modules), info.cross_attention_dim) == (0, None)
    assert info.describe() == "s.safetensors (0 modules, 12 in text encoders, rank 2/3/4, text width ?)"
    unet = weights_of(pipe.unet)
    expected = by_hand(pipe.text_encoder, made)
    as_style(pipe, file)
    torch.testing.assert_close(weights_of(pipe.unet), unet, atol=0, rtol=0)
    assert_weights(pipe.text_encoder, expected, sd_pipe().text_encoder)


def test_sdxl_style_on_sd_pipe_is_refused(tmp_path):
    text_style(tmp_path / "s.safetensors", sdxl_pipe(), "lora_te1_")
    pipe = sd_pipe()
    state = snapshot(pipe)
    with pytest.raises(lcmlora.LoraMismatchError, match=r"style 's'.*does not fit this pipe's unet"):
        as_style(pipe, tmp_path / "s.safetensors")
    tensors = {k: v for k, v in load_file(tmp_path / "s.safetensors").items() if "unet" not in k}
    save_file(tensors, tmp_path / "s.safetensors")
    assert_same(state, snapshot(pipe))
    with pytest.warns(lcmlora.LcmLoraWarning, match="13 modules are left out, as this pipe has no text_encoder_2"):
        as_style(pipe, tmp_path / "s.safetensors")


# -- refusals ---------------------------------------------------------------------------------------------------------

Tensors = dict[str, torch.Tensor]
FIRST = "lora_unet_mid_block_attentions_0_proj_in"


def with_key(key: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, key: value}


def without(pattern: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if not re.search(pattern, key)}


def both_halves(down: torch.Tensor, up: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, f"{FIRST}.lora_down.weight": down, f"{FIRST}.lora_up.weight": up}


DAMAGED: dict[str, tuple[Callable[[Tensors], Tensors], type[Exception], str]] = {
    "LoKr": (with_key(f"{FIRST}.lokr_w1", torch.ones(4, 4)), lcmlora.LoraFileError, "but LoKr.*lokr_w1"),
    "LoHa": (
        with_key(f"{FIRST}.hada_w1_a", torch.ones(4, 4)),
        lcmlora.LoraFileError,
        "but LoHa.*hada_w1_a",
    ),
    "Tucker": (with_key(f"{FIRST}.lora_mid.weight", torch.ones(4, 4)), lcmlora.LoraFileError, "no plain LoRA"),
    "bias": (with_key("unet.conv_in.lora_B.bias", torch.ones(8)), lcmlora.LoraFileError, "no plain LoRA"),
    "no up": (without(f"{FIRST}.lora_up"), lcmlora.LoraFileError, rf"{FIRST} has only.*lora_down.*both halves"),
    "no down": (without(f"{FIRST}.lora_down"), lcmlora.LoraFileError, rf"{FIRST} has only.*lora_up.*both halves"),
    "halves of two ranks": (
        both_halves(torch.ones(4, 16, 1, 1), torch.ones(16, 3, 1, 1)),
        lcmlora.LoraFileError,
        r"halves of .* don't go together: \[4, 16, 1, 1\] and \[16, 3, 1, 1\]",
    ),
    "vectors": (both_halves(torch.ones(4), torch.ones(4)), lcmlora.LoraFileError, "don't go together"),
    "rank 0": (both_halves(torch.ones(0, 16), torch.ones(16, 0)), lcmlora.LoraFileError, "don't go together"),
    "rank 5000": (
        both_halves(torch.ones(5000, 16), torch.ones(16, 5000)),
        lcmlora.LoraFileError,
        "rank 5000 of .* makes no sense",
    ),
    "input of another size": (
        both_halves(torch.ones(4, 8), torch.ones(16, 4)),
        lcmlora.LoraMismatchError,
        r"other shapes in 1 \(such as mid_block\.attentions\.0\.proj_in\)",
    ),
    "output of another size": (
        both_halves(torch.ones(4, 16), torch.ones(8, 4)),
        lcmlora.LoraMismatchError,
        "covers 78 of the 79 layers",
    ),
    "a layer missing": (without(FIRST), lcmlora.LoraMismatchError, "covers 78 of the 79 layers"),
    "a foreign layer": (
        lambda t: {
            **t,
            "unet.nowhere.lora_A.weight": torch.ones(4, 8),
            "unet.nowhere.lora_B.weight": torch.ones(8, 4),
        },
        lcmlora.LoraMismatchError,
        r"1 modules that the UNet has not.*such as unet\.nowhere",
    ),
    "a layer in two spellings": (
        lambda t: {
            **t,
            "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(4, 16),
            "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(16, 4),
        },
        lcmlora.LoraMismatchError,
        r"covers 1 of the 79 .* Left out, as diffusers does: 79 modules in kohya's format",
    ),
    "a half in two spellings": (
        with_key(f"{FIRST}.lora_A.weight", torch.ones(4, 16)),
        lcmlora.LoraFileError,
        rf"{FIRST} is there twice",
    ),
    "int8 half": (
        with_key(f"{FIRST}.lora_up.weight", torch.ones(16, 4, 1, 1, dtype=torch.int8)),
        lcmlora.LoraFileError,
        "of type I8; a LoRA's halves are floating point",
    ),
    "boolean half": (
        with_key(f"{FIRST}.lora_down.weight", torch.ones(4, 16, 1, 1, dtype=torch.bool)),
        lcmlora.LoraFileError,
        "of type BOOL",
    ),
    "alpha NaN": (with_key(f"{FIRST}.alpha", torch.tensor(torch.nan)), lcmlora.LoraFileError, "alpha nan of"),
    "alpha infinite": (with_key(f"{FIRST}.alpha", torch.tensor(torch.inf)), lcmlora.LoraFileError, "alpha inf of"),
    "two alphas": (with_key(f"{FIRST}.alpha", torch.ones(2)), lcmlora.LoraFileError, "alpha"),
    "NaN half": (
        with_key(f"{FIRST}.lora_up.weight", torch.full((16, 4, 1, 1), torch.nan)),
        lcmlora.LoraFileError,
        "holds NaN or infinity",
    ),
    "infinite half": (
        with_key(f"{FIRST}.lora_up.weight", torch.full((16, 4, 1, 1), torch.inf)),
        lcmlora.LoraFileError,
        "holds NaN or infinity",
    ),
    "no tensor": (lambda tensors: {}, lcmlora.LoraFileError, "holds no LoRA: none of its 0 keys"),
    "alphas alone": (without("weight"), lcmlora.LoraFileError, "holds no LoRA: none of its 79 keys"),
    "a whole model": (lambda tensors: {"conv_in.weight": torch.ones(8, 4)}, lcmlora.LoraFileError, "no plain LoRA"),
    "text encoder": (
        lambda tensors: {
            **tensors,
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 32),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(37, 4),
        },
        lcmlora.LoraMismatchError,
        r"text-encoder keys.*styles=",
    ),
}


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_and_touch_nothing(case, fuse, tmp_path):
    change, error, words = DAMAGED[case]
    pipe, file = sd_pipe(), tmp_path / "lora.safetensors"
    save_file(change(load_file(write_lora(file, pipe.unet))), file)
    state = snapshot(pipe)
    with pytest.raises(error, match=words) as caught:
        lcmlora.accelerate(pipe, lora=file, fuse=fuse)
    assert str(file) in str(caught.value) or file.name in str(caught.value)
    assert_same(state, snapshot(pipe))


METADATA = {
    "no JSON": ("{", "no JSON"),
    "alpha is text": ('{"unet.lora_alpha": "eight"}', "alpha"),
    "alpha is NaN": ('{"unet.lora_alpha": NaN}', "alpha nan"),
    "alpha beyond floats": ('{"unet.lora_alpha": 1' + "0" * 400 + "}", "alpha"),
    "alphas are a list": ('{"unet.alpha_pattern": ["conv1"], "unet.lora_alpha": 4}', "alpha_pattern"),
    "pattern is no expression": ('{"unet.alpha_pattern": {"conv1(": 4}, "unet.lora_alpha": 4}', "alpha_pattern"),
    "bottomless": ("[" * 100_000, "lora_adapter_metadata"),
}


@pytest.mark.parametrize("case", METADATA)
def test_senseless_metadata_is_refused(case, tmp_path):
    text, words = METADATA[case]
    file = write(tmp_path / "lora.safetensors", halves(lcm_layers(sd_pipe().unet)), SPELLINGS["peft"])
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": text})
    with pytest.raises(lcmlora.LoraFileError, match=words):
        lcmlora.inspect_lora(file)


def test_files_that_are_no_safetensors(tmp_path):
    good = write_lora(tmp_path / "good.safetensors", sd_pipe().unet).read_bytes()
    bad = tmp_path / "bad.safetensors"
    for content in (good[:4], good[:100], good[:-1], good + b"\0", b"\xff" * 64, bytes(99)):
        bad.write_bytes(content)
        with pytest.raises(lcmlora.LoraFileError, match=r"can't be read as safetensors \(truncated or corrupt\?\)"):
            lcmlora.inspect_lora(bad)


@pytest.mark.parametrize("ending", [".bin", ".pt", ".ckpt", ".pth", ""])
def test_pickles_are_refused_unopened(ending, tmp_path):
    file = tmp_path / f"pytorch_lora_weights{ending}"
    torch.save({"unet.x.lora_A.weight": torch.ones(1)}, file)
    for source, name in ((file, None), (str(file), None), (tmp_path, file.name)):
        with pytest.raises(lcmlora.LoraFileError, match="pickled weights can run code"):
            lcmlora.inspect_lora(source, name)
    with pytest.raises(lcmlora.LoraFileError, match="its safetensors files: none"):
        lcmlora.inspect_lora(tmp_path)


def test_which_file_of_a_folder_is_meant(tmp_path):
    unet = sd_pipe().unet
    write_lora(tmp_path / "one.safetensors", unet)
    assert lcmlora.inspect_lora(tmp_path).path == tmp_path / "one.safetensors"
    write_lora(tmp_path / "two.safetensors", unet)
    with pytest.raises(lcmlora.LoraFileError, match=r"'one\.safetensors', 'two\.safetensors'.*weight_name="):
        lcmlora.inspect_lora(tmp_path)
    assert lcmlora.inspect_lora(str(tmp_path), "two.safetensors").path.name == "two.safetensors"
    with pytest.raises(lcmlora.LoraFileError, match=r"no three\.safetensors"):
        lcmlora.inspect_lora(tmp_path, "three.safetensors")
    write_lora(tmp_path / "pytorch_lora_weights.safetensors", unet)
    assert lcmlora.inspect_lora(tmp_path).path.name == "pytorch_lora_weights.safetensors"
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=tmp_path, weight_name="one.safetensors")
    assert lcmlora.status(pipe).lora == str(tmp_path / "one.safetensors")
