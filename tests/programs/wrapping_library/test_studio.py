"""The studio's own test suite: tiny pipelines of `lcmlora.testing`, neither network nor GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from studio import Studio, StudioError

import lcmlora
from lcmlora.testing import tiny_lora, tiny_pipeline


@pytest.fixture(params=["sd", "sdxl"])
def pipe(request):
    return tiny_pipeline(request.param)


@pytest.fixture
def studio(pipe, tmp_path):
    ink = tiny_lora(pipe, tmp_path / "ink.safetensors", only=lambda name: name.endswith("to_q"), seed=5)
    with Studio(
        pipe, lora=tiny_lora(pipe, tmp_path / "lcm.safetensors"), styles={"ink": ink}, final_steps=6
    ) as studio:
        yield studio


def drawn(pipe, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    return pipe("a fox", num_inference_steps=steps, generator=generator).images[0]


def passes(pipe, draw):
    seen = []
    hook = pipe.unet.register_forward_hook(lambda *_: seen.append(1))
    draw()
    hook.remove()
    return len(seen)


def test_a_draft_takes_four_passes_and_a_final_what_was_said(studio):
    assert passes(studio.pipe, lambda: studio.draft("a fox")) == 4
    assert passes(studio.pipe, lambda: studio.draft("a fox", num_inference_steps=2)) == 2
    assert passes(studio.pipe, lambda: studio.final("a fox")) == 6


def test_a_final_is_what_the_pipe_draws_without_a_studio(studio):
    studio.draft("a fox", styles={"ink": 1.0})
    final = studio.final("a fox", seed=2)
    studio.close()
    assert final == drawn(studio.pipe, 6, seed=2)


def test_drafts_follow_their_styles_and_seeds(studio):
    bare, inked, other = (
        studio.draft("a fox"),
        studio.draft("a fox", styles={"ink": 1.0}),
        studio.draft("a fox", seed=1),
    )
    assert len({image.tobytes() for image in (bare, inked, other)}) == 3
    studio.final("a fox")
    assert studio.draft("a fox", styles={"ink": 1.0}) == inked


def test_the_pipe_comes_back(pipe, tmp_path):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    scheduler = pipe.scheduler
    with Studio(pipe, lora=tiny_lora(pipe, tmp_path / "lcm.safetensors")) as studio:
        studio.draft("a fox")
    assert pipe.scheduler is scheduler
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_threads_get_what_they_asked_for(studio):
    alone = {seed: (studio.draft("a fox", seed=seed), studio.final("a fox", seed=seed)) for seed in range(3)}
    with ThreadPoolExecutor(4) as threads:
        drafts = [threads.submit(studio.draft, "a fox", seed=i % 3) for i in range(6)]
        finals = [threads.submit(studio.final, "a fox", seed=i % 3) for i in range(6)]
    assert [draft.result() for draft in drafts] == [alone[i % 3][0] for i in range(6)]
    assert [final.result() for final in finals] == [alone[i % 3][1] for i in range(6)]


def test_without_a_few_step_lora_drafts_are_finals():
    studio = Studio(tiny_pipeline(), final_steps=3)
    assert not studio.fast
    assert studio.draft("a fox") == studio.final("a fox")


def test_what_can_not_be_done_is_a_studio_error(studio, tmp_path):
    with pytest.raises(StudioError, match="chalk"):
        studio.draft("a fox", styles={"chalk": 1.0})
    with pytest.raises(StudioError, match="60"):
        studio.draft("a fox", num_inference_steps=60)
    other = tiny_pipeline(cross_attention_dim=48, encoder_hid_dim=32)
    with pytest.raises(StudioError):
        Studio(other, lora=tiny_lora(tiny_pipeline(), tmp_path / "other.safetensors"))
    fast = lcmlora.accelerate(tiny_pipeline(), lora=tmp_path / "other.safetensors")
    with pytest.raises(StudioError, match="restore"):
        Studio(fast)
