"""Distillation: the formulas against independent definitions, the loop on tiny pipelines."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import lcmlora
from conftest import PIPES, assert_same, sd_pipe, snapshot, write_lora
from lcmlora.distillation.data import read
from lcmlora.distillation.loop import _Run
from lcmlora.distillation.solver import Solver, boundary_scalings, pseudo_huber
from lcmlora.layers import lcm_layers

CONFIG = {"rank": 4, "steps": 4, "batch_size": 2, "learning_rate": 1e-2, "checkpoint_every": 2, "log_every": 2}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def solver():
    return Solver(DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod.double(), "epsilon", 50)


def test_boundary_scalings_are_the_schedulers():
    scheduler = LCMScheduler()
    scheduler.sigma_data = 0.5
    for t in (0, 19, 259, 999):
        ours = [float(x) for x in boundary_scalings(torch.tensor([t]))]
        theirs = [float(x) for x in scheduler.get_scalings_for_boundary_condition_discrete(t)]
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert [float(x) for x in boundary_scalings(torch.tensor([0]))] == [1.0, 0.0]


def test_intervals_are_the_ones_inference_steps_through(solver):
    start, end = solver.timesteps(torch.arange(50))
    scheduler = LCMScheduler()
    scheduler.set_timesteps(50)
    assert start.flip(0).tolist() == scheduler.timesteps.tolist()
    assert end[0] == 0
    assert torch.equal(end[1:], start[:-1])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_split_undoes_noise(solver, kind):
    solver = Solver(solver.alphas_cumprod, kind, 50)
    z_0, eps = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    t = torch.tensor([19, 499, 999])
    z_t = solver.noisy(z_0, eps, t)
    alpha, sigma = solver.alpha_sigma(t, z_t)
    prediction = eps if kind == "epsilon" else alpha * eps - sigma * z_0
    found = solver.split(prediction, z_t, t)
    torch.testing.assert_close(found[0], z_0)
    torch.testing.assert_close(found[1], eps)


def test_the_teachers_step_is_ddim(solver):
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)
    scheduler.alphas_cumprod = solver.alphas_cumprod
    scheduler.set_timesteps(50)
    z, eps = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64)
    start, end = solver.timesteps(torch.tensor([30]))
    expected = scheduler.step(eps, int(start), z).prev_sample
    torch.testing.assert_close(solver.noisy(*solver.split(eps, z, start), end), expected)


def test_huber_is_square_near_zero_and_absolute_far_away():
    zero = torch.zeros(1)
    assert float(pseudo_huber(zero + 1e-5, zero, 1e-3)) == pytest.approx(1e-10 / 2e-3, rel=1e-2)
    assert float(pseudo_huber(zero + 10, zero, 1e-3)) == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("kind", PIPES)
def test_distil_makes_a_lora_that_accelerate_takes(kind, pictures, tmp_path):
    pipe = PIPES[kind]()
    before = snapshot(pipe)
    file = lcmlora.distill(
        pipe, pictures, tmp_path / "out", lcmlora.DistillConfig(**CONFIG, alpha=2.0, ema=0.5), progress=False
    )
    assert_same(before, snapshot(pipe))
    info = lcmlora.inspect_lora(file)
    assert (len(info.modules), info.ranks, info.alphas) == (len(lcm_layers(pipe.unet)), (4,), (2.0,))
    assert all(tensor.abs().sum() > 0 for tensor in load_file(file).values()), "some weight was never trained"
    lcmlora.accelerate(pipe, lora=tmp_path / "out")
    assert lcmlora.status(pipe).fused
    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]


def test_plain_diffusers_loads_it_at_the_same_strength(pictures, tmp_path):
    pipe = sd_pipe()
    lcmlora.distill(pipe, pictures, tmp_path / "out", lcmlora.DistillConfig(**CONFIG, alpha=2.0), progress=False)
    pipe.load_lora_weights(str(tmp_path / "out"), weight_name="pytorch_lora_weights.safetensors", adapter_name="lcm")
    assert {module.scaling["lcm"] for module in pipe.unet.modules() if hasattr(module, "scaling")} == {0.5}


def test_resumed_equals_uninterrupted(pictures, tmp_path):
    whole = lcmlora.distill(
        sd_pipe(), pictures, tmp_path / "whole", lcmlora.DistillConfig(**CONFIG, ema=0.5), progress=False
    )
    halves = tmp_path / "halves"
    lcmlora.distill(
        sd_pipe(), pictures, halves, lcmlora.DistillConfig(**{**CONFIG, "steps": 2}, ema=0.5), progress=False
    )
    resumed = lcmlora.distill(sd_pipe(), pictures, halves, lcmlora.DistillConfig(**CONFIG, ema=0.5), progress=False)
    one, other = load_file(whole), load_file(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_gradients_are_clipped(pictures, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    config = lcmlora.DistillConfig(**{**CONFIG, "max_grad_norm": 1e-4})
    lcmlora.distill(sd_pipe(), pictures, tmp_path / "out", config, progress=False)
    assert norms == pytest.approx([1e-4] * 4, rel=1e-3)


def test_teacher_passes_are_one_batch_with_the_adapter_off(pictures, tmp_path):
    pipe = sd_pipe()
    passes = []
    attention = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1

    def record(module, args):
        adapter_off = getattr(attention.to_q, "disable_adapters", None)
        if args:  # the check at the end passes keywords
            passes.append((args[0].shape[0], adapter_off, torch.is_grad_enabled()))

    hook = pipe.unet.register_forward_pre_hook(record)
    lcmlora.distill(pipe, pictures, tmp_path / "out", lcmlora.DistillConfig(**{**CONFIG, "steps": 1}), progress=False)
    hook.remove()
    assert passes == [(2, False, True), (4, True, False), (2, False, False)]


def test_loss_falls_on_one_batch(pictures, tmp_path):
    """A hundred steps on the same pictures and noise: the student learns the teacher's trajectory."""
    pipe = sd_pipe()
    from lcmlora.distillation.data import Pictures, collate
    from lcmlora.distillation.loop import _borrowed

    with _borrowed(pipe):
        run = _Run(pipe, lcmlora.DistillConfig(**{**CONFIG, "batch_size": 5}), tmp_path, False)
        source = Pictures(read(pictures).examples, 16, False, 0)
        batch = collate([source[(i, 0)] for i in range(5)])
        losses = [run._train(batch, 0) for _ in range(40)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(
    ("name", "value"), [("rank", 0), ("steps", 0), ("ema", 1.0), ("learning_rate", 0.0), ("schedule", "linear")]
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(lcmlora.DataError, match=f"{name}="):
        lcmlora.DistillConfig(**{name: value})


def test_a_teacher_with_loras_is_refused(pictures, tmp_path):
    pipe = sd_pipe()
    style = write_lora(tmp_path / "s.safetensors", pipe.unet)
    pipe.load_lora_weights(str(tmp_path), weight_name=style.name)
    with pytest.raises(lcmlora.PipelineError, match="unload_lora_weights"):
        lcmlora.distill(pipe, pictures, tmp_path / "out", progress=False)


def test_nan_stops_the_run_and_gives_the_pipe_back(pictures, tmp_path):
    pipe = sd_pipe()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(lcmlora.LcmLoraError, match="the loss is nan at step 0"):
        lcmlora.distill(pipe, pictures, tmp_path / "out", lcmlora.DistillConfig(**CONFIG), progress=False)
    assert not lcmlora.layers.ModuleIndex.of(pipe.unet).wrappers


def test_the_file_says_how_it_was_made(pictures, tmp_path):
    file = lcmlora.distill(
        sd_pipe(), pictures, tmp_path / "out", lcmlora.DistillConfig(**CONFIG, w=3.0), progress=False
    )
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["lcmlora"])["w"] == 3.0
        assert opened.metadata()["lcmlora_recipe"] == "lcm"
