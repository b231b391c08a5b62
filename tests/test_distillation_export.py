"""The file that a distillation leaves: in every layout and dtype the same LoRA, read back as its users read it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lcmlora
from conftest import PIPES, assert_same, sd_pipe, snapshot, tiny_unet, write_lora
from lcmlora.distillation import DistillConfig, export
from lcmlora.distillation.card import push_to_hub, write_card
from lcmlora.distillation.student import Student
from lcmlora.distillation.teacher import Teacher, borrowed
from lcmlora.layers import lcm_layers
from lcmlora.testing import tiny_pipeline


def rehearse(pipe, folder, **saving):
    config = DistillConfig(rank=4, alpha=2)
    with borrowed(pipe):
        export.rehearse(
            Student(Teacher(pipe, config, torch.device("cpu")), config), folder, inputs_for(pipe), **saving
        )


def state_for(unet, rank=4, seed=0, only=None):
    """A random LoRA as training has it."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in lcm_layers(unet).items():
        if only is None or only(name):
            out, *rest = layer.weight.shape
            state[f"{name}.lora_A.weight"] = torch.randn(rank, *rest, generator=generator) * 0.2
            state[f"{name}.lora_B.weight"] = torch.randn(out, rank, *(1 for _ in rest[1:]), generator=generator) * 0.2
    return state


def added(state, alpha):
    """What a state adds to each layer's weight."""
    found = {}
    for key, down in state.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            up = state[f"{name}.lora_B.weight"]
            found[name] = alpha / len(down) * up.flatten(1) @ down.flatten(1)
    return found


def added_by_plain_diffusers(kind, file):
    pipe = PIPES[kind]()
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="x")
    layers = {name: module for name, module in pipe.unet.named_modules() if "x" in getattr(module, "lora_A", {})}
    return {name: layer.get_delta_weight("x").flatten(1) for name, layer in layers.items()}


def added_by_us(kind, file):
    """What a merge changes, in float32."""
    pipe = PIPES[kind]()
    before = {name: layer.weight.clone() for name, layer in lcm_layers(pipe.unet).items()}
    lcmlora.accelerate(pipe, lora=file, fuse=True)
    return {name: (layer.weight - before[name]).flatten(1) for name, layer in lcm_layers(pipe.unet).items()}


def assert_adds(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=tolerance * float(value.abs().max()), rtol=0)


READERS = {"plain diffusers": added_by_plain_diffusers, "lcmlora": added_by_us}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kohya", [False, True], ids=["diffusers' layout", "kohya's layout"])
@pytest.mark.parametrize("kind", PIPES)
def test_both_layouts_are_the_same_lora_to_every_reader(kind, kohya, reader, tmp_path):
    state = state_for(PIPES[kind]().unet)
    file = export.save(state, tmp_path, alpha=2, dtype=torch.float32, kohya=kohya)
    file = export.kohya_copy(file) if kohya else file
    assert_adds(READERS[reader](kind, file), added(state, 2), 1e-5)


@pytest.mark.parametrize("kohya", [False, True])
def test_layers_may_have_ranks_of_their_own(kohya, tmp_path):
    unet = PIPES["sd"]().unet
    small = state_for(unet, 2, only=lambda name: "attn" in name)
    state = {**state_for(unet, 4), **small}
    file = export.save(state, tmp_path, alpha=2, dtype=torch.float32, kohya=kohya)
    file = export.kohya_copy(file) if kohya else file
    for reader in READERS.values():
        assert_adds(reader("sd", file), added(state, 2), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_file_has_the_dtype_asked_for(dtype, tmp_path):
    state = state_for(tiny_unet())
    file = export.save(state, tmp_path, alpha=2, dtype=dtype)
    for key, value in load_file(file).items():
        assert torch.equal(value, state[key.removeprefix("unet.")].to(dtype))


def test_the_file_says_what_it_is(tmp_path):
    file = export.save(state_for(tiny_unet()), tmp_path, alpha=2, recipe="tcd", settings={"w": 3.0}, kohya=True)
    for path in (file, export.kohya_copy(file)):
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata()
        assert metadata["lcmlora_recipe"] == "tcd"
        assert json.loads(metadata["lcmlora"]) == {"version": lcmlora.__version__, "w": 3.0}
        assert lcmlora.inspect_lora(path).recipe == "tcd"
    assert metadata["ss_network_dim"] == "4"


def test_a_value_that_half_precision_can_t_hold_is_refused(tmp_path):
    state = state_for(tiny_unet())
    key = next(iter(state))
    state[key][0] = 1e5
    with pytest.raises(lcmlora.LcmLoraError, match=rf"{key} can't be saved as torch.float16"):
        export.save(state, tmp_path, alpha=2)
    assert list(tmp_path.iterdir()) == []
    export.save(state, tmp_path, alpha=2, dtype=torch.bfloat16)


def test_a_file_that_can_t_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    state = state_for(tiny_unet())
    file = export.save(state, tmp_path, alpha=2)
    before = file.read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(lcmlora.LcmLoraError, match="can't be written: No space left"):
        export.save(state, tmp_path, alpha=2, dtype=torch.float32)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
    assert lcmlora.inspect_lora(tmp_path).path == file


def test_a_copy_of_an_earlier_run_does_not_stay(tmp_path):
    file = export.save(state_for(tiny_unet()), tmp_path, alpha=2, kohya=True)
    export.save(state_for(tiny_unet()), tmp_path, alpha=2)
    assert not export.kohya_copy(file).exists()


# -- read back --------------------------------------------------------------------------------------------------------


def inputs_for(pipe):
    generator = torch.Generator().manual_seed(0)
    config, dtype = pipe.unet.config, pipe.unet.dtype
    text = torch.randn(2, 16, config.cross_attention_dim, generator=generator).to(dtype)
    z = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    inputs = {"sample": z, "timestep": torch.tensor(999), "encoder_hidden_states": text}
    if config.addition_embed_type:
        pooled = torch.randn(2, 32, generator=generator).to(dtype)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 16).to(dtype)}
    return inputs


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quiet(pipe, dtype):
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
    return pipe


@pytest.mark.parametrize(("kind", "dtype"), zip(["sd", "sdxl", "sdxl"], DTYPES, strict=True))
def test_a_rehearsal_leaves_nothing_behind(kind, dtype, tmp_path):
    pipe = quiet(PIPES[kind](), dtype)
    before, random = snapshot(pipe), torch.get_rng_state()
    rehearse(pipe, tmp_path, recipe="tcd", kohya=True)
    assert_same(before, snapshot(pipe))
    assert torch.equal(torch.get_rng_state(), random)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("what", "dtype"), [*(("alpha", dtype) for dtype in DTYPES), ("a layer", DTYPES[0])])
def test_a_rehearsal_finds_what_would_go_wrong(what, dtype, tmp_path, monkeypatch):
    """As it is with the official script: alpha is lost, or a part of the keys is not understood."""

    def wrong(tensors, file, metadata):
        tensors = dict(tensors)
        if what == "alpha":
            metadata = {key: value for key, value in metadata.items() if key != "lora_adapter_metadata"}
        else:
            tensors = {key: value * ("mid_block.attentions" not in key) for key, value in tensors.items()}
        save_file(tensors, file, metadata=metadata)

    pipe = quiet(sd_pipe(), dtype)
    before = snapshot(pipe)
    monkeypatch.setattr(export, "save_file", wrong)
    with pytest.raises(lcmlora.LcmLoraError, match="does not load back with plain diffusers: its UNet pass is off by"):
        rehearse(pipe, tmp_path)
    assert_same(before, snapshot(pipe))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_diffusers_can_t_read_is_told_of(tmp_path, monkeypatch):
    """As the official script for SD 1.5 writes it."""

    def official(tensors, file, metadata):
        save_file({key.replace("unet.", "unet.base_model.model."): value for key, value in tensors.items()}, file)

    pipe = sd_pipe()
    before = snapshot(pipe)
    monkeypatch.setattr(export, "save_file", official)
    with pytest.raises(lcmlora.LcmLoraError, match="does not load with plain diffusers: "):
        rehearse(pipe, tmp_path)
    assert_same(before, snapshot(pipe))


def test_a_teacher_that_predicts_v_is_no_cause_to_warn(tmp_path):
    pipe = sd_pipe()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    rehearse(pipe, tmp_path)


def test_a_folder_that_can_t_be_written_to_is_told_of(tmp_path):
    pipe = sd_pipe()
    with pytest.raises(lcmlora.LcmLoraError, match="nothing can be written to"):
        rehearse(pipe, tmp_path / "no")


@pytest.mark.parametrize("recipe", ["lcm", "tcd"])
def test_reading_back_sets_the_recipes_scheduler(recipe, tmp_path):
    pipe = sd_pipe()
    file = export.save(state_for(pipe.unet), tmp_path, alpha=2, recipe=recipe)
    wanted = {"lcm": LCMScheduler, "tcd": TCDScheduler}[recipe]
    for loading in (export._plainly, export._accelerated):
        with loading(pipe, file):
            assert type(pipe.scheduler) is wanted
    assert type(pipe.scheduler) is type(sd_pipe().scheduler)


# -- styles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", PIPES)
def test_a_style_and_a_student_are_one_lora(kind, spelling, tmp_path):
    """Layers of both, of the student alone and of the style alone; linear ones and convolutions."""
    unet = PIPES[kind]().unet
    state = state_for(unet, 4, only=lambda name: not name.endswith("to_q"))
    only = {"only": lambda name: "resnets.0" in name or "to_" in name, "rank": 3}
    style = write_lora(tmp_path / "s.safetensors", unet, spelling=spelling, **only)  # kohya's with alpha 2, or 3
    halves = load_file(write_lora(tmp_path / "same.safetensors", unet, spelling="diffusers", **only))
    styled = added(
        {key.removeprefix("unet."): value for key, value in halves.items()}, 2 if spelling == "kohya" else 3
    )
    student = added(state, 2)
    assert styled.keys() - student
    assert student.keys() - styled
    zero = torch.zeros(())
    expected = {name: student.get(name, zero) + 0.7 * styled.get(name, zero) for name in {**student, **styled}}
    merged = export.merge_factors(state, 2.0, unet, style, 0.7)
    assert_adds(added(merged, 2), expected, 1e-5)
    file = export.save(merged, tmp_path, alpha=2.0, dtype=torch.float32, kohya=True)
    for path, reader in itertools.product((file, export.kohya_copy(file)), READERS.values()):
        assert_adds(reader(kind, path), expected, 1e-5)


def test_a_style_that_a_unet_file_can_t_hold_is_refused(tmp_path):
    pipe = tiny_pipeline("sd")
    state = state_for(pipe.unet)
    with_text = lcmlora.testing.tiny_lora(pipe, tmp_path / "t.safetensors", text=True)
    with pytest.raises(
        lcmlora.LoraMismatchError, match=r"t\.safetensors.* can't be distilled in: .* for a text encoder"
    ):
        export.merge_factors(state, 2.0, pipe.unet, with_text)
    other = write_lora(tmp_path / "o.safetensors", tiny_unet(width=48))
    with pytest.raises(lcmlora.LoraMismatchError, match=r"can't be distilled in: .* for another UNet"):
        export.merge_factors(state, 2.0, pipe.unet, other)
    name = next(key for key in load_file(with_text) if "attn1_to_q" in key).partition(".")[0]
    tensors = {key: value for key, value in load_file(with_text).items() if key.startswith(name)}
    out = len(tensors[f"{name}.lora_up.weight"])
    save_file({**tensors, f"{name}.dora_scale": torch.ones(out, 1)}, tmp_path / "d.safetensors")
    with pytest.raises(lcmlora.DataError, match=r"is a DoRA.*; it can't be distilled in"):
        export.merge_factors(state, 2.0, pipe.unet, tmp_path / "d.safetensors")


# -- the card and the hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path):
    """A folder as `distill` leaves it."""
    folder = tmp_path / "fox-lcm"
    folder.mkdir()
    export.save(state_for(tiny_unet()), folder, alpha=2, recipe="tcd", kohya=True)
    for name in (
        "validation/sheet.png",
        "log.jsonl",
        "checkpoint.pt",
        ".x.partial",
        "latents/0.safetensors",
        "my.png",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    return folder


def card_of(folder, base="me/foxes"):
    pictures = ("validation/sheet.png", "none.png")
    card = write_card(folder / export.WEIGHT_NAME, base=base, settings={"rank": 4, "w": 3.5}, pictures=pictures)
    return card.read_text(encoding="utf-8")


def test_the_card_says_what_it_is_and_how_to_use_it(made):
    text = card_of(made)
    front = ModelCard(text).data
    assert (front.base_model, front.library_name, front.license) == ("me/foxes", "diffusers", None)
    assert {"lora", "tcd-lora"} <= set(front.tags)
    for part in (
        "# fox-lcm",
        "![validation/sheet.png](validation/sheet.png)",
        "| w | 3.5 |",
        "`pytorch_lora_weights_kohya.safetensors`",
    ):
        assert part in text
    assert "none.png" not in text
    assert "TCDScheduler.from_config(pipe.scheduler.config)" in text
    assert "num_inference_steps=4, guidance_scale=1, eta=0.3" in text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")


def test_the_card_of_a_folder_tells_no_path(made, tmp_path):
    text = card_of(made, str(tmp_path / "foxes"))
    assert str(tmp_path) not in text
    assert ModelCard(text).data.base_model is None


def test_a_card_somebody_wrote_is_left_alone(made):
    first = card_of(made)
    assert card_of(made, "me/owls") != first
    (made / "README.md").write_text("my own words")
    assert card_of(made) == "my own words"


def test_what_goes_to_the_hub(made, monkeypatch):
    card_of(made)
    sent = {}

    def upload_folder(self, *, folder_path, allow_patterns, **rest):
        paths = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        sent.update(rest, files=set(filter_repo_objects(paths, allow_patterns=allow_patterns)))
        return SimpleNamespace(commit_url="https://hub/commit")

    def create_repo(self, repo_id, private, exist_ok):
        sent.update(token=self.token, private=private)
        return SimpleNamespace(repo_id=repo_id)

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    assert push_to_hub(made, "me/fox", private=True, token="t") == "https://hub/commit"
    assert (sent["repo_id"], sent["private"], sent["token"]) == ("me/fox", True, "t")
    weights = {export.WEIGHT_NAME, "pytorch_lora_weights_kohya.safetensors"}
    assert 'load_lora_weights("me/fox"' in (made / "README.md").read_text(encoding="utf-8")
    assert sent["files"] == {*weights, "README.md", "validation/sheet.png", "log.jsonl"}


def test_a_card_names_what_it_is_of_whatever_it_is_called(tmp_path, monkeypatch):
    """A folder may be called as a tag is, or not at all like a name; a base may be the embedded model."""
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: SimpleNamespace(commit_url="x"))
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **given: SimpleNamespace(repo_id=repo_id))
    for name in ("lora", 'my "fox" | 1'):
        file = export.save(state_for(tiny_unet()), tmp_path / name, alpha=2)
        card = write_card(file, base="pocket:chalk", settings={"x": "a|b"})
        for _ in ("as it was made", "as it was uploaded"):
            text = card.read_text(encoding="utf-8")
            for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
                compile(block, "card", "exec")
                assert 'load_pocket("chalk")' in block
            assert "| x | a\\|b |" in text
            assert ModelCard(text).data.tags == ["text-to-image", "diffusers", "lora", "lcm-lora", "lcmlora"]
            push_to_hub(tmp_path / name, "me/fox")
        assert text.count('"me/fox"') == 2
    card.write_bytes(b"caf\xe9")
    assert write_card(file, base="me/x", settings={}).read_bytes() == b"caf\xe9"


def test_a_refusal_of_the_hub_is_one_sentence(made, tmp_path):
    before = card_of(made)
    with pytest.raises(lcmlora.LcmLoraError, match="can't be uploaded to 'me/fox': ") as refused:
        push_to_hub(made, "me/fox")
    assert (made / "README.md").read_text(encoding="utf-8") == before
    assert "\n" not in str(refused.value)
    with pytest.raises(lcmlora.LcmLoraError, match="can't be uploaded to 'not a name': "):
        push_to_hub(made, "not a name")
    with pytest.raises(
        lcmlora.LcmLoraError, match=r"holds no pytorch_lora_weights\.safetensors; give the output folder"
    ):
        push_to_hub(tmp_path, "me/fox")
