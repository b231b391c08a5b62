"""Styles: changing them while accelerated leaves exactly what a fresh acceleration with them would have made."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

import lcmlora
from conftest import assert_same, sd_pipe, sdxl_pipe, snapshot, write_lora
from lcmlora import Style

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def weights(pipe) -> dict[str, torch.Tensor]:
    """Every Linear's and Conv2d's weight that counts, PEFT's wrapping seen through."""
    return {
        f"{part}.{name}": layer.weight.detach().clone()
        for part in ("unet", "text_encoder")
        for name, layer in lcmlora.layers.layers(getattr(pipe, part)).items()
    }


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture
def files(tmp_path):
    """An LCM-LoRA, two styles of different layers, one of them with a text-encoder half."""
    pipe = sd_pipe()
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    halves = {f"{text}.lora_A.weight": torch.randn(2, 32), f"{text}.lora_B.weight": torch.randn(32, 2)}
    return {
        "lcm": write_lora(tmp_path / "lcm.safetensors", pipe.unet),
        "a": write_lora(tmp_path / "a.safetensors", pipe.unet, only=lambda n: "attn" in n, seed=2),
        "b": write_lora(
            tmp_path / "b.safetensors",
            pipe.unet,
            only=lambda n: "to_q" in n,
            seed=3,
            spelling="diffusers",
            extra=halves,
        ),
    }


@pytest.mark.parametrize("keep", ["memory", "disk"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_swaps_equal_a_fresh_fuse(dtype, keep, files):
    pipe = sd_pipe().to(DTYPES[dtype])
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=files["lcm"], styles={"a": files["a"]}, keep=keep)
    wanted = [{"a": 0.3, "b": Style(files["b"], 0.7)}, {"b": 0.2}, {}, {"a": Style(files["a"], 1.1)}]
    for i in range(100):
        lcmlora.set_styles(pipe, wanted[i % 4])
    lcmlora.set_styles(pipe, {"b": Style(files["b"], 0.5), "a": 0.9})
    fresh = sd_pipe().to(DTYPES[dtype])
    lcmlora.accelerate(fresh, lora=files["lcm"], styles={"b": Style(files["b"], 0.5), "a": Style(files["a"], 0.9)})
    assert_equal(weights(pipe), weights(fresh))
    assert lcmlora.status(pipe).styles == {"a": 0.9, "b": 0.5}
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_unfused_swaps_equal_a_fresh_start(files):
    pipe = sd_pipe()
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=files["lcm"], styles={"a": files["a"]}, fuse=False)
    lcmlora.set_styles(pipe, {"b": Style(files["b"], 0.5)})
    assert lcmlora.status(pipe).adapters == pytest.approx({"lcmlora_lcm": 1.0, "b": 0.5})
    assert "a" not in pipe.unet.peft_config
    fresh = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], styles={"b": Style(files["b"], 0.5)}, fuse=False)
    inputs = {"prompt": "a fox", "height": 16, "width": 16, "output_type": "np"}
    one, other = (p(**inputs, generator=torch.Generator().manual_seed(0)).images for p in (pipe, fresh))
    assert (one == other).all()
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_the_users_own_style_is_reweighted_and_returned(fuse, files):
    pipe = sd_pipe()
    pipe.load_lora_weights(str(files["a"].parent), weight_name="a.safetensors", adapter_name="own")
    pipe.set_adapters(["own"], [0.6])
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=files["lcm"], fuse=fuse)
    lcmlora.set_styles(pipe, {"own": 0.25, "b": Style(files["b"], 0.5)})
    assert lcmlora.status(pipe).styles == pytest.approx({"own": 0.25, "b": 0.5})
    fresh = sd_pipe()
    lcmlora.accelerate(fresh, lora=files["lcm"], styles={"own": Style(files["a"], 0.25), "b": Style(files["b"], 0.5)})
    if fuse:
        for name, weight in weights(pipe).items():
            torch.testing.assert_close(weight, weights(fresh)[name], atol=1e-6, rtol=1e-6)
    lcmlora.set_styles(pipe, {})
    assert lcmlora.status(pipe).styles == {}
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_styles_of_sdxl_reach_both_text_encoders(tmp_path):
    pipe = sdxl_pipe()
    extra = {}
    for te in ("lora_te1", "lora_te2"):
        front = f"{te}_text_model_encoder_layers_1_mlp_fc1"
        extra |= {f"{front}.lora_down.weight": torch.randn(2, 32), f"{front}.lora_up.weight": torch.randn(37, 2)}
    style = write_lora(tmp_path / "s.safetensors", pipe.unet, only=lambda n: "to_q" in n, extra=extra)
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, styles={"s": style})
    changed = [
        k for k, v in snapshot(pipe).items() if k.endswith("fc1.weight") and not torch.equal(v[1], before[k][1])
    ]
    assert [name.split(".")[0] for name in changed] == ["text_encoder", "text_encoder_2"]
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_a_swap_that_fails_changes_nothing(fuse, files, monkeypatch):
    pipe = sd_pipe()
    lcmlora.accelerate(pipe, lora=files["lcm"], styles={"a": files["a"]}, fuse=fuse)
    before, status = snapshot(pipe), lcmlora.status(pipe)
    real, seen = lcmlora.lora.merge.load, 0

    def fail(*args):
        nonlocal seen
        seen += 1
        if seen == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("lcmlora.lora.merge.load", fail)
    with pytest.raises(KeyboardInterrupt):
        lcmlora.set_styles(pipe, {"b": files["b"]})
    assert_same(before, snapshot(pipe))
    assert lcmlora.status(pipe) == status
    lcmlora.set_styles(pipe, {"b": files["b"]})
    assert lcmlora.status(pipe).styles == {"b": 0.8}


def test_bad_changes_are_refused_in_words(files, tmp_path):
    pipe = sd_pipe()
    pipe.load_lora_weights(str(files["b"].parent), weight_name="b.safetensors", adapter_name="own")
    pipe.set_adapters(["own"], [0.5])
    with pytest.raises(lcmlora.PipelineError, match="accelerate"):
        lcmlora.set_styles(pipe, {})
    lcmlora.accelerate(pipe, lora=files["lcm"], styles={"own": 0.5, "a": files["a"]})
    before = snapshot(pipe)
    cases = [
        ({"z": 0.5}, lcmlora.PipelineError, r"no style 'z'; those that are there: \['a', 'own'\]"),
        ({"lcmlora_lcm": files["b"]}, lcmlora.PipelineError, "can't be used: it is the few-step LoRA's own"),
        ({"own": files["b"]}, lcmlora.PipelineError, r"can't be used: the pipe has an adapter of that.*{'own': 0.8}"),
        ({"": files["b"]}, lcmlora.PipelineError, "can't be used: it is empty"),
        ({1: files["b"]}, lcmlora.PipelineError, "1 can't be used: a string is expected"),
        ({"a.b": files["b"]}, lcmlora.PipelineError, "can't be used: PEFT takes no dot"),
        ({"train": files["b"]}, lcmlora.PipelineError, "can't be used: torch"),
        ({"own": {"unet": (0.1, 0.2)}}, lcmlora.PipelineError, r"not the one that is there \(0.5\): one number"),
        ({"a": "0.5"}, lcmlora.LoraFileError, "Is the number 0.5 meant, a weight"),
        ({"c": tmp_path / "none.safetensors"}, lcmlora.LoraFileError, "no file"),
        ({"a": float("inf")}, lcmlora.CallError, "no number"),
        ({"lcmlora_lcm": 0.5}, lcmlora.PipelineError, "no style"),
    ]
    for styles, error, words in cases:
        with pytest.raises(error, match=words):
            lcmlora.set_styles(pipe, styles)
        assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_what_status_says_of_the_styles_can_be_given_back(fuse, files):
    pipe = sd_pipe()
    pipe.load_lora_weights(str(files["a"].parent), weight_name="a.safetensors", adapter_name="own")
    pipe.set_adapters("own", {"unet": {"down": 0.3, "up": 1.0}})
    found = lcmlora.status(pipe).styles
    assert found == {"own": {"unet": (0.3, 1.0)}}
    lcmlora.accelerate(pipe, lora=files["lcm"], styles=found, fuse=fuse)
    with_own = weights(pipe)
    lcmlora.set_styles(pipe, {**found, "b": Style(files["b"], 0.5)})
    both = lcmlora.status(pipe).styles
    assert both == {**found, "b": 0.5}
    for other in ({}, {"own": 0.4}, both, found):
        lcmlora.set_styles(pipe, other)
        lcmlora.set_styles(pipe, json.loads(json.dumps(found)))  # lists for tuples
        assert lcmlora.status(pipe).styles == found
        if fuse:
            assert_equal(weights(pipe), with_own)


def test_without_originals_styles_stay_as_they_are(files):
    pipe = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], keep=None)
    with pytest.raises(lcmlora.PipelineError, match="keep='memory'"):
        lcmlora.set_styles(pipe, {"a": files["a"]})


def test_originals_on_disk_are_one_file_that_goes_with_them(files, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pipe = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], keep="disk")
    (kept,) = tmp_path.glob("lcmlora-originals-*")
    status = lcmlora.status(pipe)
    assert (status.keep, status.kept_bytes) == ("disk", sum(w.nbytes for w in map_merged(pipe)))
    assert kept.stat().st_size >= status.kept_bytes
    lcmlora.restore(pipe)
    assert not kept.exists()


def map_merged(pipe):
    return [layer.weight for layer in lcmlora.layers.lcm_layers(pipe.unet).values()]


def test_a_full_disk_is_told_before_anything_is_touched(files, monkeypatch):
    pipe = sd_pipe()
    before = snapshot(pipe)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 4096}))
    with pytest.raises(lcmlora.PipelineError, match="TMPDIR"):
        lcmlora.accelerate(pipe, lora=files["lcm"], keep="disk")
    assert_same(before, snapshot(pipe))


def test_a_lora_loaded_meanwhile_is_removed_with_a_word(files):
    pipe = sd_pipe()
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=files["lcm"])
    pipe.load_lora_weights(str(files["a"].parent), weight_name="a.safetensors", adapter_name="late")
    with pytest.warns(lcmlora.LcmLoraWarning, match="'late'"):
        lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_siblings_see_the_new_styles(files):
    pipe = sd_pipe()
    sibling = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    lcmlora.accelerate(pipe, lora=files["lcm"])
    lcmlora.accelerate(sibling, lora=files["lcm"])
    lcmlora.set_styles(sibling, {"a": files["a"]})
    assert lcmlora.status(pipe).styles == {"a": 0.8}
