"""Field cases E1 to E9, and that accelerate, set_styles and restore say what shall be."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from test_field_before import embedded, passed, text_style

import lcmlora
from conftest import PIPES, assert_same, sd_pipe, snapshot, write_lora
from lcmlora import LoraFileError, PipelineError, Style
from lcmlora.transition import transaction


@pytest.fixture
def files(tmp_path):
    pipe = sd_pipe()
    return {
        "lcm": write_lora(tmp_path / "lcm.safetensors", pipe.unet),
        "lcm2": write_lora(tmp_path / "lcm2.safetensors", pipe.unet, seed=4),
        "ink": text_style(tmp_path / "ink.safetensors", pipe),
        "b": write_lora(tmp_path / "b.safetensors", pipe.unet, only=lambda n: "to_v" in n, seed=9),
    }


@pytest.fixture
def merges(monkeypatch):
    """How often something was merged."""
    count, real = [], transaction.merge

    def merge(*args):
        count.append(1)
        return real(*args)

    monkeypatch.setattr(transaction, "merge", merge)
    return count


def same_weights(one, other):
    pairs = zip(one.unet.named_parameters(), other.unet.named_parameters(), strict=True)
    return all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs) and torch.equal(
        embedded(one), embedded(other)
    )


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_E1_the_same_styles_again_cost_nothing(fuse, files, merges):
    pipe = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], fuse=fuse)
    lcmlora.set_styles(pipe, {"ink": Style(files["ink"], 0.5)})
    state, count = snapshot(pipe), len(merges)
    for styles in ({"ink": Style(files["ink"], 0.5)}, {"ink": 0.5}, {"ink": Style(str(files["ink"]), 0.5)}):
        lcmlora.set_styles(pipe, styles)
        assert_same(state, snapshot(pipe))
    assert len(merges) == count


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_E1_a_name_may_get_another_file(fuse, files):
    pipe = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], styles={"s": files["ink"]}, fuse=fuse)
    lcmlora.set_styles(pipe, {"s": Style(files["b"], 0.5)})
    fresh = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], styles={"s": Style(files["b"], 0.5)}, fuse=fuse)
    assert torch.equal(passed(pipe), passed(fresh))
    assert torch.equal(embedded(pipe), embedded(fresh))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_E2_a_name_once_given_is_remembered(fuse, files):
    pipe = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], styles={"ink": Style(files["ink"], 0.5)}, fuse=fuse)
    expected = passed(pipe)
    lcmlora.set_styles(pipe, {})
    assert lcmlora.status(pipe).styles == {}
    lcmlora.set_styles(pipe, {"ink": 0.5})
    assert torch.equal(passed(pipe), expected)
    lcmlora.accelerate(pipe, styles={"b": files["b"]})
    lcmlora.accelerate(pipe, styles={"ink": 0.5})
    assert torch.equal(passed(pipe), expected)


SETTINGS = [
    {"steps": 6},
    {"guidance": 1.5},
    {"guidance": None},
    {"strict": True},
    {"cache_prompts": 4},
    {"enforce_inference_steps": False},
    {"vae": "itself"},
]


@pytest.mark.parametrize("said", SETTINGS, ids=str)
def test_E3_settings_of_the_pipe_need_no_merge(said, files, merges):
    pipe = sd_pipe()
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=files["lcm"], styles={"ink": files["ink"]})
    count, status = len(merges), lcmlora.status(pipe)
    if "vae" in said:
        said = {"vae": sd_pipe(3).vae}
    lcmlora.accelerate(pipe, **said)
    assert len(merges) == count
    now = lcmlora.status(pipe)
    assert (now.styles, now.lora, now.weight) == (status.styles, status.lora, status.weight)
    for name in ("steps", "guidance"):
        assert getattr(now, name) == said.get(name, getattr(status, name))
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


CHANGES = {
    "styles": {"styles": {"b": "b"}},
    "no styles": {"styles": {}},
    "weight": {"weight": 0.5},
    "lora": {"lora": "lcm2"},
    "unfused": {"fuse": False},
    "fused": {"fuse": True},
    "disk": {"keep": "disk"},
    "memory": {"keep": "memory"},
    "all": {"lora": "lcm2", "weight": 0.7, "styles": {"ink": "ink", "b": "b"}, "fuse": "auto", "steps": 5},
}


def with_files(said, files):
    said = dict(said)
    if isinstance(said.get("lora"), str):
        said["lora"] = files[said["lora"]]
    if said.get("styles"):
        said["styles"] = {name: Style(files[file], 0.6) for name, file in said["styles"].items()}
    return said


@pytest.mark.parametrize(("first", "then"), itertools.permutations(CHANGES, 2))
def test_E3_moving_equals_a_fresh_start(first, then, files):
    """Whatever was before: what is said counts, and what is not said stays."""
    pipe = sd_pipe()
    before = snapshot(pipe)
    start = {"lora": "lcm", "styles": {"ink": "ink"}}
    said = {**start, **CHANGES[first], **CHANGES[then]}
    lcmlora.accelerate(pipe, **with_files(start, files))
    lcmlora.accelerate(pipe, **with_files(CHANGES[first], files))
    lcmlora.accelerate(pipe, **with_files(CHANGES[then], files))
    fresh = lcmlora.accelerate(sd_pipe(), **with_files(said, files))
    assert torch.equal(passed(pipe), passed(fresh))
    assert torch.equal(embedded(pipe), embedded(fresh))
    one, other = lcmlora.status(pipe), lcmlora.status(fresh)
    assert (one.fused, one.keep, one.lora, one.steps) == (other.fused, other.keep, other.lora, other.steps)
    assert one.kept_bytes == other.kept_bytes
    assert one.styles == pytest.approx(other.styles)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_E3_styles_after_all_were_switched_off_count(files):
    pipe = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], styles={"ink": files["ink"]})
    lcmlora.set_styles(pipe, {})
    lcmlora.accelerate(pipe, styles={"ink": files["ink"]})
    assert lcmlora.status(pipe).styles == pytest.approx({"ink": 0.8})


@pytest.mark.parametrize(
    "said", [{"weight": 0.5}, {"lora": "lcm2"}, {"fuse": False}, {"keep": "memory"}, {"styles": {}}]
)
def test_E3_without_originals_what_needs_them_is_refused(said, files):
    pipe = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], styles={"b": files["b"]}, keep=None)
    state = snapshot(pipe)
    with pytest.raises(PipelineError, match="keep=None"):
        lcmlora.accelerate(pipe, **with_files(said, files))
    assert_same(state, snapshot(pipe))
    lcmlora.accelerate(pipe, steps=5, styles={"b": files["b"]})
    assert lcmlora.status(pipe).steps == 5


@pytest.mark.parametrize(
    "said", [{"base": "sdxl"}, {"lora": "nowhere at all"}, {"styles": {"x": 0.5}}, {"fuse": "yes"}]
)
def test_E3_a_move_that_is_refused_changes_nothing(said, files):
    pipe = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], styles={"ink": files["ink"]})
    state, status = snapshot(pipe), lcmlora.status(pipe)
    with pytest.raises(lcmlora.LcmLoraError):
        lcmlora.accelerate(pipe, steps=7, **said)
    assert_same(state, snapshot(pipe))
    assert lcmlora.status(pipe) == status


@pytest.mark.parametrize("content", ["photo.png", ".git/config", "model.safetensors", "unet/config.json"])
def test_E4_bake_replaces_nothing_but_a_checkpoint(content, files, tmp_path):
    pipe = lcmlora.accelerate(sd_pipe(), lora=files["lcm"])
    mine = tmp_path / "mystuff" / content
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for overwrite in (True, False):
        with pytest.raises(PipelineError, match="is no checkpoint: bake replaces nothing else"):
            lcmlora.bake(pipe, tmp_path / "mystuff", overwrite=overwrite)
    assert mine.read_text() == "mine"
    folder = lcmlora.bake(pipe, tmp_path / "baked")
    with pytest.raises(PipelineError, match="overwrite=True"):
        lcmlora.bake(pipe, folder)
    lcmlora.bake(pipe, folder, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PipelineError, match="no checkpoint"):
        lcmlora.bake(pipe, tmp_path / "file", overwrite=True)
    shutil.rmtree(folder)
    folder.mkdir()
    lcmlora.bake(pipe, folder)


@pytest.mark.parametrize(
    "styles", [["a"], "a.safetensors", 5, [("a", 0.5)], {1: "x"}, {"a": None}, {"a": [1]}, {"": 0.5}]
)
def test_E5_styles_of_another_kind_are_told_in_one_sentence(styles, files):
    pipe = sd_pipe()
    before = snapshot(pipe)
    with pytest.raises((PipelineError, LoraFileError)) as told:
        lcmlora.accelerate(pipe, lora=files["lcm"], styles=styles)
    assert len(str(told.value)) < 400
    assert_same(before, snapshot(pipe))
    lcmlora.accelerate(pipe, lora=files["lcm"])
    with pytest.raises((PipelineError, LoraFileError)):
        lcmlora.set_styles(pipe, styles)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", 5])
def test_E5_a_vae_that_is_none_is_told_briefly(part, files):
    pipe = sd_pipe()
    given = getattr(pipe, part) if isinstance(part, str) else part
    with pytest.raises(PipelineError) as told:
        lcmlora.accelerate(pipe, lora=files["lcm"], vae=given)
    assert len(str(told.value)) < 300


ODD_VALUES = [
    *({"keep": pytest}, {"fuse": torch.nn.Linear(9, 9)}, {"compile": "all"}, {"base": 5}, {"cache_prompts": "9"}),
    *({"adapter_name": "a.b"}, {"steps": "4"}, {"guidance": "high"}, {"weight": {"unet": 1}}, {"weight": torch.nan}),
]


@pytest.mark.parametrize("said", ODD_VALUES, ids=str)
def test_E5_other_values_are_told_in_one_sentence(said, files):
    pipe = sd_pipe()
    before = snapshot(pipe)
    with pytest.raises(lcmlora.LcmLoraError) as told:
        lcmlora.accelerate(pipe, lora=files["lcm"], **said)
    assert len(str(told.value)) < 300
    assert_same(before, snapshot(pipe))


def test_E5_numbers_of_numpy_and_torch_are_numbers(files):
    import numpy as np

    plain = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], weight=0.5, styles={"ink": Style(files["ink"], 0.5)})
    for half in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        pipe = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], weight=half, styles={"ink": Style(files["ink"], half)})
        assert same_weights(pipe, plain)
        lcmlora.set_styles(pipe, {"ink": half})
        assert lcmlora.status(pipe).styles == {"ink": 0.5}
    lcmlora.accelerate(sd_pipe(), lora=files["lcm"], guidance=0, steps=np.int64(4))


def test_E7_the_adapter_has_the_name_that_it_was_given(files, tmp_path):
    pipe = sd_pipe()
    before = snapshot(pipe)
    lcmlora.accelerate(pipe, lora=files["lcm"], fuse=False, adapter_name="lcm")
    assert pipe.get_active_adapters() == ["lcm"]
    pipe.load_lora_weights(str(tmp_path), weight_name="b.safetensors", adapter_name="style")
    pipe.set_adapters(["lcm", "style"], [1.0, 0.8])  # what such programs do
    assert lcmlora.status(pipe).weight == 1.0
    lcmlora.accelerate(pipe, adapter_name="other")
    assert "lcm" not in pipe.unet.peft_config
    with pytest.warns(lcmlora.LcmLoraWarning, match="style"):
        lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))
    pipe.load_lora_weights(str(tmp_path), weight_name="b.safetensors", adapter_name="lcm")
    with pytest.raises(PipelineError, match="has an adapter of that name already"):
        lcmlora.accelerate(pipe, lora=files["lcm"], adapter_name="lcm")


@pytest.mark.parametrize("kind", PIPES)
def test_E8_other_spellings_of_one_file_are_the_same(kind, tmp_path, merges, monkeypatch):
    pipe = PIPES[kind]()
    lcm = write_lora(tmp_path / "lcm.safetensors", pipe.unet)
    monkeypatch.chdir(tmp_path)
    lcmlora.accelerate(pipe, lora=lcm)
    count = len(merges)
    for spelled in (str(lcm), lcm, "lcm.safetensors", "./lcm.safetensors", tmp_path / "x" / ".." / "lcm.safetensors"):
        lcmlora.accelerate(pipe, lora=spelled)
        sibling = type(pipe)(**pipe.components)
        lcmlora.accelerate(sibling, lora=spelled)
    assert len(merges) == count
