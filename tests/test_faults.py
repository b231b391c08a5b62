"""All or nothing: whatever line of the work is interrupted, the pipe is as it was, and a second call finishes the
work.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lcmlora
from conftest import assert_same, sd_pipe, snapshot, write_lora
from lcmlora import Style
from lcmlora.transition.records import module_record_of, put

PACKAGE = Path(lcmlora.__file__).parent
WORK = {str(file) for file in PACKAGE.rglob("*.py")}
"""Where an interruption may come: every line of the package."""
MOMENTS = {4**power for power in range(10)}


def is_spoiled(pipe) -> bool:
    record = module_record_of(pipe.unet)
    return record is not None and record.spoiled


class Interrupted(KeyboardInterrupt):
    pass


def interrupt(work: Callable[[], object], moment: int) -> bool:
    """Run `work`, and raise Interrupted at the `moment`-th moment; False if it has fewer.

    A moment is before a line of lcmlora's that is executed for the 1st, 4th, 16th, 64th, ... time: so lines in loops
    over layers do not crowd the others out.
    """
    seen, times = 0, Counter()

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename not in WORK:
            return None
        if event == "line":
            times[frame.f_code.co_filename, frame.f_lineno] += 1
            seen += times[frame.f_code.co_filename, frame.f_lineno] in MOMENTS
            if seen == moment:
                sys.settrace(None)
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


def every_line(work: Callable[[], object], check: Callable[[], object], stride: int) -> int:
    """Interrupt `work` at every `stride`-th moment until it runs through; `check` after each. The number of
    interruptions.
    """
    moment, count = 1, 0
    while interrupt(work, moment):
        check()
        moment, count = moment + stride, count + 1
    return count


@pytest.fixture
def files(tmp_path):
    pipe = sd_pipe()
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    halves = {f"{text}.lora_A.weight": torch.randn(2, 32), f"{text}.lora_B.weight": torch.randn(32, 2)}
    write_lora(tmp_path / "lcm.safetensors", pipe.unet, only=lambda n: "to_" in n or "conv1" in n)
    write_lora(tmp_path / "own.safetensors", pipe.unet, only=lambda n: "to_q" in n, spelling="diffusers")
    write_lora(
        tmp_path / "style.safetensors", pipe.unet, only=lambda n: "to_v" in n, spelling="diffusers", extra=halves
    )
    write_lora(tmp_path / "whole.safetensors", pipe.unet)
    return tmp_path


@pytest.fixture
def pipe(files):
    """A pipe with a LoRA of the user's own in it."""
    pipe = sd_pipe()
    pipe.load_lora_weights(str(files), weight_name="own.safetensors", adapter_name="own")
    pipe.set_adapters(["own"], [0.6])
    return pipe


def test_interruptions_reach_every_module_that_works_on_a_pipe(pipe, files):
    """WORK is computed; this is what would tell that it missed something."""
    entered = set()

    def trace(frame, event, argument):
        if frame.f_code.co_filename in WORK:
            entered.add(Path(frame.f_code.co_filename).relative_to(PACKAGE).with_suffix("").as_posix())

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        lcmlora.accelerate(pipe, lora=files / "whole.safetensors", styles={"s": files / "style.safetensors"})
        lcmlora.set_styles(pipe, {"s": 0.5})
        lcmlora.restore(pipe)
    finally:
        sys.settrace(before)
    assert {"acceleration", "calls", "compat", "layers"} <= entered
    for folder, work in (
        ("lora", {"adapters", "files", "merge", "originals", "sources", "spellings"}),
        ("transition", {file.stem for file in (PACKAGE / "transition").glob("[a-z]*.py")}),
    ):
        assert {f"{folder}/{name}" for name in work} <= entered


@pytest.mark.parametrize(("fuse", "keep"), [(True, "memory"), (True, "disk"), (False, "memory")])
def test_accelerate_interrupted_at_any_line_leaves_the_pipe_as_it_was(fuse, keep, pipe, files):
    before = snapshot(pipe)

    def work():
        styles = {"s": Style(files / "style.safetensors", 0.7)}
        lcmlora.accelerate(pipe, lora=files / "whole.safetensors", styles=styles, fuse=fuse, keep=keep)

    def check():
        if lcmlora.is_accelerated(pipe):  # interrupted after the last change: then all of it is done
            assert lcmlora.status(pipe).styles.keys() == {"s", "own"}
            lcmlora.restore(pipe)
        assert_same(before, snapshot(pipe))

    assert every_line(work, check, stride=29) > 20
    assert lcmlora.is_accelerated(pipe)


def test_accelerate_without_originals_interrupted_undoes_all_or_says_what_is_spoiled(pipe, files):
    before, weights = snapshot(pipe), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    ends = {"as it was": 0, "spoiled": 0, "accelerated": 0}

    def work():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                lcmlora.accelerate(pipe, lora=files / "whole.safetensors", keep=None)
            finally:
                told_of = any("weights are merged and some are not" in str(w.message) for w in told)
                assert told_of == is_spoiled(pipe)

    def check():
        if lcmlora.is_accelerated(pipe):  # interrupted after the last change
            ends["accelerated"] += 1
        elif is_spoiled(pipe):
            ends["spoiled"] += 1
            with pytest.raises(lcmlora.PipelineError, match="anew with from_pretrained"):
                lcmlora.accelerate(pipe, lora=files / "whole.safetensors", keep=None)
            put(pipe.unet, None)
            pipe.unet.load_state_dict(weights)
            assert_same(before, snapshot(pipe))
        else:
            ends["as it was"] += 1
            assert_same(before, snapshot(pipe))

    every_line(work, check, stride=29)
    assert ends["as it was"] > 5
    assert ends["spoiled"] > 5


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_restore_interrupted_at_any_line_is_finished_by_a_second_call(fuse, pipe, files):
    before = snapshot(pipe)
    styles = {"s": Style(files / "style.safetensors", 0.7)}

    def check():
        if lcmlora.is_accelerated(pipe):
            lcmlora.restore(pipe)
        assert_same(before, snapshot(pipe))
        lcmlora.accelerate(pipe, lora=files / "whole.safetensors", styles=styles, fuse=fuse)

    lcmlora.accelerate(pipe, lora=files / "whole.safetensors", styles=styles, fuse=fuse)
    assert every_line(lambda: lcmlora.restore(pipe), check, stride=29) > 8
    assert_same(before, snapshot(pipe))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_set_styles_interrupted_at_any_line_leaves_the_styles_as_they_were(fuse, pipe, files):
    lcmlora.accelerate(pipe, lora=files / "whole.safetensors", fuse=fuse)
    before, styles = snapshot(pipe), lcmlora.status(pipe).styles

    def check():
        nonlocal before
        if lcmlora.status(pipe).styles != styles:  # interrupted after the last change: then all of it is done
            assert lcmlora.status(pipe).styles == pytest.approx({"own": 0.2, "s": 0.8})
            lcmlora.accelerate(lcmlora.restore(pipe), lora=files / "whole.safetensors", fuse=fuse)
            before = snapshot(pipe)
        assert_same(before, snapshot(pipe))

    wanted = {"own": 0.2, "s": files / "style.safetensors"}
    assert every_line(lambda: lcmlora.set_styles(pipe, wanted), check, stride=29) > 8


def test_two_threads_take_turns_and_the_last_one_counts(pipe, files):
    before = snapshot(pipe)
    outcomes, start = [], threading.Barrier(2)

    def work(weight):
        start.wait()
        lcmlora.accelerate(pipe, lora=files / "whole.safetensors", weight=weight)
        outcomes.append(weight)

    threads = [threading.Thread(target=work, args=(weight,)) for weight in (0.5, 1.0)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(outcomes) == [0.5, 1.0]
    merged = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    weight = lcmlora.status(pipe).weight
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))
    lcmlora.accelerate(pipe, lora=files / "whole.safetensors", weight=weight)
    assert all(torch.equal(p, merged[name]) for name, p in pipe.unet.named_parameters())
