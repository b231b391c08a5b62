"""Where a LoRA is looked for: file, folder, the hub's cache laid out on disk, never the network."""

from __future__ import annotations

import shutil
import socket

import pytest

import lcmlora
from conftest import sd_pipe, write_lora
from lcmlora.lora.sources import WEIGHT_NAME, HubOptions, Source

REPO, COMMIT = "latent-consistency/lcm-lora-sdv1-5", "a" * 40


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def find_file(source, weight_name=None, *, revision=None, **hub):
    return Source.of(source, weight_name, revision=revision).find(HubOptions(**hub)).path


@pytest.fixture
def lora(tmp_path):
    return write_lora(tmp_path / WEIGHT_NAME, sd_pipe().unet)


@pytest.fixture
def cache(lora, tmp_path):
    """The hub's cache with one repository in it, as huggingface_hub lays it out."""
    repo = tmp_path / "cache" / ("models--" + REPO.replace("/", "--"))
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    shutil.copy(lora, snapshot / WEIGHT_NAME)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return tmp_path / "cache"


def test_a_repository_is_found_in_the_cache(cache):
    """Pitfall 14: by its id alone, without a word to the hub."""
    found = find_file(REPO, cache_dir=cache)
    assert found.name == WEIGHT_NAME
    pipe = lcmlora.accelerate(sd_pipe(), lora=REPO, cache_dir=cache, local_files_only=True)
    assert lcmlora.status(pipe).lora == str(found)
    baked = lcmlora.load_baked(lcmlora.bake(pipe, cache / "baked"))
    assert lcmlora.status(baked).lora == REPO


def test_a_revision_counts(cache):
    assert find_file(REPO, cache_dir=cache, revision=COMMIT).parent.name == COMMIT
    with pytest.raises(lcmlora.LoraFileError, match="hf download"):
        find_file(REPO, cache_dir=cache, revision="b" * 40)


def test_what_is_not_there_says_where_it_was_looked_for(cache):
    with pytest.raises(lcmlora.LoraFileError) as told:
        find_file("latent-consistency/lcm-lora-sdxl", cache_dir=cache)
    text = str(told.value)
    assert "latent-consistency/lcm-lora-sdxl/pytorch_lora_weights.safetensors" in text
    assert str(cache) in text
    assert "hf download latent-consistency/lcm-lora-sdxl pytorch_lora_weights.safetensors" in text


def test_files_and_folders(lora, tmp_path):
    assert find_file(lora) == lora
    assert find_file(str(tmp_path)) == lora
    other = tmp_path / "styles"
    other.mkdir()
    shutil.copy(lora, other / "only.safetensors")
    assert find_file(other) == other / "only.safetensors"
    shutil.copy(lora, other / "second.safetensors")
    with pytest.raises(
        lcmlora.LoraFileError, match=r"\['only.safetensors', 'second.safetensors'\]. Pass weight_name="
    ):
        find_file(other)
    assert find_file(other, "second.safetensors").name == "second.safetensors"


def test_pickles_are_refused(tmp_path):
    file = tmp_path / "lora.bin"
    file.write_bytes(b"x")
    with pytest.raises(lcmlora.LoraFileError, match="can run code"):
        find_file(file)
