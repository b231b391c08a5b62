"""Distillation's engine: resuming, several processes, the cache, watching, and what can go wrong."""

from __future__ import annotations

import copy
import errno
import functools
import itertools
import json
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, debug_launcher
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lcmlora
from conftest import PIPES, sd_pipe, sdxl_pipe, tiny_unet
from distilling import CONFIG, PROMPTS, students
from lcmlora.distillation import DistillConfig, cache, checkpoint, distill, export, loop
from lcmlora.distillation.cache import Store, digest
from lcmlora.distillation.draws import Draws
from lcmlora.distillation.objectives import OBJECTIVES, Batch
from lcmlora.distillation.student import Merged
from lcmlora.distillation.validation import Validation
from lcmlora.writing import whole


@pytest.fixture(autouse=True)
def unrehearsed(monkeypatch, request):
    """Half of a tiny run is its rehearsal, which has tests of its own."""
    if "first_step" not in request.node.name:
        monkeypatch.setattr(loop._Run, "rehearse", lambda self: None)


def run(data, output, pipe=None, **settings):
    return distill(pipe or sd_pipe(), data, output, DistillConfig(**{**CONFIG, **settings}), progress=False)


def assert_equal_files(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert different == []


def rows_of(output, key):
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
def test_resumed_equals_uninterrupted(cache, pictures, tmp_path):
    settings = {"ema": 0.5, "cache": cache, "gradient_accumulation": 2}
    whole_run = run(pictures, tmp_path / "whole", **settings, steps=5)
    run(pictures, tmp_path / "halves", **settings, steps=2)
    resumed = run(pictures, tmp_path / "halves", **settings, steps=5)
    assert_equal_files(whole_run, resumed)
    assert rows_of(tmp_path / "halves", "loss") == rows_of(tmp_path / "whole", "loss")


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, caplog):
    """And the mean loss that is logged next is of all steps since the line before."""
    settings = {"objective": "paths", "log_every": 3}
    whole_run = run(PROMPTS, tmp_path / "whole", **settings)
    passes = itertools.count()
    pipe = sd_pipe()

    def interrupt(module, args):
        if torch.is_grad_enabled() and next(passes) == 1:
            signal.raise_signal(signal.SIGINT)

    hook = pipe.unet.register_forward_pre_hook(interrupt)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 2 of 4; run the same again"):
        run(PROMPTS, tmp_path / "cut", pipe, **settings)
    hook.remove()
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped at step 2" in caplog.text
    assert_equal_files(whole_run, run(PROMPTS, tmp_path / "cut", **settings))
    assert rows_of(tmp_path / "cut", "loss") == rows_of(tmp_path / "whole", "loss")


def in_a_fork(function):
    """Run in a process of its own; returns its exit status."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join()
    return child.exitcode


def test_killed_while_a_checkpoint_is_written(tmp_path):
    """Half a checkpoint is lost, and the one before it counts; here it is the last of a first stage."""
    settings = {"objective": "paths", "then": "lcm", "then_steps": 2, "schedule": "cosine", "checkpoint_every": 1}
    whole_run = run(PROMPTS, tmp_path / "whole", **settings)
    save, written = torch.save, itertools.count(1)

    def killed(state, file):
        save(state, file)
        if next(written) == 3:
            os.truncate(file, file.stat().st_size // 2)
            os._exit(9)

    def child():
        torch.save = killed
        run(PROMPTS, tmp_path / "cut", **settings)

    assert in_a_fork(child) == 9
    assert checkpoint.load(tmp_path / "cut")["step"] == 2
    assert_equal_files(whole_run, run(PROMPTS, tmp_path / "cut", **settings))


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path):
    run(PROMPTS, tmp_path, objective="paths")
    with pytest.raises(lcmlora.DataError, match=r"rank was 4 and is 8, w was 7\.5 and is 2"):
        run(PROMPTS, tmp_path, objective="paths", rank=8, w=2)
    with pytest.raises(lcmlora.DataError, match="data was"):
        run(PROMPTS[1:], tmp_path, objective="paths")
    with pytest.raises(lcmlora.DataError, match="teacher was"):
        run(PROMPTS, tmp_path, sd_pipe(1), objective="paths")
    run(PROMPTS, tmp_path, objective="paths", log_every=1, checkpoint_every=1, steps=5)
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(lcmlora.DataError, match="can't be read as a checkpoint"):
        run(PROMPTS, tmp_path, objective="paths", steps=5)


def test_runs_in_one_process_may_differ_in_precision(tmp_path):
    run(PROMPTS, tmp_path / "a", objective="paths", mixed_precision="bf16", steps=1)
    run(PROMPTS, tmp_path / "b", objective="paths", mixed_precision="no", steps=1)


# -- several processes ------------------------------------------------------------------------------------------------


def two_processes(function):
    """Run in two processes that gloo connects."""
    PartialState._reset_state()  # they inherit this process's otherwise
    debug_launcher(function, num_processes=2)


@pytest.mark.parametrize("settings", [{"objective": "lcm"}, {"objective": "paths", "gradient_accumulation": 2}])
def test_two_processes_train_what_one_trains(settings, pictures, tmp_path):
    settings = {**settings, "log_every": 1, "learning_rate": 1e-3}
    one = run(pictures, tmp_path / "one", **settings, batch_size=4)
    two_processes(functools.partial(run, pictures, tmp_path / "two", **settings, batch_size=2))
    other = load_file(tmp_path / "two" / one.name)
    for key, tensor in load_file(one).items():
        assert (tensor.float() - other[key].float()).norm() <= 0.01 * tensor.float().norm() + 1e-5
    for step, loss in rows_of(tmp_path / "one", "loss").items():
        assert rows_of(tmp_path / "two", "loss")[step] == pytest.approx(loss, rel=1e-4)


def test_two_processes_resume(tmp_path):
    settings = {"objective": "paths", "batch_size": 1}
    two_processes(functools.partial(run, PROMPTS, tmp_path / "whole", **settings))
    two_processes(functools.partial(run, PROMPTS, tmp_path / "cut", **settings, steps=2))
    two_processes(functools.partial(run, PROMPTS, tmp_path / "cut", **settings))
    assert_equal_files(*(tmp_path / name / "pytorch_lora_weights.safetensors" for name in ("whole", "cut")))
    with pytest.raises(lcmlora.DataError, match="examples_a_step was 2 and is 1"):
        run(PROMPTS, tmp_path / "cut", **settings)


# -- the student's pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PIPES)
def test_every_way_to_compute_the_student_is_one(kind):
    results = []
    ways = (
        {"merged": merged, "gradient_checkpointing": spared} for merged in ("off", "on") for spared in (False, True)
    )
    for settings in ways:
        pipe = PIPES[kind]()
        with students(pipe, **settings) as student:
            if settings["gradient_checkpointing"]:
                pipe.unet.enable_gradient_checkpointing()
                pipe.unet.train()
            conditions = student.teacher.conditions(*student.teacher.encode_text(PROMPTS[:2]))
            z_0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            loss = OBJECTIVES["lcm"](DistillConfig())(student, Batch(conditions, z_0), Draws(0, [0, 1]))
            results.append((loss.detach(), *torch.autograd.grad(loss, student.parameters)))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert (one - two).norm() <= 1e-3 * one.norm()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (torch.nn.Linear(5, 4), (2, 3, 5)),
        (torch.nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 5)),
        (torch.nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), (2, 3, 6, 5)),
        (torch.nn.Conv2d(3, 4, 1), (2, 3, 2, 2)),
    ],
)
def test_a_merged_layer_s_gradients_are_those_of_its_function(layer, shape):
    layer = copy.deepcopy(layer).double().requires_grad_(False)
    out, *rest = layer.weight.shape
    shapes = (shape, (2, *rest), (out, 2, *[1] * (len(rest) - 1)))
    x, down, up = (torch.randn(one, dtype=torch.float64, requires_grad=True) for one in shapes)
    assert torch.autograd.gradcheck(lambda *given: Merged.apply(*given, layer, 0.7), (x, down, up))


@pytest.mark.parametrize("merged", ["on", "off"])
def test_gradient_checkpointing_computes_again_what_it_computed(merged, pictures, tmp_path):
    plain = run(pictures, tmp_path / "plain", merged=merged)
    spared = run(pictures, tmp_path / "spared", merged=merged, gradient_checkpointing=True)
    assert_equal_files(plain, spared)


def test_teacher_passes_are_one_batch_without_the_lora(pictures, tmp_path):
    pipe, passes = sd_pipe(), []

    def record(conv, args, out):
        if len(args[0]) > 1:  # those of training
            plain = torch.nn.functional.conv2d(args[0], conv.weight, conv.bias, padding=1)
            passes.append((len(args[0]), torch.equal(out, plain), torch.is_grad_enabled()))

    hook = pipe.unet.mid_block.resnets[0].conv1.register_forward_hook(record)
    run(pictures, tmp_path / "out", pipe, steps=2)  # in the first step the LoRA adds nothing
    assert passes[-3:] == [(4, True, False), (2, False, True), (2, False, False)]
    passes.clear()
    run(pictures, tmp_path / "paths", pipe, steps=2, objective="paths")
    hook.remove()
    assert [one for one in passes if one[-1]] == [(2, True, True), (2, False, True)]


def test_gradients_are_clipped(pictures, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    run(pictures, tmp_path / "out", max_grad_norm=1e-4)
    assert norms == pytest.approx([1e-4] * 4, rel=1e-3)


# -- the cache --------------------------------------------------------------------------------------------------------


def test_cached_equals_computed_anew(pictures, tmp_path):
    for kind, pipe in (("sd", sd_pipe), ("sdxl", sdxl_pipe)):
        cached, live = (
            run(pictures, tmp_path / f"{kind}{cache}", pipe(), cache=cache, center_crop=True)
            for cache in (True, False)
        )
        one, other = load_file(cached), load_file(live)
        assert all(
            (one[key].float() - other[key].float()).norm() <= 0.01 * one[key].float().norm() + 1e-6 for key in one
        )


def test_a_second_run_computes_nothing_anew(pictures, tmp_path):
    settings = {"cache_dir": str(tmp_path / "cache"), "objective": "paths", "then": "lcm", "then_steps": 2}
    run(pictures, tmp_path / "a", **settings)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert {file.parent.name.partition("-")[0] for file in files} == {"texts", "latents", "paths"}
    pipe, encoded = sd_pipe(), []
    pipe.vae.encode = encoded.append
    run(pictures, tmp_path / "b", pipe, **settings)
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert_equal_files(*(tmp_path / name / "pytorch_lora_weights.safetensors" for name in "ab"))
    run(pictures, tmp_path / "c", sd_pipe(1), **settings)  # another teacher has entries of its own
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_pictures_of_every_shape_in_several_views(tmp_path):
    found = [
        (Image.new("RGB", size, "teal"), text)
        for size, text in zip(((16, 32), (40, 16), (16, 16)), PROMPTS[:3], strict=True)
    ]
    settings = {"buckets": True, "views": 2, "random_flip": True, "batch_size": 3, "resolution": 16}
    run(found, tmp_path, sdxl_pipe(), **settings)
    (folder,) = (tmp_path / "cache").glob("latents-*")
    entries = [tensor for shard in folder.iterdir() for key, tensor in load_file(shard).items() if key.endswith("/z")]
    assert len(entries) == 2 * 3
    assert len({entry.shape for entry in entries}) == 3


class Alone:
    """As much of an Accelerator as a store asks for."""

    process_index, num_processes = 0, 1

    def wait_for_everyone(self):
        pass


def test_half_written_shards_are_never_read(tmp_path, caplog):
    keys, made = [str(i) for i in range(5)], []

    def make(places):
        made.extend(keys[i] for i in places)
        return [{"x": torch.full((100,), float(keys[i]))} for i in places]

    def filled():
        store = Store(tmp_path, "things", ["maker"], 1.0)
        made.clear()
        store.fill(keys, make, batch=2, accelerator=Alone(), progress=False)
        return store

    store = filled()
    assert made == keys
    (shard,) = store.folder.glob("*.safetensors")
    shard.rename(shard.with_suffix(".safetensors.123.partial"))
    assert filled()["3"]["x"][0] == 3
    assert made == keys
    os.truncate(shard, shard.stat().st_size // 2)
    assert filled()["4"]["x"][0] == 4
    assert made == keys
    assert "is damaged" in caplog.text
    filled()
    assert made == []


def test_a_shard_is_whole_when_it_gets_its_name(tmp_path):
    def killed(tensors, file, metadata):
        file.write_bytes(b"half")
        os._exit(9)

    def child():
        cache.save_file = killed
        store = Store(tmp_path, "things", ["maker"], 1.0)
        store.fill(["a"], lambda places: [{"x": torch.zeros(3)}], batch=1, accelerator=Alone(), progress=False)

    assert in_a_fork(child) == 9
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_was_computed_before_an_interruption_is_kept(tmp_path):
    keys = [str(i) for i in range(6)]

    def make(places, stop=4):
        if max(places) >= stop:
            raise KeyboardInterrupt
        return [{"x": torch.zeros(3)} for _ in places]

    store = Store(tmp_path, "things", ["maker"], 1.0)
    with pytest.raises(KeyboardInterrupt):
        store.fill(keys, make, batch=2, accelerator=Alone(), progress=False)
    assert Store(tmp_path, "things", ["maker"], 1.0).missing(keys) == ["4", "5"]
    assert Store(tmp_path, "things", ["another"], 1.0).missing(keys) == keys


def test_size_and_time_are_said_and_bounded(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lcmlora"):
        run(PROMPTS, tmp_path / "a", objective="paths", steps=1)
    assert "4 paths to compute: 0.1 MB, about" in caplog.text
    with pytest.raises(lcmlora.DataError, match=r"more than cache_limit=1e-05\. Raise it"):
        run(PROMPTS, tmp_path / "b", objective="paths", cache_limit=1e-5)
    assert not list((tmp_path / "b").rglob("paths*/*"))


def test_a_digest_tells_encoders_apart():
    one, same, other = tiny_unet(0), tiny_unet(0), tiny_unet(1)
    assert digest(one) == digest(same) != digest(other)
    assert digest("a", "b") != digest("ab")


# -- watching ---------------------------------------------------------------------------------------------------------


def test_sheets_numbers_and_the_best(tmp_path):
    config = DistillConfig(**{**CONFIG, "validate_every": 2, "steps": 5, "objective": "paths"})
    pair = ["a fox", "a lamp"]
    file = distill(sd_pipe(), PROMPTS, tmp_path, config, progress=False, validation_prompts=pair)
    sheets = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert sheets == ["step-000002.png", "step-000004.png", "step-000005.png"]
    with Image.open(tmp_path / "validation" / sheets[0]) as sheet:
        assert sheet.height > 2 * 16
    rel = rows_of(tmp_path, "rel")
    assert rel.keys() == {2, 4, 5}
    assert all(numbers.keys() == {"1", "2", "4", "8"} for numbers in rel.values())
    result = json.loads((tmp_path / "result.json").read_text())
    best = min(rel, key=lambda step: sum(rel[step][few] for few in "248"))
    assert result["best"]["step"] == best
    assert result["best"]["sheet"] == f"step-{best:06d}.png"
    assert lcmlora.inspect_lora(tmp_path / "best").ranks == lcmlora.inspect_lora(file).ranks
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["objective"] == "paths"


def test_the_best_is_best_in_some_steps():
    assert Validation(Path("x.png"), {1: 9.0, 2: 1.0, 4: 2.0, 8: 3.0}).score == 2.0


def test_a_student_that_draws_as_its_teacher_is_at_no_distance(tmp_path):
    """At w = 0 the teacher's paths are those of its own UNet, which eight steps follow nearly."""
    run(PROMPTS, tmp_path, objective="paths", w=0.0, steps=1, learning_rate=1e-12, validate_every=1)
    rel = rows_of(tmp_path, "rel")[1]
    assert rel["8"] < rel["4"] < rel["2"] < rel["1"]
    assert rel["8"] < 0.1


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_nan_stops_the_run_and_gives_the_pipe_back(pictures, tmp_path):
    pipe = sd_pipe()
    good = pipe.unet.conv_out.bias.detach().clone()

    def spoil(module, args):
        if torch.is_grad_enabled():
            module.conv_out.bias.data.fill_(float("nan"))

    hook = pipe.unet.register_forward_pre_hook(spoil)
    with pytest.raises(lcmlora.LcmLoraError, match="the loss is nan at step 0"):
        run(pictures, tmp_path / "out", pipe)
    hook.remove()
    pipe.unet.conv_out.bias.data.copy_(good)
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_a_file_that_would_not_load_back_is_told_before_the_first_step(tmp_path, monkeypatch):
    """As it is with the official script: alpha is lost."""
    monkeypatch.setattr(loop._Run, "train", None)
    monkeypatch.setattr(export, "save_file", lambda tensors, file, metadata: save_file(tensors, file))
    with pytest.raises(lcmlora.LcmLoraError, match="does not load back with plain diffusers"):
        run(PROMPTS, tmp_path, alpha=2.0)


def test_a_full_disk_is_one_sentence_and_spoils_nothing(tmp_path):
    file = tmp_path / "checkpoint.pt"
    file.write_text("good")
    with (
        pytest.raises(lcmlora.LcmLoraError, match=r"checkpoint\.pt can't be written: the disk is full"),
        whole(file) as f,
    ):
        f.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert file.read_text() == "good"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no disk that is always full here")
def test_what_a_full_disk_says_is_known(tmp_path):
    def from_safetensors(file):  # which renames onto its target, so that none may be a device
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for write in (lambda: from_safetensors("x"), lambda: torch.save(torch.zeros(9), "/dev/full")):
        with pytest.raises(lcmlora.LcmLoraError, match=r"x can't be written: the disk is full"), whole(tmp_path / "x"):
            write()
    assert Path("/dev/full").is_char_device()


def test_arguments_that_make_no_sense_are_refused_before_anything(tmp_path):
    (tmp_path / "file").write_text("x")
    cases = {
        "a folder is expected": {"output": tmp_path / "file"},
        "a list of prompts": {"validation_prompts": "a fox"},
        "Unsupported logging": {"config": DistillConfig(trackers="no-such-tracker")},
        "does not divide": {"config": DistillConfig(solver_steps=37)},
        "styles=": {"styles": ["x"]},
    }
    for words, arguments in cases.items():
        with pytest.raises(lcmlora.LcmLoraError, match=words):
            distill(sd_pipe(), PROMPTS, **{"output": tmp_path / "out", "progress": False, **arguments})
