"""The benchmark: stages that add up, turns, advice, what it writes; and the pipe that is given back."""

from __future__ import annotations

import copy
import csv
import dataclasses
import inspect
import io
import json
from pathlib import Path

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import AutoencoderTiny, DDIMScheduler
from matplotlib.figure import Figure
from PIL import Image

import lcmlora
from conftest import assert_same, sd_pipe, sdxl_pipe, snapshot
from lcmlora import base as registry
from lcmlora.benchmarking import PUBLISHED, Advice, Row, Spread
from lcmlora.benchmarking.advice import RULES, Facts, advise
from lcmlora.benchmarking.stages import OTHER, STAGES, Stopwatch, watched
from test_every_pipeline import ARGUMENTS, CASES, make, state

SMALL = {"height": 16, "width": 16}


class Clock:
    """A clock that stands still but for what the tests let pass, and a tick at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-5
        return self.now

    def passes(self, seconds: float = 0.05):
        """A hook, or whatever is called with anything, that takes so long."""

        def work(*args, **kwargs):
            self.now += seconds

        return work


@pytest.fixture
def pipe():
    return sd_pipe()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def run(pipe, lcm_file, clock):
    """A quick benchmark of the pipe on that clock."""

    def benchmark(steps=(2, 3), **options):
        accelerate = {"lora": lcm_file(pipe), **options.pop("accelerate", {})}
        more = {"prompt": "a fox", "repeats": 1, "warmup": 0, "progress": False, "clock": clock, **SMALL, **options}
        return lcmlora.benchmark(pipe, steps, accelerate=accelerate, **more)

    return benchmark


def everything(pipe) -> dict[str, object]:
    """What has to be the same afterwards: tensors and modules, hooks, and methods that lie on an object itself."""
    holders = {"pipe": pipe, "scheduler": pipe.scheduler, "vae": pipe.vae, "images": pipe.image_processor}
    own = {f"{n}'s own": {k: v for k, v in vars(x).items() if inspect.isroutine(v)} for n, x in holders.items()}
    stand_ins = {f"{n}'s": [k for k, v in vars(x).items() if type(v).__name__ == "_Timed"] for n, x in holders.items()}
    modules = [m for part in pipe.components.values() if isinstance(part, torch.nn.Module) for m in part.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules]
    return {**snapshot(pipe), **own, **stand_ins, "hooks": hooks}


# -- the stopwatch ----------------------------------------------------------------------------------------------------


def test_stages_share_a_call_out_and_the_inner_one_counts(clock):
    watch = Stopwatch(clock, lambda: None)
    began = clock.now
    with watch.stage(OTHER):
        clock.passes(1)()
        with watch.stage("text"):
            clock.passes(2)()
            with watch.stage("unet", samples=2):
                clock.passes(4)()
            clock.passes(8)()
        clock.passes(16)()
    assert watch.seconds == pytest.approx({OTHER: 17, "text": 10, "unet": 4}, abs=1e-3)
    assert watch.total == pytest.approx(clock.now - began, abs=1e-4)
    assert (watch.passes["unet"], watch.samples["unet"]) == (1, 2)


def test_the_device_is_waited_for_at_each_border(clock):
    queued = [0.0]

    def wait():
        clock.now += queued[0]
        queued[0] = 0.0

    watch = Stopwatch(clock, wait)
    with watch.stage(OTHER), watch.stage("unet"):
        queued[0] = 3.0  # told to the device, not done yet
    assert watch.seconds["unet"] == pytest.approx(3, abs=1e-3)


def test_a_scheduler_copied_in_the_middle_steps_by_itself(pipe, clock):
    """TextToVideoZero copies its scheduler while it is watched."""
    watch = Stopwatch(clock, lambda: None)
    with watched(pipe, watch):
        assert list(inspect.signature(pipe.scheduler.step).parameters)[:3] == ["model_output", "timestep", "sample"]
        other = copy.deepcopy(pipe.scheduler)
        with watch.stage(OTHER):
            other.set_timesteps(7)
    assert (other.num_inference_steps, pipe.scheduler.num_inference_steps) == (7, None)
    assert watch.passes["scheduler"] == 1


# -- what a call's stages are -----------------------------------------------------------------------------------------


class SlowScheduler(DDIMScheduler):
    work = staticmethod(lambda: None)

    def step(self, *args, **kwargs):
        self.work()
        return super().step(*args, **kwargs)


def slow_scheduler(pipe, work):
    SlowScheduler.work = staticmethod(work)
    pipe.scheduler = SlowScheduler.from_config(pipe.scheduler.config)


def slow_pictures(pipe, work):
    convert = pipe.image_processor.postprocess
    pipe.image_processor.postprocess = lambda *args, **kwargs: (work(), convert(*args, **kwargs))[1]


def slow_checker(pipe, work):
    pipe.run_safety_checker = lambda images, *_: (work(), (images, None))[1]


PLANTED = {
    "text": (lambda pipe, work: pipe.text_encoder.register_forward_hook(work), "text encoding", 1),
    "unet": (lambda pipe, work: pipe.unet.register_forward_pre_hook(work), None, 2),
    "vae_decode": (lambda pipe, work: pipe.vae.decoder.register_forward_hook(work), "no tiny VAE", 1),
    "picture": (slow_pictures, "picture conversion", 1),
    "safety": (slow_checker, "safety checker", 1),
    "scheduler": (slow_scheduler, "the base's scheduler", 3),
}
"""By stage: how 50 ms are planted in it, the advice that follows, and how often a call meets them."""


@pytest.mark.parametrize("stage", PLANTED)
def test_a_planted_delay_shows_in_its_stage_and_in_the_advice(stage, pipe, run, clock):
    plant, rule, times = PLANTED[stage]
    plant(pipe, clock.passes(0.05))
    found = run()
    row = found.base if stage == "scheduler" else found.fast
    assert row.of(stage) == pytest.approx(0.05 * times, abs=2e-3)
    assert row.seconds.median - row.of(stage) < 2e-3
    said = {advice.rule: advice for advice in found.advice}
    assert rule in said if rule else not said
    if rule:
        assert "0.050 s" in said[rule].text or "0.150 s" in said[rule].text


def test_a_delay_in_no_stage_is_other(run, clock):
    def callback(pipe, step, timestep, values):
        clock.passes(0.05)()
        return values

    found = run(call={"callback_on_step_end": callback})
    assert found.fast.of(OTHER) == pytest.approx(0.1, abs=2e-3)
    assert [advice.rule for advice in found.advice] == ["other"]


def test_stages_add_up_to_the_call(run, clock, pipe):
    pipe.unet.register_forward_hook(clock.passes(0.05))
    pipe.vae.decoder.register_forward_hook(clock.passes(0.02))
    for row in run().rows:
        assert sum(map(row.of, row.stages)) == pytest.approx(row.seconds.median, rel=1e-6)


def test_a_compiled_unet_is_watched_past_its_hooks(pipe, run, monkeypatch):
    calls = []

    def compile_(call, **options):
        """What it gives runs the forward as it was at first: hooks of later are not in it."""
        return lambda *args, **kwargs: (calls.append(call), call.__self__.forward(*args, **kwargs))[1]

    monkeypatch.setattr(torch, "compile", compile_)
    found = run(accelerate={"compile": "whole"})
    assert (found.base.passes, found.fast.passes) == (3, 2)
    assert len(calls) == 4  # the first call after each accelerate compiles, and does not count
    assert pipe.unet._compiled_call_impl is None


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline, 9 channels",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionImageVariationPipeline",
        "StableDiffusionXLPipeline",
        "AnimateDiffPipeline",
    ],
)
def test_any_pipeline_runs_with_its_inputs_and_is_given_back(name, tmp_path, clock):
    case = CASES[name]
    pipe, lora = make(name, case, tmp_path)
    taken = inspect.signature(type(pipe).__call__).parameters
    prompt = "a fox" if "prompt" in taken else None
    call = {key: value for key, value in {**ARGUMENTS, **case.call}.items() if key in taken and key != "prompt"}
    before = state(pipe, case.theirs)
    options = {"prompt": prompt, "call": call, "repeats": 1, "warmup": 0, "progress": False}
    found = lcmlora.benchmark(pipe, (2, 4), accelerate={"lora": lora}, **options)
    assert_same(before, state(pipe, case.theirs))
    assert found.fast.passes == 2
    assert ("controlnet" in found.fast.stages) == ("ControlNet" in name)
    assert ("vae_encode" in found.fast.stages) == ("Img2Img" in name or "Inpaint" in name)
    assert found.fast.seconds.median == pytest.approx(sum(map(found.fast.of, found.fast.stages)))


# -- turns ------------------------------------------------------------------------------------------------------------


def watch_calls(pipe) -> list[tuple[bool, int]]:
    """Each UNet pass: whether the pipe was accelerated, and the samples."""
    seen: list[tuple[bool, int]] = []
    pipe.unet.register_forward_pre_hook(lambda m, args: seen.append((lcmlora.is_accelerated(pipe), args[0].shape[0])))
    return seen


def test_base_and_accelerated_take_turns_and_the_first_does_not_count(pipe, run):
    seen = watch_calls(pipe)
    found = run((1, 1), repeats=2, warmup=1, batch_sizes=(1, 3))
    assert seen == [(False, 2), (False, 6), (True, 1), (True, 3)] * 3
    assert [row.name for row in found.rows] == ["base, batch 1", "lcm, batch 1", "base, batch 3", "lcm, batch 3"]
    assert [(row.batch, row.samples, row.seconds.repeats) for row in found.rows] == [
        (1, 2, 2),
        (1, 1, 2),
        (3, 6, 2),
        (3, 3, 2),
    ]
    assert found.fast.to_accelerate.repeats == found.fast.to_restore.repeats == 2
    assert found.base.to_accelerate is None


def test_steps_of_none_are_the_pipelines_and_the_recipes_own(pipe, run):
    found = run((None, None), accelerate={"steps": 3})
    assert [(row.steps, row.passes, row.guidance) for row in found.rows] == [(50, 50, 7.5), (3, 3, 1.0)]


def test_recipes_and_ways_to_merge_have_a_row_each(pipe, run, lcm_file):
    file = lcm_file(pipe, "tcd.safetensors")
    found = run((2, 3), recipes={"lcm": None, "tcd": file}, fused=(True, False), base_guidance=2.0)
    assert [(row.name, row.steps, row.fused) for row in found.rows] == [
        ("base", 3, None),
        ("lcm, merged", 4, True),
        ("lcm, adapters", 4, False),
        ("tcd, merged", 4, True),
        ("tcd, adapters", 4, False),
    ]
    assert found.base.guidance == 2.0
    found = run(batch_sizes=2, recipes="lcm", fused=False)
    assert [(row.name, row.steps, row.fused, row.batch) for row in found.rows] == [
        ("base", 3, None, 2),
        ("lcm", 4, False, 2),
    ]


def test_what_ran_is_recorded_and_not_what_was_asked(run):
    with pytest.warns(lcmlora.LcmLoraWarning, match="guidance_scale=7"):
        found = run(guidance_scale=7)
    assert (found.base.guidance, found.fast.guidance, found.fast.samples) == (7, 2, 4)


def test_all_calls_draw_with_a_generator_of_the_same_seed(pipe, run):
    drawn = []

    def convert(images, **kwargs):
        drawn.append(images.clone())
        return [Image.new("RGB", (16, 16))]

    pipe.image_processor.postprocess = convert
    run(repeats=2)
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])


def test_a_folder_is_loaded_and_that_is_measured(pipe, tmp_path, lcm_file, clock):
    pipe.save_pretrained(tmp_path / "tiny")
    options = {"prompt": "x", "repeats": 1, "warmup": 0, "progress": False}
    found = lcmlora.benchmark(tmp_path / "tiny", (1, 1), accelerate={"lora": lcm_file(pipe)}, **options)
    assert found.seconds_to_load > 0
    assert "Loaded in" in str(found)
    with pytest.raises(lcmlora.PipelineError, match="nowhere' could not be loaded"):
        lcmlora.benchmark(tmp_path / "nowhere", (1, 1))


# -- the way back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sd_pipe, sdxl_pipe])
def test_the_pipe_is_given_back_as_it_was(make, lcm_file):
    pipe = make()
    pipe.unet.register_forward_hook(lambda *_: None)
    pipe("x", num_inference_steps=1, **SMALL)
    before = everything(pipe)
    options = {"prompt": "a fox", "repeats": 1, "accelerate": {"lora": lcm_file(pipe)}, "progress": False}
    lcmlora.benchmark(pipe, (2, 3), **options)
    assert_same(before, everything(pipe))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [0, 1])
def test_the_pipe_is_given_back_when_a_call_raises(error, call, pipe, run):
    pipe("x", num_inference_steps=1, **SMALL)
    seen = []

    def fail(*_):
        seen.append(0)
        if len(seen) == (2 if call == 0 else 4):  # in the base's call, or in the accelerated one
            raise error("planted")

    pipe.unet.register_forward_hook(fail)
    before = everything(pipe)
    with pytest.raises(error, match="planted"):
        run()
    assert_same(before, everything(pipe))


def test_ctrl_c_gives_what_was_measured(pipe, run):
    seen = watch_calls(pipe)

    def stop(*_):
        if len(seen) == 7:  # one turn is over, the second is in the base's call
            raise KeyboardInterrupt

    pipe.unet.register_forward_hook(stop)
    before = everything(pipe)
    with pytest.warns(lcmlora.LcmLoraWarning, match="the benchmark was stopped"):
        found = run((2, 3), repeats=5)
    assert found.interrupted
    assert [row.seconds.repeats for row in found.rows] == [1, 1]
    assert "Stopped before all turns were over." in str(found)
    assert_same(before, everything(pipe))


def test_the_pipes_own_bars_are_off_meanwhile(pipe, run, capsys):
    pipe.set_progress_bar_config(desc="mine")
    run(progress=True)
    shown = capsys.readouterr().err
    assert "mine" not in shown
    assert "benchmark: 100%" in shown
    assert pipe._progress_bar_config == {"desc": "mine"}
    pipe.set_progress_bar_config(disable=True)
    run(progress=True)
    assert capsys.readouterr().err == ""


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"gidance_scale": 1}, TypeError, r"'gidance_scale'. Is guidance_scale meant\?"),
        ({"styles": {}}, TypeError, r"'styles'. Is accelerate={'styles': ...} meant\?"),
        ({"accelerate": {"stpes": 4}}, TypeError, r"'stpes'. Is steps meant\?"),
        ({"num_inference_steps": 4}, TypeError, r"Is steps=\(accelerated, base\) meant\?"),
        ({"call": {"generator": None}}, TypeError, r"Is seed meant\?"),
        ({"steps": 4}, lcmlora.CallError, r"steps=4: two numbers are expected.*steps=\(4, 25\)"),
        ({"steps": (4, 0)}, lcmlora.CallError, "steps=0: a whole number from 1"),
        ({"repeats": 0}, lcmlora.CallError, "repeats=0: a whole number from 1"),
        ({"batch_sizes": ()}, lcmlora.CallError, "at least one is expected"),
        ({"batch_sizes": (2,), "prompt": None}, lcmlora.CallError, "needs a prompt"),
        ({"prompt": 5}, lcmlora.CallError, "prompt=5: one text"),
        ({"seed": "x"}, lcmlora.CallError, "seed='x': a whole number from 0"),
        ({"height": 17}, lcmlora.CallError, "height=17: a whole number, a multiple of 8"),
        ({"steps": (51, 3)}, lcmlora.CallError, "num_inference_steps=51"),
        ({"recipes": ["lmc"]}, lcmlora.LcmLoraError, "lmc"),
    ],
)
def test_what_can_be_refused_is_refused_before_the_first_pass(options, error, words, pipe, run):
    seen, before = watch_calls(pipe), everything(pipe)
    with pytest.raises(error, match=words):
        run(**options)
    assert seen == []
    assert_same(before, everything(pipe))


def test_an_accelerated_pipe_is_refused(pipe, lcm_file):
    lcmlora.accelerate(pipe, lora=lcm_file(pipe))
    with pytest.raises(
        lcmlora.PipelineError,
        match=r"needs the pipe as it was: lcmlora\.restore\(pipe\) first\. lcmlora\.compare\(pipe, ",
    ):
        lcmlora.benchmark(pipe)
    assert lcmlora.is_accelerated(pipe)


# -- advice -----------------------------------------------------------------------------------------------------------


def row(accelerated=True, fused=True, guidance=1.0, passes=4, **stages) -> Row:
    """A row of one call; stages in seconds. The UNet takes what is left of 10 s."""
    stages = {"unet": 10 - sum(stages.values()), **stages}
    spreads = {name: Spread(value, value, value, 1) for name, value in stages.items()}
    call = Spread.of([sum(stages.values())])
    kind = ("lcm", True, "lcm", fused) if accelerated else ("base", False, None, None)
    return Row(*kind, 4, guidance, 1, passes, passes, call, spreads, 2**30)


BASE = row(accelerated=False, guidance=7.5)
FIRED = {
    "tiny VAE": (row(vae_decode=5.4), Facts(tiny_vae=True), "54% of the call (5.40 s)", 10 - 0.9 * 5.4),
    "no tiny VAE": (row(vae_decode=5.4), Facts(), "no tiny one is known", 10 - 0.9 * 5.4),
    "upcast VAE": (row(vae_decode=1), Facts(device="cuda", upcasts=True, fp16_vae=True), "float32", 9.5),
    "float32 VAE": (row(vae_decode=1), Facts(device="cuda", dtype="float16"), "beside a UNet in float16", 9.5),
    "unmerged": (row(fused=False), Facts(settings={"fuse": False}), "about 0.363 s a UNet pass", 10 / 1.17),
    "text encoder on the CPU": (row(text=0.4), Facts(device="cuda"), "waits on the CPU", 9.6),
    "text encoding": (row(text=1.2), Facts(), "12% of the call (1.20 s)", 8.8),
    "guidance": (row(guidance=1.5), Facts(), "Guidance 1.5 sends each picture through the UNet twice", 5),
    "compile": (row(), Facts(device="cuda", text_device="cuda", vae_dtype="float16"), "100% of the call", 7.7),
    "scheduler": (row(scheduler=0.2), Facts(), "The scheduler is 2% of the call (0.200 s)", None),
    "half precision on a CPU": (row(), Facts(dtype="float16"), "Most CPUs compute float16 slowly", None),
    "off-loading": (row(), Facts(offloaded=True), "brought to the device in each call", None),
    "safety checker": (row(safety=1), Facts(), "10% of the call", 9),
    "picture conversion": (row(picture=2), Facts(), "20% of the call", 8),
    "other": (row(other=2), Facts(), "20% of the call", None),
    "the base's scheduler": (row(), Facts(), "The base's DDIMScheduler is 30% of its call (3.00 s)", None),
}


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_each_rule_is_drawn_from_the_numbers(rule):
    fast, facts, words, expected = FIRED[rule]
    base = row(accelerated=False, scheduler=3) if "base's" in rule else BASE
    (advice,) = [one for one in advise([base, fast], facts) if one.rule == rule]
    assert words in advice.text
    assert advice.code
    assert advice.expected == (None if expected is None else pytest.approx(expected))
    quiet = Facts(text_device="cpu", tiny_vae=True, fp16_vae=True)
    assert advise([BASE, row(text=0.3, vae_decode=1, scheduler=0.01, other=0.5)], quiet) == ()


@pytest.mark.parametrize("settings", [{"vae": "tiny", "fuse": False}, {"cache_prompts": 4, "compile": True}])
def test_what_is_on_already_is_not_advised(settings):
    facts = Facts(
        device="cuda", text_device="cuda", vae_dtype="float16", dtype="float16", tiny_vae=True, settings=settings
    )
    rules = {one.rule for one in advise([BASE, row(fused="fuse" not in settings, text=1, vae_decode=2)], facts)}
    assert rules == ({"compile", "text encoding", "unmerged"} if "vae" in settings else {"tiny VAE"})


def test_what_adapters_cost_is_measured_where_both_were():
    rows = [BASE, row(fused=False), dataclasses.replace(row(), stages=row(other=2).stages)]
    (advice,) = [one for one in advise(rows, Facts(settings={"fuse": False})) if one.rule == "unmerged"]
    assert "about 0.500 s a UNet pass" in advice.text


def test_what_saves_most_comes_first():
    fast = row(guidance=2.0, text=1, vae_decode=3, scheduler=0.2)
    found = advise([BASE, fast], Facts(tiny_vae=True))
    assert [one.rule for one in found] == ["guidance", "tiny VAE", "text encoding", "scheduler"]
    assert found[0].expected < found[1].expected < found[2].expected


def test_facts_are_the_pipes(pipe):
    assert Facts.of(pipe, {}, True) == Facts(scheduler="DDIMScheduler")
    pipe.to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    add_hook_to_module(pipe.text_encoder, CpuOffload(torch.device("cpu")))
    found = Facts.of(pipe, {"steps": 4}, False)
    assert (found.dtype, found.vae_dtype, found.upcasts, found.offloaded) == ("float16", "float16", True, True)


def test_advice_is_tried_where_asked(pipe, run, clock, tmp_path, request):
    """A remembered prompt and a tiny VAE, each against the accelerated pipe as it was; one whose file is not there."""
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "taesd")
    layers = registry.structure_of(pipe.unet).layers
    mine = lcmlora.Base("mine", "Mine", 32, (8, 16), layers, tiny_vae=str(tmp_path / "taesd"), fp16_vae="no/where")
    lcmlora.register(mine)
    request.addfinalizer(lambda: lcmlora.unregister("mine"))
    pipe.text_encoder.register_forward_hook(clock.passes(1))
    pipe.vae.decoder.register_forward_hook(clock.passes(3))
    before = everything(pipe)
    found = run(try_advice=True)
    tried = {one.rule: one for one in found.advice}
    assert tried.keys() == {"text encoding", "tiny VAE"}
    assert all(one.without == pytest.approx(4, abs=0.01) for one in tried.values())
    assert tried["text encoding"].tried == pytest.approx(3, abs=0.01)
    assert tried["tiny VAE"].tried == pytest.approx(1, abs=0.01)
    assert "tried: 1.00 s a call instead of 4.00 s" in str(found)
    (tmp_path / "taesd/config.json").unlink()
    found = run(try_advice=True, accelerate={"local_files_only": True})
    tried = {one.rule: one for one in found.advice}
    assert tried["text encoding"].tried == pytest.approx(3, abs=0.01)
    assert "could not be loaded" in tried["tiny VAE"].failed
    assert "could not be tried: VAE" in str(found)
    assert_same(before, everything(pipe))


# -- what it says -----------------------------------------------------------------------------------------------------


def benchmark_of(*rows: Row, **more) -> lcmlora.Benchmark:
    return lcmlora.Benchmark("Pipe", "a machine", rows, **more)


def test_what_the_stages_allow_and_where_the_rest_went():
    slow = dataclasses.replace(row(False, text=1, vae_decode=1), passes=25, samples=50)
    fast = dataclasses.replace(row(), stages={n: Spread.of([s]) for n, s in (("unet", 1.0), ("vae_decode", 1.5))})
    fast = dataclasses.replace(fast, seconds=Spread.of([2.5]))
    found = benchmark_of(slow, fast)
    assert found.allowed == pytest.approx({"text": 1, "unet": 8 * 4 / 50, "vae_decode": 1})
    assert found.possible_speedup == pytest.approx(10 / 2.64)
    assert found.speedup == pytest.approx(4)
    assert found.reached == pytest.approx(4 / (10 / 2.64))
    assert found.lost == pytest.approx({"text": -1, "unet": 1 - 0.64, "vae_decode": 0.5})


def test_batches_are_compared_by_the_picture():
    rows = [dataclasses.replace(r, batch=n) for n in (1, 4) for r in (BASE, row())]
    rows[2] = dataclasses.replace(rows[2], seconds=Spread.of([20]))
    found = benchmark_of(*rows)
    assert [found.speedup_of(r) for r in found.rows] == [1, 1, 1, 2]
    assert found.fast.seconds_per_picture == 10
    assert found.rows[3].seconds_per_picture == 2.5


def test_the_published_rows_are_the_announcements():
    assert [round(one.speedup, 1) for one in PUBLISHED] == [9.8, 2.2, 5.0, 4.9, 3.2, 3.2, 7.6]


def test_text_is_a_table_and_the_repr_a_line(run):
    found = run()
    assert repr(found).count("\n") == 0
    assert "times faster" in repr(found)
    lines = str(found).splitlines()
    assert lines[1] == found.hardware
    assert [line.split()[0] for line in lines[3:6]] == ["base", "steps", "guidance"]
    assert any(line.startswith("  UNet ") for line in lines)
    assert max(map(len, lines[:20])) < 120


def test_json_and_csv_hold_what_was_measured(run, tmp_path):
    found = run(batch_sizes=(1, 2))
    plain = found.to_dict()
    assert json.loads(found.to_json(tmp_path / "new/b.json").read_text()) == plain
    assert plain["rows"][0]["stages"]["unet"]["median"] == found.base.of("unet")
    assert plain["speedup"] == found.speedup
    assert plain["lost"] == found.lost
    lines = list(csv.DictReader(io.StringIO(found.to_csv(tmp_path / "b.csv").read_text())))
    assert [line["name"] for line in lines] == [r.name for r in found.rows]
    for line, one in zip(lines, found.rows, strict=True):
        assert float(line["seconds"]) == one.seconds.median
        assert float(line["seconds_unet"]) == one.of("unet")
        assert float(line["speedup"]) == found.speedup_of(one)
        assert line["recipe"] == (one.recipe or "")
    with pytest.raises(lcmlora.DataError, match="can't be written"):
        found.to_json(tmp_path / "b.csv/inside.json")


def test_a_page_stands_alone_and_escapes(tmp_path):
    script = "<script>alert(1)</script>"
    advice = Advice("x", script, script, failed=script)
    found = lcmlora.Benchmark(script, script, (BASE, dataclasses.replace(row(vae_decode=1), name=script)), (advice,))
    text = found.to_html(tmp_path / "b.html").read_text()
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;") >= 6
    assert "light-dark(" in text
    assert 'name="viewport"' in text
    assert "src=" not in text
    part = found._repr_html_()
    assert "<html" not in part
    assert "<script" not in part
    assert part.strip() in text


def test_the_figure_stacks_the_stages():
    found = benchmark_of(BASE, row(vae_decode=4, text=1))
    figure = found.figure()
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    widths = [[bar.get_width() for bar in stage] for stage in axes.containers]
    assert widths == [[0, 1], [10, 5], [0, 4]]
    assert [bar.get_x() for bar in axes.containers[2]] == [10, 6]


def test_the_guide_names_every_stage_and_every_rule():
    text = (Path(__file__).parents[1] / "docs/benchmark.md").read_text(encoding="utf-8")
    assert [stage for stage in STAGES if f"| {stage.title} | `{stage.name}` |" not in text] == []
    assert [rule.name for rule in RULES if f"| {rule.name} |" not in text] == []
    assert [one for one in PUBLISHED if f"| {one.hardware} | {one.base_25_steps:g} |" not in text] == []
