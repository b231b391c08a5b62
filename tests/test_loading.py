"""A pipeline from whatever names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lcmlora
from lcmlora import PipelineError
from lcmlora.loading import as_class, default_device, load
from lcmlora.testing import tiny_lora, tiny_pipeline

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
UNET = (
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^down_blocks\.(\d)\.resnets\.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{2 * int(m[1]) + 1}.2"),
)
VAE = (
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"(?<=attn_1\.)group_norm", "norm"),
    (r"(?<=attn_1\.)to_out\.0", "proj_out"),
    (r"(?<=attn_1\.)to_(\w)", r"\1"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)
"""Names of the original checkpoints for those of diffusers, in pipelines of the tiny shape."""


def renamed(name: str, rules: object) -> str:
    for pattern, other in rules:
        name = re.sub(pattern, other, name)
    return name


def checkpoint(pipe: object) -> dict[str, torch.Tensor]:
    """A pipeline as one file, as those before diffusers were written and are passed around still."""
    found = {}
    for name, tensor in pipe.unet.state_dict().items():
        for ours, theirs in RESNET.items() if ".resnets." in name else ():
            name = name.replace(f".{ours}.", f".{theirs}.")
        found["model.diffusion_model." + renamed(name, UNET)] = tensor
    for name, tensor in pipe.vae.state_dict().items():
        is_projection = ".attentions." in name and tensor.ndim == 2
        found["first_stage_model." + renamed(name, VAE)] = tensor[..., None, None] if is_projection else tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        found["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = tensor
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "pipe")
    save_file(checkpoint(pipe), folder / "tiny.safetensors")
    torch.save({"state_dict": checkpoint(pipe)}, folder / "tiny.ckpt")
    return folder


@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny.ckpt", "pipe"])
def test_files_and_folders_are_the_same_pipeline(name, model):
    pipe = lcmlora.load(model / name, config=model / "pipe", local_files_only=True)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert pipe.name_or_path == str(model / name)
    for part in ("unet", "vae", "text_encoder"):
        was, now = (getattr(one, part).state_dict() for one in (tiny_pipeline(), pipe))
        assert was.keys() == now.keys()
        assert all(torch.equal(was[key], now[key]) for key in was)


@pytest.mark.parametrize("name", ["tiny.safetensors", "pipe"])
def test_type_and_kind_are_what_was_asked_for(name, model):
    pipe = load(str(model / name), config=str(model / "pipe"), dtype=torch.bfloat16, kind="img2img")
    assert type(pipe).__name__ == "StableDiffusionImg2ImgPipeline"
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    assert pipe.name_or_path == str(model / name)
    pipe.vae.float()
    assert type(as_class(pipe, "StableDiffusionInpaintPipeline")).__name__ == "StableDiffusionInpaintPipeline"
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32), "the parts are shared, and not cast"
    with pytest.raises(PipelineError, match="no Nonsense can be made"):
        as_class(pipe, "Nonsense")
    with pytest.raises(PipelineError, match="kind='video': one of text2img"):
        load("pocket", kind="video")


def test_a_baked_folder_keeps_its_defaults(model, tmp_path):
    pipe = lcmlora.accelerate(tiny_pipeline(), lora=tiny_lora(tiny_pipeline(), tmp_path / "lcm.safetensors"), steps=3)
    baked = lcmlora.load(lcmlora.bake(pipe, tmp_path / "baked"))
    assert lcmlora.status(baked).steps == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "there is no model 'nowhere'"),
        ("nobody/nothing", "can't be loaded. The loader says: "),
        ("none.safetensors", "there is no file none.safetensors"),
        ("pocket:pastel", "'pocket' or 'pocket:chalk'"),
        (None, "model is a NoneType: a pipeline's folder, a repository id"),
    ],
)
def test_what_is_no_model_is_one_sentence(name, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match=re.escape(words)) as told:
        load(name)
    assert "\n" not in str(told.value)


def test_damaged_files_are_told(model, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes((model / "tiny.safetensors").read_bytes()[:1000])
    (tmp_path / "text.txt").write_text("")
    for name, words in (("cut.safetensors", "can't be loaded"), ("text.txt", "is no checkpoint")):
        with pytest.raises(PipelineError, match=words):
            load(str(tmp_path / name))


def test_each_process_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert default_device() == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert default_device() == "cuda:1"
