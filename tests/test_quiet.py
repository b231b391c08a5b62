"""Nothing is said that the user did not ask for, and nothing of how other libraries speak is left changed."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

import diffusers
import pytest
import transformers
from huggingface_hub import utils as hub

from lcmlora.compat import bars_hidden
from lcmlora.quiet import hushed

EVERYTHING = """
import torch, lcmlora
from lcmlora import demo
from lcmlora.testing import tiny_lora, tiny_pipeline

for name in lcmlora.__all__:
    getattr(lcmlora, name)
lcmlora.load_pocket("chalk")
lcmlora.load_pocket(dtype=torch.float16)
pipe = lcmlora.load_pocket()
pipe.set_progress_bar_config(disable=True)
lcmlora.accelerate(pipe, styles={"3d": lcmlora.pocket.STYLE})
pipe("a fox on a teal background", num_inference_steps=1)
lcmlora.set_styles(pipe, {"3d": 0.5})
lcmlora.accelerate(pipe, fuse=False)
lcmlora.bake(pipe, "baked")
lcmlora.restore(pipe)
lcmlora.load_baked("baked")
demo.PROMPTS, demo._steps = demo.PROMPTS[:1], lambda count, **more: {"num_inference_steps": 1, **more}
demo._with_style(pipe)
demo._fine_tuned()
pipe = tiny_pipeline("sdxl")
lcmlora.accelerate(pipe, lora=tiny_lora(pipe, "lcm.safetensors"))
pipe("a fox", num_inference_steps=1)
"""


@pytest.mark.parametrize("program", ["import lcmlora", EVERYTHING], ids=["import", "everything"])
def test_a_program_hears_nothing_from_import_to_exit(program, tmp_path):
    """Any warning of Python's would be an error, and so a line; but torch 2.6 leaves a folder to the exit."""
    ran = run(tmp_path, "-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning", "-c", program)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


GENERATE = ["generate", "a fox", "-m", "pocket", "--steps", "1", "--out", "pictures", "--quiet"]


@pytest.mark.parametrize("command", [["--help"], GENERATE], ids=lambda command: command[0])
def test_a_command_tells_its_result_alone(command, tmp_path):
    ran = run(tmp_path, "-m", "lcmlora", *command)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(ran.stdout) > 0


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)


# -- what is left -----------------------------------------------------------------------------------------------------

BARS = (diffusers.utils.logging, transformers.utils.logging)


def shown() -> list[object]:
    return [home._tqdm_active for home in BARS]


def test_bars_are_hidden_in_the_thread_that_loads_alone():
    heard = {}
    before = shown()
    with bars_hidden(), bars_hidden():
        other = threading.Thread(target=lambda: heard.update(there=[home.is_progress_bar_enabled() for home in BARS]))
        other.start()
        other.join()
        heard["here"] = [home.is_progress_bar_enabled() for home in BARS]
        assert not hub.are_progress_bars_disabled()
    assert heard == {"there": [True, True], "here": [False, False]}
    assert [a is b for a, b in zip(before, shown(), strict=True)] == [True, True]


def test_two_threads_that_load_leave_nothing_behind():
    before, both_in, first_out = shown(), threading.Barrier(2), threading.Event()

    def load(first: bool) -> None:
        with bars_hidden():
            both_in.wait()
            if not first:
                first_out.wait()
            assert not any(home.is_progress_bar_enabled() for home in BARS)
        if first:
            first_out.set()

    threads = [threading.Thread(target=load, args=(first,)) for first in (True, False)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [a is b for a, b in zip(before, shown(), strict=True)] == [True, True]


@pytest.mark.parametrize("say", ["disable_progress_bar", "enable_progress_bar"])
def test_what_the_program_says_about_bars_meanwhile_stays(say):
    try:
        with bars_hidden():
            getattr(diffusers.utils.logging, say)()
        assert diffusers.utils.logging.is_progress_bar_enabled() == (say == "enable_progress_bar")
    finally:
        diffusers.utils.logging.enable_progress_bar()


def test_hushed_loggers_are_heard_from_other_threads_and_in_errors(caplog):
    logger = logging.getLogger("somebody")
    with hushed("somebody"):
        logger.warning("here")
        logger.error("failed")
        other = threading.Thread(target=lambda: logger.warning("there"))
        other.start()
        other.join()
    logger.warning("afterwards")
    assert [record.getMessage() for record in caplog.records] == ["failed", "there", "afterwards"]
    assert logger.filters == []
