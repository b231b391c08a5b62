"""A LoRA at a smaller rank, against an SVD of what it adds."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lcmlora
from conftest import PIPES, sd_pipe, write_lora
from lcmlora.layers import lcm_layers
from lcmlora.lora.files import load, read
from lcmlora.lora.sources import Source
from lcmlora.testing import tiny_lora, tiny_pipeline


def added(path):
    """What a file adds to each module, as a matrix."""
    file = Source.of(path).find()
    info, found = read(file), {}
    with file.opened() as opened:
        for part, modules in {"unet": info.modules, **info.text_modules}.items():
            for name, pair in modules.items():
                up, down = load(file, pair, opened)
                found[part, name] = pair.scale * up @ down
    return found


@pytest.mark.parametrize("spelling", ["kohya", "diffusers", "peft"])
def test_each_layer_is_the_best_of_its_rank(spelling, tmp_path):
    pipe = tiny_pipeline("sdxl")
    source = tiny_lora(pipe, tmp_path / "a.safetensors", rank=6, spelling=spelling, text=spelling != "peft")
    made = lcmlora.resize_lora(source, 3, tmp_path / "b.safetensors")
    before, after = added(source), added(made.file)
    assert before.keys() == after.keys()
    shares, parts, wholes = {}, 0.0, 0.0
    for key, value in before.items():
        u, s, vh = torch.linalg.svd(value.double(), full_matrices=False)
        torch.testing.assert_close(after[key].double(), u[:, :3] * s[:3] @ vh[:3], atol=1e-6, rtol=1e-4)
        part, whole = s[:3].square().sum().item(), s.square().sum().item()
        shares[key[1]], parts, wholes = part / whole, parts + part, wholes + whole
    assert made.kept == pytest.approx(parts / wholes)
    assert made.least == pytest.approx((min(shares, key=shares.get), min(shares.values())))
    assert 0.3 < made.least[1] < made.kept < 1
    info = lcmlora.inspect_lora(made.file)
    assert (info.ranks, info.alphas, info.format) == ((3,), (3.0,), lcmlora.inspect_lora(source).format)


@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", PIPES)
def test_plain_diffusers_and_accelerate_take_it(kind, spelling, tmp_path):
    pipe = PIPES[kind]()
    source = write_lora(tmp_path / "a.safetensors", pipe.unet, rank=6, spelling=spelling)
    file = lcmlora.resize_lora(source, 5, tmp_path / "b.safetensors").file
    expected = added(file)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="x")
    scales = {module.scaling["x"] for module in pipe.unet.modules() if "x" in getattr(module, "lora_A", {})}
    assert scales == {1.0}
    assert len(expected) == len(lcm_layers(pipe.unet))
    other = PIPES[kind]()
    lcmlora.accelerate(other, lora=file)
    weights = {name: layer.weight for name, layer in lcm_layers(other.unet).items()}
    for name, layer in pipe.unet.named_modules():
        if name in weights:
            delta = layer.get_delta_weight("x")
            torch.testing.assert_close(layer.base_layer.weight + delta, weights[name], atol=1e-5, rtol=1e-4)


def test_a_lora_of_a_smaller_true_rank_loses_nothing(tmp_path):
    """Rank 4 of which only two are used, and a layer of rank 2 beside it, in half precision."""
    unet = sd_pipe().unet
    source = write_lora(tmp_path / "a.safetensors", unet, rank=4)
    small = write_lora(tmp_path / "s.safetensors", unet, rank=2, only=lambda name: name.endswith("conv1"))
    tensors = load_file(source)
    for key, value in tensors.items():
        if key.endswith("lora_down.weight"):
            value[2:] = value[:2]
    tensors |= load_file(small)
    save_file({key: value.half() for key, value in tensors.items()}, source)
    made = lcmlora.resize_lora(source, 2, tmp_path / "b.safetensors")
    assert made.kept == pytest.approx(1)
    assert made.least[1] == pytest.approx(1)
    before, after = added(source), added(made.file)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, atol=4e-3 * float(value.abs().max()), rtol=0)
    assert all(value.dtype == torch.float16 for key, value in load_file(made.file).items() if "alpha" not in key)


def test_layers_of_less_rank_are_filled_up(tmp_path):
    unet = sd_pipe().unet
    source = write_lora(tmp_path / "a.safetensors", unet, rank=6)
    small = write_lora(tmp_path / "s.safetensors", unet, rank=2, only=lambda name: name.endswith("conv1"))
    save_file(load_file(source) | load_file(small), source)
    made = lcmlora.resize_lora(source, 4, tmp_path / "b.safetensors")
    assert lcmlora.inspect_lora(made.file).ranks == (4,)
    before, after = added(source), added(made.file)
    conv = [key for key in before if key[1].endswith("conv1")]
    assert conv
    for key in conv:
        torch.testing.assert_close(after[key], before[key], atol=1e-5, rtol=1e-4)


def test_a_layer_that_adds_nothing_is_no_loss(tmp_path):
    source = write_lora(tmp_path / "a.safetensors", sd_pipe().unet, rank=4)
    save_file({key: value * ("lora_up" not in key) for key, value in load_file(source).items()}, source)
    made = lcmlora.resize_lora(source, 2, tmp_path / "b.safetensors")
    assert (made.kept, made.least[1]) == (1.0, 1.0)


def test_what_the_file_says_of_itself_stays(tmp_path):
    source = write_lora(tmp_path / "a.safetensors", sd_pipe().unet, rank=4, spelling="diffusers")
    adapter = {"unet.r": 4, "unet.lora_alpha": 16, "unet.target_modules": ["to_q"]}
    said = {"lcmlora_recipe": "tcd", "lora_adapter_metadata": json.dumps(adapter), "ss_network_dim": "4"}
    save_file(load_file(source), source, metadata=said)
    made = lcmlora.resize_lora(source, 2, tmp_path / "b.safetensors")
    with safe_open(made.file, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["lcmlora_recipe"], metadata["ss_network_dim"]) == ("tcd", "2")
    assert "lora_adapter_metadata" not in metadata
    assert json.loads(metadata["lcmlora_resized"]) == {"from": [4], "kept": made.kept}
    before, after = added(source), added(made.file)
    assert max(map(float, (value.norm() for value in after.values()))) > 2  # alpha 16 counts
    assert all(after[key].norm() <= before[key].norm() for key in before)


def test_what_can_t_be_resized_is_refused(tmp_path):
    unet = sd_pipe().unet
    source = write_lora(tmp_path / "a.safetensors", unet)
    out = tmp_path / "b.safetensors"
    for rank in (0, 4, 5, 1.5, True):
        with pytest.raises(lcmlora.LoraFileError, match=rf"rank={rank}: 1 to 3 is expected for a\.safetensors"):
            lcmlora.resize_lora(source, rank, out)
    with pytest.raises(lcmlora.LoraFileError, match="is the source itself; give another file"):
        lcmlora.resize_lora(source, 2, source)
    with pytest.raises(lcmlora.LoraFileError, match=r"a file that ends in \.safetensors is expected"):
        lcmlora.resize_lora(source, 2, tmp_path / "folder")
    with pytest.raises(lcmlora.LcmLoraError, match="can't be written"):
        lcmlora.resize_lora(source, 2, source / "b.safetensors")
    tensors = load_file(source)
    key = next(key for key in tensors if "to_q" in key and "lora_up" in key)
    scale = torch.ones(len(tensors[key]), 1)
    save_file({**tensors, key.replace("lora_up.weight", "dora_scale"): scale}, tmp_path / "d.safetensors")
    with pytest.raises(lcmlora.LoraFileError, match="is a DoRA"):
        lcmlora.resize_lora(tmp_path / "d.safetensors", 2, out)
    assert not out.exists()
