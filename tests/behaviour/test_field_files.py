"""LoRA files as they are met in the field (D1 to D7, B8, the file side of A1): each kind in several instances.

Where plain diffusers loads a file, what it makes of it is the judge.
"""

from __future__ import annotations

import gzip
import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, UNetMotionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import lcmlora
from conftest import PIPES, assert_same, sd_pipe, sdxl_pipe, snapshot, tiny_tokenizer, tiny_unet, tiny_vae, write_lora
from lcmlora import LcmLoraWarning, LoraFileError, LoraMismatchError, Style, moving
from lcmlora.layers import layers, lcm_layers
from lcmlora.lora.files import WEIGHT_NAME, HubOptions, Source, cover, read
from test_lora_files import (
    SPELLINGS,
    as_style,
    by_diffusers,
    by_hand,
    embeddings,
    halves,
    keys,
    kohya,
    processor,
    sgm,
    some,
    text_key,
    weights_of,
    xl_pipe,
)


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def pass_of(pipe) -> torch.Tensor:
    """What the UNet makes of fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    dtype, width = pipe.unet.dtype, pipe.unet.config.cross_attention_dim
    latents = torch.randn(1, 4, 8, 8, generator=generator).to(dtype)
    text = torch.randn(1, 4, width, generator=generator).to(dtype)
    with torch.no_grad():
        return pipe.unet(latents, 10, text).sample.float()


def close(one, other) -> bool:
    return torch.allclose(one, other, atol=1e-5, rtol=1e-4)


# -- D1: one layer in two spellings -----------------------------------------------------------------------------------

TWICE = {
    "kohya-and-sgm": (kohya, sgm),
    "sgm-and-kohya": (sgm, kohya),
    "peft-and-kohya": (SPELLINGS["peft"], kohya),
    "peft-and-sgm": (SPELLINGS["peft"], sgm),
    "diffusers-and-kohya": (SPELLINGS["diffusers"], kohya),
    "peft-and-diffusers": (SPELLINGS["peft"], SPELLINGS["diffusers"]),
    "peft-and-bare": (SPELLINGS["peft"], SPELLINGS["bare"]),
}


@pytest.mark.parametrize("case", TWICE)
def test_D1_of_two_spellings_the_one_that_diffusers_keeps(case, tmp_path):
    pipe, file = xl_pipe(), tmp_path / "twice.safetensors"
    tensors = {}
    for seed, spelling in enumerate(TWICE[case]):
        tensors |= keys(halves(lcm_layers(pipe.unet), seed=seed + 1), spelling)
    save_file(tensors, file)
    expected = weights_of(by_diffusers(xl_pipe(), file).unet)
    with pytest.warns(LcmLoraWarning, match="257 .*as diffusers does|as diffusers does: 257 ") as told:
        as_style(pipe, file)
    assert len(told) == 1
    torch.testing.assert_close(weights_of(pipe.unet), expected, atol=1e-5, rtol=1e-5)
    as_lcm = xl_pipe()
    with pytest.warns(LcmLoraWarning, match="the few-step LoRA, twice.safetensors"):
        lcmlora.accelerate(as_lcm, lora=file)
    torch.testing.assert_close(weights_of(as_lcm.unet), expected, atol=1e-5, rtol=1e-5)


def test_D1_processor_keys_beside_peft_keys(tmp_path):
    pipe, file = sd_pipe(), tmp_path / "twice.safetensors"
    wanted = some(lcm_layers(pipe.unet), r"attn1\.to_[qv]")
    save_file(keys(halves(wanted, seed=1), SPELLINGS["peft"]) | keys(halves(wanted, seed=2), processor), file)
    with pytest.warns(LcmLoraWarning, match="second spelling"):
        as_style(pipe, file)
    expected = by_hand(sd_pipe().unet, halves(wanted, seed=1))
    torch.testing.assert_close(weights_of(pipe.unet), expected, atol=1e-5, rtol=1e-5)


PARTLY = {"sgm-and-kohya": (sgm, kohya), "kohya-and-peft": (kohya, SPELLINGS["peft"])}
PARTLY |= {"sgm-and-peft": (sgm, SPELLINGS["peft"])}


@pytest.mark.parametrize("case", PARTLY)
def test_D1_a_part_in_both_spellings_keeps_what_diffusers_keeps(case, tmp_path):
    """One spelling for all layers, and the one that diffusers prefers for the attention alone."""
    (whole, part), pipe, file = PARTLY[case], xl_pipe(), tmp_path / "twice.safetensors"
    attention = some(lcm_layers(pipe.unet), r"attn\d\.to_q")
    save_file(keys(halves(lcm_layers(pipe.unet), seed=2), whole) | keys(halves(attention, seed=1), part), file)
    expected = weights_of(by_diffusers(xl_pipe(), file).unet)
    with pytest.warns(LcmLoraWarning, match="257 modules (with sgm block names|in kohya's format)"):
        as_style(pipe, file)
    torch.testing.assert_close(weights_of(pipe.unet), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(LoraMismatchError, match=r"covers \d+ of the 257 .*Left out, as diffusers does: 257"):
        lcmlora.accelerate(xl_pipe(), lora=file)


# -- D2: DoRA ---------------------------------------------------------------------------------------------------------


def dora_file(path: Path, pipe, change: Callable[[str], str] = str, text: bool = False, targets=("to_q", "conv1")):
    """A trained DoRA of the pipe, as diffusers saves it; `change` rewrites its keys."""
    parts = {"unet": (pipe.unet, list(targets)), **({"text_encoder": (pipe.text_encoder, ["q_proj"])} if text else {})}
    tensors = {}
    for part, (module, wanted) in parts.items():
        config = LoraConfig(r=3, lora_alpha=3, target_modules=wanted, use_dora=True, init_lora_weights=False)
        module.add_adapter(config, adapter_name="author")
        for name, parameter in module.named_parameters():
            if "magnitude" in name:
                parameter.data *= torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)) + 0.5
        state = get_peft_model_state_dict(module, adapter_name="author")
        tensors |= {change(f"{part}.{key}"): value.contiguous() for key, value in state.items()}
    save_file(tensors, path)
    return path


DORA_KEYS = {
    "peft": str,
    "with-weight": lambda key: key + ".weight" if key.endswith("magnitude_vector") else key,
    "with-adapter": lambda key: (
        key + ".default.weight" if key.endswith("vector") else key.replace(".weight", ".default.weight")
    ),
    "diffusers": lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
}


@pytest.mark.parametrize("fuse", ["auto", False])
@pytest.mark.parametrize("spelling", DORA_KEYS)
def test_D2_dora_does_as_adapter_what_plain_diffusers_makes_of_it(spelling, fuse, tmp_path):
    file = dora_file(tmp_path / "dora.safetensors", sd_pipe(), DORA_KEYS[spelling])
    plain, pipe = sd_pipe(), sd_pipe()
    plain.load_lora_weights(
        str(tmp_path),
        weight_name=dora_file(tmp_path / "plain.safetensors", sd_pipe()).name,
    )
    bare, before = pass_of(pipe), snapshot(pipe)
    as_style(pipe, file, fuse=fuse)
    assert not lcmlora.status(pipe).fused
    assert close(pass_of(pipe), pass_of(plain))
    assert (pass_of(pipe) - bare).abs().max() > 0.01
    plain.set_adapters(plain.get_active_adapters(), [0.4])
    lcmlora.set_styles(pipe, {"s": 0.4})
    assert close(pass_of(pipe), pass_of(plain))
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_D2_dora_in_fp16(tmp_path):
    file = dora_file(tmp_path / "dora.safetensors", sd_pipe())
    plain, pipe = sd_pipe().to(torch.bfloat16), sd_pipe().to(torch.bfloat16)
    plain.load_lora_weights(str(tmp_path), weight_name=file.name)
    as_style(pipe, file)
    assert torch.equal(pass_of(pipe), pass_of(plain))


@pytest.mark.parametrize("where", ["unet", "text"])
def test_D2_dora_is_not_merged_and_says_why(where, tmp_path):
    author = sd_pipe()
    file = dora_file(tmp_path / "dora.safetensors", author, text=where == "text")
    if where == "text":
        save_file({key: value for key, value in load_file(file).items() if key.startswith("text")}, file)
    pipe = sd_pipe()
    before = snapshot(pipe)
    with pytest.raises(lcmlora.PipelineError, match=r"fuse=True is impossible here: .*dora.safetensors is a DoRA"):
        as_style(pipe, file, fuse=True)
    assert_same(before, snapshot(pipe))
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    lcmlora.accelerate(pipe, lora=lcm)
    lcmlora.set_styles(pipe, {"d": Style(file, 1.0)})
    assert lcmlora.status(pipe).fused == (where == "text")  # the part that it is in gets adapters
    if where == "text":  # transformers' own loader loses the magnitudes
        assert all(close(*pair) for pair in zip(embeddings(pipe), embeddings(author), strict=True))
    lcmlora.set_styles(pipe, {})
    assert lcmlora.status(pipe).fused
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def dora_by_hand(weight, down, up, magnitude) -> torch.Tensor:
    """W' = m (W + up @ down) / |W + up @ down|, a row at a time."""
    whole = (weight.flatten(1) + up.flatten(1) @ down.flatten(1)).double()
    return (magnitude.flatten()[:, None] * whole / whole.norm(dim=1, keepdim=True)).view_as(weight)


def test_D2_kohyas_dora_scale_counts(tmp_path):
    """Plain diffusers 0.42 is no judge here: it drops `dora_scale` and draws with the rest."""
    pipe, file, expected = sd_pipe(), tmp_path / "dora.safetensors", sd_pipe()
    made = halves(some(lcm_layers(pipe.unet), r"attn1\.to_q|resnets\.0\.conv1"))
    tensors = keys(made, kohya)
    for name, (down, up) in made.items():
        layer = expected.unet.get_submodule(name)
        scale = torch.rand(len(up), *(1,) * (down.ndim - 1)) + 0.5
        tensors[kohya(name).replace("lora_{}.weight", "dora_scale")] = scale
        layer.weight.data.copy_(dora_by_hand(layer.weight.data, down, up, scale))
    save_file(tensors, file)
    as_style(pipe, file)
    assert close(pass_of(pipe), pass_of(expected))


def test_D2_layers_without_magnitudes_stay_plain_loras(tmp_path):
    pipe, file, expected = sd_pipe(), tmp_path / "dora.safetensors", sd_pipe()
    made = halves(some(lcm_layers(pipe.unet), r"attn1\.to_[qv]"))
    tensors = keys(made, SPELLINGS["peft"])
    for name, (down, up) in made.items():
        layer = expected.unet.get_submodule(name)
        if name.endswith("to_q"):
            tensors[f"unet.{name}.lora_magnitude_vector"] = magnitude = torch.rand(len(up)) + 0.5
            layer.weight.data.copy_(dora_by_hand(layer.weight.data, down, up, magnitude))
        else:
            layer.weight.data += up @ down
    save_file(tensors, file)
    before = snapshot(pipe)
    as_style(pipe, file)
    assert close(pass_of(pipe), pass_of(expected))
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


OTHER_KINDS = {
    "LoHa": "lora_unet_x.hada_w1_a",
    "LoKr": "lora_unet_x.lokr_w1",
    "Tucker core": "lora_unet_x.lora_mid.weight",
    "whole differences": "lora_unet_x.diff",
    "whole differences of weights": "lora_unet_x.diff_b",
    "biases": "unet.x.lora_B.bias",
    "IA3": "lora_unet_x.on_input",
    "OFT": "lora_unet_x.oft_blocks",
    "embedding": "text_encoder.token_embedding.lora_embedding_A",
    "textual inversion": "bundle_emb.fox.string_to_param.*",
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_D2_other_kinds_of_adapters_are_named(kind, tmp_path):
    file = write_lora(tmp_path / "s.safetensors", sd_pipe().unet, extra={OTHER_KINDS[kind]: torch.ones(4, 4)})
    with pytest.raises(LoraFileError, match=f"is no plain LoRA but .*{kind}"):
        lcmlora.inspect_lora(file)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (7,)])
def test_D2_magnitudes_of_another_shape_are_refused(shape, tmp_path):
    """kohya's may be by input: (1, in, 1, 1). The first layer has 8 outputs and 8 inputs."""
    key = "lora_unet_down_blocks_0_resnets_0_conv1.dora_scale"
    file = write_lora(tmp_path / "s.safetensors", sd_pipe().unet, extra={key: torch.ones(shape)})
    with pytest.raises(LoraFileError, match=r"dora_scale is of shape .* one magnitude for each of the 8 outputs"):
        lcmlora.inspect_lora(file)


# -- D3: text encoders that are shorter, or not there -----------------------------------------------------------------


def text_file(path: Path, pipe, spelling: str = "peft", unet: bool = True) -> Path:
    tensors = keys(halves(some(lcm_layers(pipe.unet), r"attn1\.to_q")), SPELLINGS["peft"]) if unet else {}
    for part in ("text_encoder", "text_encoder_2"):
        if module := getattr(pipe, part, None):
            made = halves(layers(module), ranks=(3,))
            tensors |= keys(made, lambda name, part=part: text_key(spelling, part, name))
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("spelling", ["peft", "lora_te_", "lora_linear_layer"])
def test_D3_keys_for_layers_that_were_cut_off_are_left_out(spelling, fuse, tmp_path):
    file = text_file(tmp_path / "s.safetensors", sd_pipe(), spelling, unet=False)
    plain, pipe = sd_pipe(), sd_pipe()
    for each in (plain, pipe):
        each.text_encoder.encoder.layers = each.text_encoder.encoder.layers[:1]
    plain.load_lora_weights(str(tmp_path), weight_name=file.name)
    with pytest.warns(LcmLoraWarning, match="6 modules are left out, .*text_encoder has no such layers") as told:
        as_style(pipe, file, fuse=fuse)
    assert len(told) == 1
    assert all(close(*pair) for pair in zip(embeddings(pipe), embeddings(plain), strict=True))


@pytest.mark.parametrize(
    ("kind", "gone", "count"),
    [
        ("sd", ["text_encoder"], 12),
        ("sdxl", ["text_encoder"], 12),
        ("sdxl", ["text_encoder_2"], 13),
        ("sdxl", ["text_encoder", "text_encoder_2"], 12),
    ],
)
def test_D3_keys_for_an_encoder_that_is_not_there_are_left_out(kind, gone, count, tmp_path):
    file = text_file(tmp_path / "s.safetensors", PIPES[kind]())
    pipe, whole = PIPES[kind](), PIPES[kind]()
    for part in gone:
        setattr(pipe, part, None)
    with pytest.warns(LcmLoraWarning, match=f"{count} modules are left out, as this pipe has no {gone[0]}") as told:
        as_style(pipe, file)
    assert len(told) == 1
    torch.testing.assert_close(weights_of(pipe.unet), weights_of(as_style(whole, file).unet))
    lcmlora.restore(pipe)


def test_D3_keys_for_cut_layers_alone(tmp_path):
    pipe, file = sd_pipe(), text_file(tmp_path / "s.safetensors", sd_pipe())
    save_file({key: value for key, value in load_file(file).items() if "layers.0" not in key}, file)
    pipe.text_encoder.encoder.layers = pipe.text_encoder.encoder.layers[:1]
    with pytest.warns(LcmLoraWarning, match="6 modules are left out"):
        as_style(pipe, file)


def test_D3_what_does_not_fit_stays_an_error(tmp_path):
    wide = sd_pipe()
    wide.text_encoder = nn.Module()
    wide.text_encoder.fc1 = nn.Linear(64, 64)
    file = text_file(tmp_path / "s.safetensors", sd_pipe(), unet=False)
    with pytest.raises(LoraMismatchError, match="does not fit this pipe's text_encoder"):
        as_style(wide, file)
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("fc1.lora_A.weight"))
    save_file(tensors | {key: torch.ones(3, 64)}, file)
    pipe = sd_pipe()
    pipe.text_encoder.encoder.layers = pipe.text_encoder.encoder.layers[:1]
    with pytest.raises(LoraMismatchError, match="1 have other shapes"):
        as_style(pipe, file)
    pipe.text_encoder = None
    with pytest.raises(LoraMismatchError, match="has nothing for this pipe: 12 modules are left out"):
        as_style(pipe, file)


# -- D4: names and numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0a1b2c3d4e5f", "lora.bin", "lora.safetensors.tmp", "lora.ckpt", "lora.v1.0"])
def test_D4_the_header_decides_and_not_the_name(name, tmp_path):
    pipe = sd_pipe()
    file = write_lora(tmp_path / "good.safetensors", pipe.unet)
    other = Path(shutil.copy(file, tmp_path / name))
    assert lcmlora.status(lcmlora.accelerate(pipe, lora=other)).lora == str(other)
    assert lcmlora.inspect_lora(tmp_path, name).modules == lcmlora.inspect_lora(file).modules


@pytest.mark.parametrize("name", ["lora.safetensors", "lora", "lora.bin"])
@pytest.mark.parametrize("way", ["zip", "legacy", "pickle"])
def test_D4_a_pickle_is_refused_whatever_its_name(way, name, tmp_path):
    file, tensors = tmp_path / name, {"unet.x.lora_A.weight": torch.ones(1)}
    if way == "pickle":
        file.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(LoraFileError, match=r"is a pickle.*can run code"):
        lcmlora.inspect_lora(file)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("alpha", [1e-3, 1e-6, 0.0, -2.0, 5e3])
def test_D4_any_finite_alpha_as_plain(alpha, fuse, tmp_path):
    pipe, file = sd_pipe(), tmp_path / "s.safetensors"
    save_file(keys(halves(some(lcm_layers(pipe.unet), "to_q")), kohya, lambda name: torch.tensor(alpha)), file)
    expected = weights_of(by_diffusers(sd_pipe(), file).unet)
    as_style(pipe, file, fuse=fuse)
    assert lcmlora.status(pipe).styles == {"s": 1.0}
    if not fuse:
        pipe.fuse_lora()
    torch.testing.assert_close(weights_of(pipe.unet), expected, atol=1e-5, rtol=1e-4)


# -- D5, D7, E8: what a LoRA is given as ------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_D5_a_dict_of_tensors_does_what_its_file_does(spelling, fuse, tmp_path):
    pipe, other = sd_pipe(), sd_pipe()
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    style = write_lora(tmp_path / "s.safetensors", pipe.unet, seed=2, spelling=spelling)
    lcmlora.accelerate(other, lora=lcm, styles={"s": style}, fuse=fuse)
    before = snapshot(pipe)
    tensors, bare = load_file(lcm), load_file(style)
    for options in (dict(styles={"s": bare}), dict(styles={"s": Style(bare, 0.8)})):
        lcmlora.accelerate(pipe, lora=tensors, fuse=fuse, **options)
    assert lcmlora.status(pipe).lora == f"a dict of {len(tensors)} tensors"
    assert torch.equal(pass_of(pipe), pass_of(other))
    lcmlora.set_styles(pipe, {"s": 0.3})
    lcmlora.set_styles(other, {"s": 0.3})
    assert torch.equal(pass_of(pipe), pass_of(other))
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_D5_a_dict_is_checked_as_a_file_is():
    unet = sd_pipe().unet
    layer = next(iter(lcm_layers(unet)))
    a, b = f"unet.{layer}.lora_A.weight", f"unet.{layer}.lora_B.weight"
    good = {a: torch.ones(2, 8, 3, 3), b: torch.ones(8, 2, 1, 1)}
    assert Style(good) == Style(good) != Style(dict(good))
    assert hash(Style(good)) == hash(Style(good))
    assert repr(Style(good)).count("tensor") == 1
    bad = {
        "no tensor to": {**good, b: [1.0]},
        "not 5 to": {5: torch.ones(1)},
        "no values of its own": {**good, b: torch.ones(8, 2, device="meta")},
        "halves are floating": {**good, b: torch.ones(8, 2, 1, 1, dtype=torch.int32)},
        "holds no LoRA": {},
        "both halves": {a: good[a]},
        "NaN or infinity": {**good, b: torch.full((8, 2, 1, 1), torch.nan)},
    }
    for words, tensors in bad.items():
        with pytest.raises(LoraFileError, match=words.removeprefix("no tensor to") or "to list"):
            lcmlora.accelerate(sd_pipe(), lora=load_of(unet), styles={"s": tensors})


def load_of(unet) -> dict[str, torch.Tensor]:
    made = halves(lcm_layers(unet))
    return keys(made, SPELLINGS["peft"])


@pytest.mark.parametrize("given", [("a.safetensors", 0.5), ["a"], None, 5, 0.5, b"a", object(), True, "", {1, 2}])
def test_D5_anything_else_is_refused_with_what_to_type(given, tmp_path):
    words = r"is no LoRA source: give a file, .*lcmlora\.Style\(source, weight\)\."
    number = isinstance(given, int | float)  # a weight for a style, which has to be known then
    making = (Style, Style.of, lambda given: lcmlora.accelerate(sd_pipe(), styles={"s": given}))
    for make in making[: 2 if number else 3]:
        with pytest.raises(LoraFileError, match=words) as told:
            make(given)
        assert len(str(told.value)) < 300
    if given is not None:
        with pytest.raises(LoraFileError, match=words):
            lcmlora.accelerate(sd_pipe(), lora=given)
    pipe = lcmlora.accelerate(sd_pipe(), lora=load_of(sd_pipe().unet))
    if not number:
        with pytest.raises(LoraFileError, match=words):
            lcmlora.set_styles(pipe, {"s": given})


@pytest.mark.parametrize("name", ["weight_name", "subfolder", "revision"])
def test_D5_names_are_strings(name):
    with pytest.raises(LoraFileError, match=f"{name}=0.5: a string is expected"):
        Style("owner/name", **{name: 0.5})


def test_E8_one_file_in_every_spelling_is_one_source(tmp_path, monkeypatch):
    pipe = sd_pipe()
    file = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    spelled = [file, str(file), "lcm.safetensors", Path("lcm.safetensors"), "./lcm.safetensors", "~/lcm.safetensors"]
    assert len({Source.of(each) for each in spelled}) == len({Style(each) for each in spelled}) == 1
    for each in spelled:  # the same acceleration each time
        lcmlora.accelerate(pipe, lora=each, styles={"s": each}, cache_dir=tmp_path)
    lcmlora.accelerate(pipe, lora=file, styles={"s": Style(str(file), 0.8)}, cache_dir=str(tmp_path))
    assert Source.of("owner/name").where == "owner/name"
    assert Source.of("owner/name.safetensors").where == str(tmp_path / "owner/name.safetensors")
    assert HubOptions(token="secret").__repr__().count("secret") == 0


COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cache(tmp_path):
    """The hub's cache with two repositories of two revisions each, and a LoRA in a subfolder too."""
    for seed, repository in enumerate(("owner/lcm", "owner/style")):
        root = tmp_path / "cache" / f"models--{repository.replace('/', '--')}"
        for number, (name, commit) in enumerate(COMMITS.items()):
            if (repository, name) == ("owner/style", "v2"):
                continue
            for folder in (".", "sub"):
                place = root / "snapshots" / commit / folder
                place.mkdir(parents=True, exist_ok=True)
                one = 10 * seed + 2 * number + (folder == "sub")
                write_lora(place / WEIGHT_NAME, sd_pipe().unet, seed=one)
            (root / "refs").mkdir(exist_ok=True)
            (root / "refs" / name).write_text(commit)
    return tmp_path / "cache"


def test_D7_each_source_has_its_own_revision(cache):
    options = dict(cache_dir=cache, local_files_only=True)
    pipe = lcmlora.accelerate(sd_pipe(), lora="owner/lcm", revision="v2", styles={"s": "owner/style"}, **options)
    assert COMMITS["v2"] in lcmlora.status(pipe).lora
    lcmlora.set_styles(pipe, {"t": Style("owner/style", revision="main")})
    with pytest.raises(LoraFileError, match=r"hf download owner/style .* --revision v2"):
        lcmlora.set_styles(pipe, {"u": Style("owner/style", revision="v2")})


@pytest.mark.parametrize("revision", [None, "main", "v2", "b" * 40])
@pytest.mark.parametrize("subfolder", [None, "sub", Path("sub")])
def test_D7_subfolder_and_revision_of_a_repository(subfolder, revision, cache):
    found = Source.of("owner/lcm", subfolder=subfolder, revision=revision).find(HubOptions(cache))
    assert found.path.parent.name == ("sub" if subfolder else found.path.parent.name)
    assert COMMITS.get(revision or "main", revision) in str(found.path)
    assert read(found).modules
    info = lcmlora.inspect_lora("owner/lcm", subfolder=subfolder, revision=revision, cache_dir=cache)
    assert info.path == found.path


def test_D7_subfolder_of_a_folder(cache, tmp_path):
    folder = cache / "models--owner--lcm" / "snapshots" / COMMITS["main"]
    assert Source.of(folder, subfolder="sub").find().path == folder / "sub" / WEIGHT_NAME
    with pytest.raises(LoraFileError, match="subfolder"):
        Source.of(folder.parent).find()
    with pytest.raises(LoraFileError, match=r"folder .*/nowhere holds no"):
        Source.of(folder, subfolder="nowhere").find()


def test_D7_an_error_without_words_is_none_of_ours(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise RuntimeError

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(LoraFileError, match="RuntimeError"):
        Source.of("owner/name").find()


# -- D6: what is no LoRA at all ---------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:8f90d840e0\nsize 134621556\n"
NO_LORA = {
    "LFS pointer": (POINTER, "Git LFS pointer.*git lfs pull"),
    "HTML": (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "an HTML page"),
    "HTML after a mark": ("\ufeff\n <html lang='en'>Zugriff verweigert: ä</html>".encode(), "an HTML page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is XML|an XML document.*AccessDenied"),
    "JSON": (b'{"error":"Repository not found"}', "is JSON.*Repository not found"),
    "text": (b"Entry not found", "a text file.*Entry not found"),
    "empty": (b"", "is empty"),
    "gzip": (gzip.compress(b"x" * 999), "compressed with gzip"),
    "GGUF": (b"GGUF" + bytes(99), "a GGUF file"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG picture"),
    "rubbish": (bytes(range(128, 256)), "can't be read as safetensors"),
}


@pytest.mark.parametrize("case", NO_LORA)
def test_D6_what_is_no_lora_is_named(case, tmp_path):
    content, words = NO_LORA[case]
    pipe, file = sd_pipe(), tmp_path / WEIGHT_NAME
    file.write_bytes(content)
    before = snapshot(pipe)
    for source in (file, tmp_path):
        with pytest.raises(LoraFileError, match=words) as told:
            lcmlora.accelerate(pipe, lora=source)
        assert str(file) in str(told.value)
    assert_same(before, snapshot(pipe))


def test_D6_a_zip_that_is_no_pickle(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.safetensors", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(LoraFileError, match="is a zip archive"):
        lcmlora.inspect_lora(tmp_path / "s.safetensors")


# -- B8: the file goes away -------------------------------------------------------------------------------------------


def delete(file: Path) -> None:
    file.unlink()


def move(file: Path) -> None:
    file.rename(file.with_name("moved.safetensors"))


def rewrite(file: Path) -> None:
    write_lora(file, sd_pipe().unet, seed=9)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def swap_link(file: Path) -> None:
    other = shutil.copy2(file, file.with_name("other.safetensors"))
    file.unlink()
    file.symlink_to(other)


def to_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def rewrite_to_pointer(file: Path) -> None:
    file.write_bytes(POINTER)


GONE = {"delete": delete, "move": move, "rewrite": rewrite, "truncate": truncate, "swap_link": swap_link}
GONE |= {"folder": to_folder, "pointer": rewrite_to_pointer}


@pytest.mark.parametrize("which", ["s", "lcm"])
@pytest.mark.parametrize("way", GONE)
def test_B8_a_file_that_is_gone_or_changed_is_told_and_nothing_is_touched(way, which, tmp_path):
    pipe = sd_pipe()
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    style = write_lora(tmp_path / "s.safetensors", pipe.unet, only=lambda name: "to_q" in name, seed=2)
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=lcm, styles={"s": style})
    state = snapshot(pipe)
    GONE[way]({"s": style, "lcm": lcm}[which])
    with pytest.raises(LoraFileError, match=rf"{which}\.safetensors (is gone|was changed) since it was read.*Style\("):
        lcmlora.set_styles(pipe, {"s": 0.3})
    assert_same(state, snapshot(pipe))
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_B8_another_working_folder_does_no_harm(tmp_path, monkeypatch):
    pipe, other = sd_pipe(), sd_pipe()
    write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    (tmp_path / "there").mkdir()
    write_lora(tmp_path / "there" / "lcm.safetensors", pipe.unet, seed=5)
    monkeypatch.chdir(tmp_path)
    style = Style("lcm.safetensors", 0.5)
    lcmlora.accelerate(pipe, lora="lcm.safetensors", styles={"s": style})
    lcmlora.accelerate(other, lora=tmp_path / "lcm.safetensors", styles={"s": Style("lcm.safetensors", 0.3)})
    monkeypatch.chdir(tmp_path / "there")
    lcmlora.set_styles(pipe, {"s": 0.3})
    assert all(torch.equal(*pair) for pair in zip(pipe.unet.parameters(), other.unet.parameters(), strict=True))
    assert style.origin.find().path == tmp_path / "lcm.safetensors"


def test_B8_between_planning_and_merging(tmp_path, monkeypatch):
    pipe = sd_pipe()
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    before, real = snapshot(pipe), moving.make_plan

    def make(*args):
        made = real(*args)
        lcm.unlink()
        return made

    monkeypatch.setattr(moving, "make_plan", make)
    for fuse in (True, False):
        with pytest.raises(LoraFileError, match="is gone since it was read"):
            lcmlora.accelerate(pipe, lora=lcm, fuse=fuse)
        assert_same(before, snapshot(pipe))
        write_lora(lcm, pipe.unet)


def test_B8_a_dict_that_is_written_to(tmp_path):
    pipe = sd_pipe()
    tensors = load_of(pipe.unet)
    lcmlora.accelerate(pipe, lora=tensors)
    tensors.clear()  # the dict may go, its tensors were kept
    lcmlora.set_styles(pipe, {})
    tensors = load_of(pipe.unet)
    lcmlora.set_styles(pipe, {"s": tensors})
    next(iter(tensors.values())).mul_(2)
    with pytest.raises(LoraFileError, match="was written to since it was read"):
        lcmlora.set_styles(pipe, {"s": 0.2})


def test_B8_check_reads_nothing(tmp_path, monkeypatch):
    file = Source.of(write_lora(tmp_path / "lcm.safetensors", sd_pipe().unet)).find()
    lora = lcmlora.lora.merge.FileLora(file, read(file).modules)
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr("lcmlora.lora.sources.safe_open", None)
    lora.file.check()
    os.utime(file.path, ns=(1, 1))
    with pytest.raises(LoraFileError, match="was changed"):
        lora.file.check()


# -- A1: motion LoRAs -------------------------------------------------------------------------------------------------


def motion_unet() -> UNetMotionModel:
    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    )
    return UNetMotionModel.from_unet2d(tiny_unet(), adapter)


def animatediff(name: str) -> str:
    own = name.replace("transformer_blocks", "temporal_transformer.transformer_blocks")
    own = own.replace("attn1", "attention_blocks.0").replace("attn2", "attention_blocks.1")
    return processor(own).removeprefix("unet.")


MOTION_SPELLINGS = {
    "processor": processor,
    "peft": SPELLINGS["peft"],
    "diffusers": SPELLINGS["diffusers"],
    "kohya": kohya,
    "animatediff": animatediff,
}


@pytest.mark.parametrize("spelling", MOTION_SPELLINGS)
def test_A1_motion_loras_are_matched_with_the_motion_modules(spelling, tmp_path):
    unet, file = motion_unet(), tmp_path / "pan.safetensors"
    everything = {name: m for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    wanted = some(everything, r"motion_modules\.\d+\.transformer_blocks\.0\.attn\d\.to_")
    assert len(wanted) == 56
    save_file(keys(halves(wanted), MOTION_SPELLINGS[spelling]), file)
    modules = lcmlora.inspect_lora(file).modules
    coverage = cover("unet", modules, everything)
    assert (set(coverage.pairs), coverage.clashes, coverage.foreign) == (set(wanted), (), ())
    assert len(cover("unet", modules, layers(unet)).foreign) == 56
    if spelling in ("animatediff", "kohya"):  # names that plain diffusers does not load
        return
    plain = AnimateDiffPipeline(tiny_vae(), None, tiny_tokenizer(), motion_unet(), None, scheduler=sd_pipe().scheduler)
    plain.load_lora_weights(str(tmp_path), weight_name=file.name)
    loaded = {name for name, module in plain.unet.named_modules() if getattr(module, "lora_A", None)}
    assert loaded == set(wanted)


def test_sdxl_takes_a_dict_too(tmp_path):
    """The text halves of a dict reach both encoders."""
    pipe, other = sdxl_pipe(), sdxl_pipe()
    file = text_file(tmp_path / "s.safetensors", pipe)
    as_style(other, file)
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    lcmlora.accelerate(pipe, lora=lcm, weight=0.0, styles={"s": Style(load_file(file), 1.0)})
    assert all(torch.equal(*pair) for pair in zip(embeddings(pipe), embeddings(other), strict=True))
