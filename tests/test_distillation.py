"""Distillation: the formulas against independent definitions, the loop on tiny pipelines."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from safetensors import safe_open
from safetensors.torch import load_file

import lcmlora
from conftest import PIPES, assert_same, sd_pipe, sdxl_pipe, snapshot, tiny_unet, write_lora
from distilling import CONFIG, PROMPTS, peft_unet, students
from lcmlora.distillation import DistillConfig, distill, paths
from lcmlora.distillation.draws import Draws
from lcmlora.distillation.objectives import OBJECTIVES, Batch
from lcmlora.distillation.presets import PRESETS
from lcmlora.distillation.solver import Solver, boundary_scalings, few_steps, pseudo_huber, visited
from lcmlora.distillation.teacher import load
from lcmlora.layers import lcm_layers


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


# -- the objectives ---------------------------------------------------------------------------------------------------


def official_step(unet, alphas, z_0, eps, index, text, uncond, extra, uncond_extra, w, v):
    """One step of latent consistency distillation as the papers write it: equations 9, 13 and 14, algorithm 1.

    Timesteps are the DDIM solver's: t_n+k = 20 (n + 1) - 1, t_n = 20 before, the first 0.
    """
    t = (index + 1) * 20 - 1
    s = torch.where(index == 0, 0, t - 20)
    shape = (-1, 1, 1, 1)
    a_t, b_t = alphas[t].sqrt().view(shape), (1 - alphas[t]).sqrt().view(shape)
    a_s, b_s = alphas[s].sqrt().view(shape), (1 - alphas[s]).sqrt().view(shape)

    def x_and_eps(out, z, a, b):
        return (a * z - b * out, a * out + b * z) if v else ((z - b * out) / a, out)

    def f(out, z, time, a, b):
        skip = (0.25 / ((10 * time) ** 2 + 0.25)).view(shape)
        keep = (10 * time / ((10 * time) ** 2 + 0.25).sqrt()).view(shape)
        return skip * z + keep * x_and_eps(out, z, a, b)[0]

    def out(z, time, text, extra):
        return unet(z.float(), time, text, added_cond_kwargs=extra).sample

    z_t = a_t * z_0 + b_t * eps
    student = f(out(z_t, t, text, extra), z_t, t.double(), a_t, b_t)
    with torch.no_grad():
        unet.disable_adapters()
        cond, unc = out(z_t, t, text, extra), out(z_t, t, uncond, uncond_extra)
        unet.enable_adapters()
        x_c, e_c = x_and_eps(cond, z_t, a_t, b_t)
        x_u, e_u = x_and_eps(unc, z_t, a_t, b_t)
        z_s = a_s * (x_c + w * (x_c - x_u)) + b_s * (e_c + w * (e_c - e_u))
        target = f(out(z_s, s, text, extra), z_s, s.double(), a_s, b_s)
    return (((student - target) ** 2 + 0.001**2).sqrt() - 0.001).mean()


@pytest.mark.parametrize("merged", ["on", "off"])
@pytest.mark.parametrize(("kind", "v"), [("sd", False), ("sdxl", False), ("sd", True)])
def test_lcm_is_the_official_step(kind, v, merged):
    pipe = PIPES[kind]()
    if v:
        pipe.scheduler.register_to_config(prediction_type="v_prediction")
    z_0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with students(pipe, merged=merged, alpha=2.0, w=3.0) as student:
        conditions = student.teacher.conditions(*student.teacher.encode_text(PROMPTS[:3]))
        loss = OBJECTIVES["lcm"](DistillConfig())(student, Batch(conditions, z_0), Draws(7, [0, 1, 9]))
        grads = torch.autograd.grad(loss, student.parameters)
        unet = peft_unet(pipe.unet, student)
        names = list(student.layers)
    draws = Draws(7, [0, 1, 9])
    index, eps = draws.below(50), draws.normal(z_0)
    extra = dict(conditions.alone().get("added_cond_kwargs", {}))
    uncond_extra = {**extra, "text_embeds": conditions.empty.pooled.expand(3, -1)} if extra else {}
    official = official_step(
        unet, pipe.scheduler.alphas_cumprod.double(), z_0, eps, index, conditions.text.embeds,
        conditions.empty.embeds.expand_as(conditions.text.embeds), extra, uncond_extra, 3.0, v,
    )  # fmt: skip
    official.backward()
    assert float(loss.detach()) == pytest.approx(float(official.detach()), rel=1e-5)
    theirs = [unet.get_submodule(name).lora_A["x"].weight.grad for name in names]
    theirs += [unet.get_submodule(name).lora_B["x"].weight.grad for name in names]
    for ours, their in zip(grads, theirs, strict=True):
        assert (ours - their).norm() <= 3e-4 * their.norm()


def test_few_steps_are_the_samplers():
    scheduler = TCDScheduler()
    for steps in range(1, 9):
        scheduler.set_timesteps(steps)
        assert few_steps(steps) == scheduler.timesteps.tolist()
    assert set(visited()) < set(paths.grid().tolist())
    assert paths.grid()[0] == 999
    assert paths.grid()[-1] == 0


@pytest.mark.parametrize("v", [False, True])
def test_a_path_follows_the_teacher(v):
    """It ends where many more steps of DDIM do."""
    pipe = sd_pipe()
    if v:
        pipe.scheduler.register_to_config(prediction_type="v_prediction")
    with students(pipe, w=1.0) as student:
        teacher, solver = student.teacher, student.teacher.solver
        conditions = teacher.conditions(*teacher.encode_text(PROMPTS[:2]))
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        path, grid = paths.draw(teacher, noise, conditions), paths.grid()
        assert torch.equal(path[:, 0], noise)
        z = noise
        for t in range(999, 0, -9):
            z = solver.noisy(
                *solver.split(teacher.guided(z, torch.tensor([t] * 2), conditions), z, torch.tensor([t])),
                torch.tensor([t - 9]),
            )
        assert (path[:, -1] - z).norm() < 0.1 * z.norm()
        assert path.shape[1] == len(grid)
        t, before = torch.tensor([grid[-2]] * 2), path[:, -2]
        end = solver.noisy(*solver.split(teacher.guided(before, t, conditions), before, t), torch.tensor([0]))
        torch.testing.assert_close(path[:, -1], end, rtol=1e-3, atol=1e-3)


def test_paths_learns_only_what_samplers_ask_for():
    objective, grid = OBJECTIVES["paths"](DistillConfig()), paths.grid()
    batch = Batch(None, torch.zeros(400, 1), torch.zeros(400, len(grid), 1), grid)
    i, j = objective.choose(batch, Draws(0, range(400)))
    t, s = grid[i], grid[j]
    assert bool((s < t).all())
    assert set(s.tolist()) <= {*visited(), 0}
    assert set(t.tolist()) == set(grid.tolist()) - {0}
    assert (t == 999).float().mean() > 0.1  # every schedule's first step


def test_schedule_reaches_what_lies_below_and_half_of_it_near():
    with students(sd_pipe(), objective="schedule", points="paths") as student:
        grid, seen = paths.grid(), []
        noisy = Solver.noisy

        def watch(self, z_0, eps, timesteps):
            seen.append(timesteps)
            return noisy(self, z_0, eps, timesteps)

        path = torch.randn(40, len(grid), 4, 8, 8)
        conditions = student.teacher.conditions(*student.teacher.encode_text(["x"] * 40))
        draws = Draws(0, range(40))
        s = grid[Draws(0, range(40)).below(len(grid) - 1) + 1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Solver, "noisy", watch)
            loss = OBJECTIVES["schedule"](DistillConfig(points="paths"))(
                student, Batch(conditions, path[:, -1], path, grid), draws
            )
    assert torch.equal(*seen)
    assert bool((seen[0] <= s).all())
    near = (seen[0] >= s - 260).float().mean()
    assert 0.5 < near < 0.9
    assert bool(((seen[0] == 0) & (s > 500)).any())  # as one step goes
    assert loss > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "lcm"},
        {"objective": "lcm", "points": "paths"},
        {"objective": "schedule"},
        {"objective": "paths", "loss": "sample"},
    ],
)
def test_each_objective_lowers_its_loss(settings):
    """Thirty steps on one batch with the same noise."""
    with students(sd_pipe(), **settings) as student:
        for up in student.up:
            up.data.zero_()
        teacher, config = student.teacher, DistillConfig(**settings)
        conditions = teacher.conditions(*teacher.encode_text(PROMPTS))
        path = paths.draw(teacher, torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), conditions)
        batch = Batch(conditions, path[:, -1], path, paths.grid())
        optimizer = torch.optim.AdamW(student.parameters, lr=1e-2)
        losses = []
        for _ in range(30):
            loss = OBJECTIVES[config.objective](config)(student, batch, Draws(0, range(4)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_huber_of_samples_is_that_of_elements_where_all_are_alike():
    one, zero = torch.full((2, 3, 4, 4), 0.3), torch.zeros(2, 3, 4, 4)
    assert float(pseudo_huber(one, zero, 1e-3, "sample")) == pytest.approx(float(pseudo_huber(one, zero, 1e-3)))


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PIPES)
def test_distil_makes_a_lora_that_accelerate_and_plain_diffusers_take(kind, pictures, tmp_path):
    pipe = PIPES[kind]()
    before = snapshot(pipe)
    config = DistillConfig(**{**CONFIG, "validate_every": 2}, alpha=2.0, ema=0.5, w=3.0)
    file = distill(pipe, pictures, tmp_path / "out", config, progress=False)
    assert_same(before, snapshot(pipe))
    info = lcmlora.inspect_lora(file)
    assert (len(info.modules), info.ranks, info.alphas) == (len(lcm_layers(pipe.unet)), (4,), (2.0,))
    assert all(tensor.abs().sum() > 0 for tensor in load_file(file).values()), "some weight was never trained"
    lcmlora.accelerate(pipe, lora=tmp_path / "out")
    assert lcmlora.status(pipe).fused
    lcmlora.restore(pipe)
    pipe.load_lora_weights(str(tmp_path / "out"), weight_name=file.name, adapter_name="lcm")
    assert {module.scaling["lcm"] for module in pipe.unet.modules() if hasattr(module, "scaling")} == {0.5}
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["lcmlora"])["w"] == 3.0
        assert opened.metadata()["lcmlora_recipe"] == "lcm"
    rows = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4]


@pytest.mark.parametrize("preset", PRESETS)
def test_prompts_alone_are_enough(preset, tmp_path):
    pipe = PIPES["sdxl" if preset == "paths" else "sd"]()
    changes = {"then_steps": 2} if preset == "paths-lcm" else {}
    config = DistillConfig.preset(preset, **{**CONFIG, **changes})
    file = distill(pipe, PROMPTS, tmp_path, config, progress=False)
    scheduler = "LCMScheduler" if preset.endswith("lcm") else "TCDScheduler"
    assert type(lcmlora.accelerate(pipe, lora=file).scheduler).__name__ == scheduler


def test_styles_and_few_steps_in_one_file(tmp_path):
    """With a student that has learned nothing the file alone draws what the style draws."""
    pipe = sd_pipe()
    style = write_lora(tmp_path / "ink.safetensors", pipe.unet, only=lambda name: "attn" in name or "conv" in name)
    before = snapshot(pipe)
    file = distill(
        pipe, PROMPTS, tmp_path / "out", DistillConfig(**{**CONFIG, "learning_rate": 1e-12}), progress=False,
        styles={"ink": lcmlora.Style(style, 0.5)},
    )  # fmt: skip
    assert_same(before, snapshot(pipe))
    assert lcmlora.inspect_lora(file).ranks == (4, 8)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor(9), torch.randn(1, 5, 32))
    with torch.no_grad(), lcmlora.accelerated(pipe, lora=file, fuse=False):
        ours = pipe.unet(*inputs).sample
    with torch.no_grad():
        bare = pipe.unet(*inputs).sample
        pipe.load_lora_weights(str(tmp_path), weight_name=style.name, adapter_name="ink")
        pipe.set_adapters("ink", 0.5)
        theirs = pipe.unet(*inputs).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert (theirs - bare).norm() > 10 * (ours - theirs).norm()


def test_a_style_with_text_layers_is_refused(tmp_path):
    pipe = sd_pipe()
    style = write_lora(tmp_path / "ink.safetensors", pipe, text=True)
    with pytest.raises(lcmlora.PipelineError, match="style 'ink' covers text_encoder and unet"):
        distill(pipe, PROMPTS, tmp_path / "out", DistillConfig(**CONFIG), styles={"ink": style}, progress=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_teachers(dtype, pictures, tmp_path):
    pipe = sdxl_pipe().to(dtype=dtype)
    file = distill(pipe, pictures, tmp_path / "pipe", DistillConfig(**CONFIG), progress=False)
    assert lcmlora.inspect_lora(file).ranks == (4,)
    assert pipe.unet.dtype == dtype
    assert json.loads((tmp_path / "pipe/result.json").read_text())["steps"] == 4


def test_teachers_from_disk(tmp_path):
    """A folder that has half-precision files only, and a whole file; in the dtype that was asked for."""
    sd_pipe().to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    for dtype, wanted in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        pipe = load(tmp_path / "half", dtype)
        assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {wanted}
    assert load("pocket").unet.dtype == torch.float32


def test_teachers_that_cannot_be_are_refused(tmp_path):
    with_lora = sd_pipe()
    write_lora(tmp_path / "s.safetensors", with_lora.unet)
    with_lora.load_lora_weights(str(tmp_path), weight_name="s.safetensors")
    fast = sd_pipe()
    lcmlora.accelerate(fast, lora=tmp_path / "s.safetensors")
    flow = sd_pipe()
    flow.scheduler = FlowMatchEulerDiscreteScheduler()
    sample = sd_pipe()
    sample.scheduler.register_to_config(prediction_type="sample")
    inpaint = sd_pipe(unet=tiny_unet(in_channels=9))
    cases = [
        (with_lora, "unload_lora_weights"),
        (fast, "lcmlora.restore"),
        (flow, "has no alphas_cumprod"),
        (sample, "predicts 'sample'"),
        (inpaint, "takes 9 channels where latents have 4"),
        (object(), "a Stable Diffusion or SDXL pipeline is expected"),
        (tmp_path / "s.safetensors", "no checkpoint of a whole model"),
        (tmp_path / "nowhere", "there is no model"),
    ]
    for teacher, words in cases:
        with pytest.raises(lcmlora.PipelineError, match=words):
            distill(teacher, PROMPTS, tmp_path / "out", progress=False)
    with pytest.raises(lcmlora.PipelineError, match=r"pipe\.to"):
        distill(sd_pipe(), PROMPTS, tmp_path / "out", DistillConfig(dtype="float16"), progress=False)
    assert not (tmp_path / "out").exists()


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0), ("rank", 2.5), ("steps", 0), ("ema", 1.0), ("learning_rate", 0.0), ("schedule", "linear"),
        ("objective", "magic"), ("w", float("nan")), ("then", "lcm"), ("cache", 1), ("resolution", 4),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(lcmlora.DataError, match=f"{name}="):
        DistillConfig(**{name: value})


def test_settings_need_no_torch_and_explain_themselves():
    code = "import sys; from lcmlora.distillation.config import DistillConfig; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    for field in dataclasses.fields(DistillConfig):
        assert field.metadata["help"] in DistillConfig.__doc__
    with pytest.raises(lcmlora.DataError, match="'paths-lcm'"):
        DistillConfig.preset("best")
    with pytest.raises(lcmlora.DataError, match="speed: DistillConfig has no such setting"):
        DistillConfig.preset("lcm", speed=3)
    assert DistillConfig.preset("lcm") == DistillConfig()
