"""keep="source": originals that stand in the file a model was loaded from are read from there."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import lcmlora
from conftest import assert_same, sd_pipe, snapshot, write_lora
from lcmlora.layers import lcm_layers
from lcmlora.lora.checkpoint import Checkpoint
from test_faults import every_line

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
COMMIT = "c" * 40


def load(folder, cls=StableDiffusionPipeline, **options):
    pipe = cls.from_pretrained(folder, **options)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def folder(tmp_path):
    sd_pipe().save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.fixture
def lcm(tmp_path):
    return write_lora(tmp_path / "lcm.safetensors", sd_pipe().unet)


@pytest.fixture
def style(tmp_path):
    """A style with a text-encoder half."""
    halves = {f"{TEXT}.lora_A.weight": torch.randn(2, 32), f"{TEXT}.lora_B.weight": torch.randn(32, 2)}
    unet = sd_pipe().unet
    return write_lora(
        tmp_path / "style.safetensors", unet, only=lambda n: "to_q" in n, spelling="diffusers", extra=halves
    )


def saved(tmp_path, dtype=torch.float32, **options):
    sd_pipe().to(dtype).save_pretrained(tmp_path / "saved", **options)
    return tmp_path / "saved"


def both_variants(tmp_path):
    folder = saved(tmp_path)
    load(folder).to(torch.float16).save_pretrained(folder, variant="fp16")
    return load(folder, variant="fp16", torch_dtype=torch.float16)


def from_parts(tmp_path, source=None):
    source, parts = source or saved(tmp_path), sd_pipe().components
    parts["unet"] = UNet2DConditionModel.from_pretrained(source, subfolder="unet")
    parts["text_encoder"] = CLIPTextModel.from_pretrained(source, subfolder="text_encoder")
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def in_the_hubs_cache(tmp_path):
    repo = tmp_path / "hub" / "models--someone--something"
    sd_pipe().save_pretrained(repo / "snapshots" / COMMIT)
    for file in list(repo.rglob("*.safetensors")):  # a link, as the hub's client lays it out
        blob = repo / "blobs" / file.parent.name
        blob.parent.mkdir(exist_ok=True)
        file.rename(blob)
        file.symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return "someone/something"


def with_prefix(tmp_path):
    """A text encoder's file with and without `text_model.`: it differs by the version that wrote it."""
    folder = saved(tmp_path)
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    tensors, front = load_file(file), "text_model."
    there = any(key.startswith(front) for key in tensors)
    other = {key.removeprefix(front) if there else front + key: value for key, value in tensors.items()}
    save_file(other, file, metadata={"format": "pt"})
    return load(folder)


def with_negative_zero(tmp_path):
    pipe = sd_pipe()
    pipe.unet.mid_block.attentions[0].proj_in.weight.data.view(-1)[0] = -0.0
    pipe.save_pretrained(tmp_path / "saved")
    return load(tmp_path / "saved")


def inference_tensors(tmp_path):
    pipe = load(saved(tmp_path))
    with torch.inference_mode():
        for layer in lcm_layers(pipe.unet).values():
            layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
    assert layer.weight.is_inference()
    return pipe


def channels_last(tmp_path):
    pipe = load(saved(tmp_path))
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


LOADED = {
    "float32": lambda path: load(saved(path)),
    "variant": lambda path: load(saved(path, torch.float16, variant="fp16"), variant="fp16", torch_dtype=torch.half),
    "both variants": both_variants,
    "shards": lambda path: load(saved(path, max_shard_size="100KB")),
    "half from float32": lambda path: load(saved(path), torch_dtype=torch.float16),
    "bfloat16 from float32": lambda path: load(saved(path), torch_dtype=torch.bfloat16),
    "float32 from half": lambda path: load(saved(path, torch.float16), torch_dtype=torch.float32),
    "cast later": lambda path: load(saved(path)).to(torch.float16),
    "single components": from_parts,
    "hub": lambda path: load(in_the_hubs_cache(path)),
    "components from the hub": lambda path: from_parts(path, in_the_hubs_cache(path)),
    "other text encoder keys": with_prefix,
    "-0.0": with_negative_zero,
    "inference tensors": inference_tensors,
    "channels_last": channels_last,
    "deep copy": lambda path: deepcopy(load(saved(path))),
}


@pytest.mark.parametrize("way", LOADED)
def test_weights_that_stand_in_the_file_are_not_copied_and_come_back(way, tmp_path, lcm, style, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    pipe = LOADED[way](tmp_path)
    before = bits(pipe)
    lcmlora.accelerate(pipe, lora=lcm, styles={"s": style}, keep="source")
    status = lcmlora.status(pipe)
    assert (status.keep, status.kept_bytes) == ("source", 0)
    merged = bits(pipe)
    lcmlora.set_styles(pipe, {})
    lcmlora.set_styles(pipe, {"s": 0.8})
    assert_equal(merged, bits(pipe))  # computed from the originals
    lcmlora.restore(pipe)
    assert_equal(before, bits(pipe))


def bits(pipe):
    kinds = {2: torch.int16, 4: torch.int32}
    parts = pipe.unet, pipe.text_encoder
    return [p.detach().view(kinds[p.dtype.itemsize]).clone() for part in parts for p in part.parameters()]


def assert_equal(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("value", "other"), [(0x80000000, 0), (0x7FC12345, 0x7FC00000), (0x3F800000, 0x3F800001)])
def test_one_other_bit_is_another_weight(value, other, tmp_path):
    """-0.0 and 0.0, two kinds of NaN, two neighbours; in the last piece of a layer of several."""
    weight = torch.randn(700, 1000)
    weight.view(torch.int32)[-1, -1] = value - (1 << 32 if value >> 31 else 0)
    save_file({"x.weight": weight}, tmp_path / "model.safetensors")
    source = Checkpoint([str(tmp_path)])
    assert source.find("x", torch.nn.Parameter(weight.clone())) is not None
    weight.view(torch.int32)[-1, -1] = other
    assert source.find("x", torch.nn.Parameter(weight)) is None


def spoil_nothing(folder):
    (folder / "unet" / "broken.safetensors").write_bytes(b"\xff" * 100)
    (folder / "unet" / "empty.safetensors").write_bytes(b"")
    (folder / "unet" / "list.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    save_file({"conv_in.weight": torch.zeros(2)}, folder / "unet" / "another.safetensors")


def fuse_a_lora(pipe, folder, lora):
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def test_only_what_differs_from_the_file_is_copied(folder, lcm, style):
    pipe, plain = load(folder), load(folder)
    fuse_a_lora(pipe, folder, style)
    before = bits(pipe)
    theirs = [layer.weight for layer in lcm_layers(plain.unet).values()]
    ours = [layer.weight for layer in lcm_layers(pipe.unet).values()]
    differing = sum(a.nbytes for a, b in zip(ours, theirs, strict=True) if not torch.equal(a, b))
    lcmlora.accelerate(pipe, lora=lcm, keep="source")
    assert 0 < lcmlora.status(pipe).kept_bytes == differing < sum(a.nbytes for a in ours)
    lcmlora.restore(pipe)
    assert_equal(before, bits(pipe))


@pytest.mark.parametrize("spoil", [spoil_nothing, lambda folder: (folder / UNET).unlink(), shutil.rmtree])
def test_files_that_can_not_be_read_mean_copies(spoil, folder, lcm):
    pipe = load(folder)
    before = bits(pipe)
    spoil(folder)
    lcmlora.accelerate(pipe, lora=lcm, keep="source")
    assert (lcmlora.status(pipe).kept_bytes > 0) == (spoil is not spoil_nothing)
    lcmlora.restore(pipe)
    assert_equal(before, bits(pipe))


def test_a_pipe_from_nowhere_is_copied(lcm):
    pipe = sd_pipe()
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, keep="source")
    assert lcmlora.status(pipe).kept_bytes == sum(x.weight.nbytes for x in lcm_layers(pipe.unet).values())
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_a_motion_unet_finds_the_unets_file(folder, lcm):
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_mid_block_layers_per_block=1,
        motion_norm_num_groups=4,
    )
    pipe = load(folder, AnimateDiffPipeline, motion_adapter=adapter)
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, keep="source")
    assert lcmlora.status(pipe).kept_bytes == 0
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def rename_over(file):
    other = file.with_name("other")
    tensors = {key: torch.zeros_like(value) for key, value in load_file(file).items()}
    save_file(tensors, other, metadata={"format": "pt"})
    other.replace(file)


def rewrite_the_same(file):
    content = file.read_bytes()
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file)


HARMLESS = {
    "deleted": lambda file: file.unlink(),
    "renamed over": rename_over,
    "touched": os.utime,
    "rewritten the same": rewrite_the_same,
    "folder deleted": lambda file: shutil.rmtree(file.parent.parent),
}


@pytest.mark.parametrize("harm", HARMLESS)
def test_what_happens_to_the_files_name_does_no_harm(harm, folder, lcm, style):
    pipe = load(folder)
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, keep="source")
    HARMLESS[harm](folder / UNET)
    lcmlora.set_styles(pipe, {"s": style})
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def write_zeros(file):
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.write(bytes(size))


def cut(file):
    os.truncate(file, 5000)


def cut_and_fill(file):
    size = file.stat().st_size
    os.truncate(file, 0)
    os.truncate(file, size)


HARMFUL = {
    "rewritten": write_zeros,
    "cut": cut,
    "cut to nothing": lambda file: os.truncate(file, 0),
    "cut and filled": cut_and_fill,
}


@pytest.mark.parametrize("harm", HARMFUL)
def test_a_file_that_was_written_to_is_told_before_anything_changes(harm, folder, lcm, style):
    pipe = load(folder, torch_dtype=torch.float16)  # in memory of its own: what is cut is the file alone
    fuse_a_lora(pipe, folder, style)
    found = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, keep="source")
    before, state = snapshot(pipe), lcmlora.status(pipe)
    HARMFUL[harm](folder / UNET)
    words = (
        rf"{UNET} was {'cut short' if harm in ('cut', 'cut to nothing') else 'written to'}.*originals of \d+ layers"
    )
    for work in (
        lambda: lcmlora.restore(pipe),
        lambda: lcmlora.set_styles(pipe, {"s": style}),
        lambda: lcmlora.accelerate(pipe, keep="memory"),
    ):
        with pytest.raises(lcmlora.PipelineError, match=words):
            work()
        assert_same(before, snapshot(pipe))
        assert lcmlora.status(pipe) == state
    with pytest.warns(lcmlora.LcmLoraWarning, match=words):
        lcmlora.restore(pipe, force=True)
    after = snapshot(pipe)
    copies = [key for key in after if key.startswith("unet") and key.endswith("to_q.weight")]
    assert copies
    assert all(torch.equal(after[key][1], found[key][1]) for key in copies)
    assert not lcmlora.is_accelerated(pipe)


def test_one_weight_of_the_file_that_changed_is_one_that_is_lost(folder, lcm):
    pipe = load(folder, torch_dtype=torch.float16)
    found = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, keep="source")
    file = folder / UNET
    status, tensors = file.stat(), load_file(file)
    key = "mid_block.attentions.0.proj_in.weight"
    content, mine = bytearray(file.read_bytes()), tensors[key].numpy().tobytes()
    content[content.index(mine)] ^= 1  # one bit
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # and nobody shall see it by the time
    with pytest.raises(lcmlora.PipelineError, match=r"1 layer \(such as mid_block.attentions.0.proj_in\)"):
        lcmlora.restore(pipe)
    with pytest.warns(lcmlora.LcmLoraWarning, match="gave back what it could"):
        lcmlora.restore(pipe, force=True)
    after = snapshot(pipe)
    differing = [k for k, v in after.items() if k.endswith("weight") and not torch.equal(v[1], found[k][1])]
    assert differing == [f"unet.{key}"]


CUT = """
import os, sys, warnings
import torch, lcmlora
from diffusers import StableDiffusionPipeline
folder, lcm, file = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder)
pipe.unet.mid_block.attentions[0].proj_in.weight.data.mul_(2)  # kept in memory
lcmlora.accelerate(pipe, lora=lcm, keep="source")
os.truncate(file, 0)
changes = lambda pipe: lcmlora.set_styles(pipe, {}), lambda pipe: lcmlora.accelerate(pipe, weight=0.5)
for work in (lcmlora.restore, *changes):
    try:
        work(pipe)
    except lcmlora.PipelineError as error:
        print(error)
warnings.simplefilter("ignore")
lcmlora.restore(pipe, force=True)
print("alive")
"""


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="a mapped file can't be cut there")
def test_a_model_that_is_mapped_from_a_file_cut_short_does_not_end_the_process(folder, lcm):
    command = [sys.executable, "-c", CUT, str(folder), str(lcm), str(folder / UNET)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [("was cut short" in line) for line in done.stdout.splitlines()] == [True, True, True, False]


def opened():
    gc.collect()
    links = Path("/proc/self/fd").iterdir()
    return sorted(os.readlink(link) for link in links if link.is_symlink())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells")
def test_files_are_held_open_for_as_long_as_they_are_needed(folder, lcm):
    pipe = from_parts(folder.parent, folder)
    before = opened()
    lcmlora.accelerate(pipe, lora=lcm, keep="source")
    (extra,) = set(opened()) - set(before)  # none of the other folders', though its files lie beside
    assert extra == str(folder / UNET)
    twin = deepcopy(pipe)
    lcmlora.restore(pipe)
    assert extra in opened()  # the copy needs it
    del twin
    assert opened() == before
    lcmlora.accelerate(pipe, lora=lcm, keep="source")
    lcmlora.accelerate(pipe, keep="memory")
    assert opened() == before
    lcmlora.restore(pipe)
    with pytest.raises(lcmlora.LoraFileError):
        lcmlora.accelerate(pipe, lora=folder.parent / "none.safetensors", keep="source")
    assert opened() == before


def test_a_copy_of_an_accelerated_pipe_comes_back_by_itself(folder, lcm):
    pipe = load(folder)
    before = bits(pipe)
    lcmlora.accelerate(pipe, lora=lcm, keep="source")
    twin = deepcopy(pipe)
    lcmlora.restore(pipe)
    (folder / UNET).unlink()
    lcmlora.restore(twin)
    assert_equal(before, bits(pipe))
    assert_equal(before, bits(twin))


def test_two_pipes_that_share_the_unet(folder, lcm, style):
    pipe = load(folder)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    before = snapshot(pipe)
    for one in (pipe, other):
        lcmlora.accelerate(one, lora=lcm, keep="source")
    lcmlora.set_styles(other, {"s": style})
    assert lcmlora.status(pipe).keep == "source"
    lcmlora.restore(pipe)
    lcmlora.restore(other)
    assert_same(before, snapshot(pipe))


def test_originals_move_from_place_to_place(folder, lcm, style):
    pipe = load(folder)
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, styles={"s": style}, keep="source")
    merged = bits(pipe)
    for keep in ("memory", "disk", "source", "disk", "source", "memory"):
        lcmlora.accelerate(pipe, keep=keep)
        status = lcmlora.status(pipe)
        assert (status.keep, status.kept_bytes > 0) == (keep, keep != "source")
        assert_equal(merged, bits(pipe))
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_a_cast_while_accelerated_gives_back_what_was_found(folder, lcm):
    """In half, not in the file's float32."""
    pipe = load(folder, torch_dtype=torch.float16)
    before = [p.detach().float() for p in pipe.unet.parameters()]
    lcmlora.accelerate(pipe, lora=lcm, keep="source")
    pipe.unet.float()
    lcmlora.restore(pipe)
    assert_equal(before, list(pipe.unet.parameters()))


def test_interrupted_at_any_line_it_leaves_the_pipe_as_it_was(folder, lcm, style):
    pipe = load(folder)
    before = snapshot(pipe)

    def work():
        lcmlora.accelerate(pipe, lora=lcm, styles={"s": style}, keep="source")

    def check():
        if lcmlora.is_accelerated(pipe):
            lcmlora.restore(pipe)
        assert_same(before, snapshot(pipe))

    assert every_line(work, check, stride=59) > 20

    def again():
        if not lcmlora.is_accelerated(pipe):
            assert_same(before, snapshot(pipe))
        else:
            lcmlora.restore(pipe)
            assert_same(before, snapshot(pipe))
        work()

    assert every_line(lambda: lcmlora.restore(pipe), again, stride=59) > 8
    assert_same(before, snapshot(pipe))
