"""Typed to the border: a misspelt keyword is an error for a type checker, and a TypeError at the call."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lcmlora
from conftest import assert_same, sd_pipe, snapshot

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("typed_program.py")
MISTAKES = {
    "accelerate(pipe, stpes=4)": 'Unexpected keyword argument "stpes" for "accelerate"; did you mean "steps"?',
    "accelerate(pipe, steps='4')": 'Argument "steps" to "accelerate" has incompatible type "str"',
    "accelerate(pipe, cache_dir=3)": 'Argument "cache_dir" to "accelerate" has incompatible type "int"',
    "accelerated(pipe, stpes=4)": 'Unexpected keyword argument "stpes" for "accelerated"; did you mean "steps"?',
    "accelerated(pipe, steps='4')": 'Argument "steps" to "accelerated" has incompatible type "str"',
    "accelerated(pipe).restore()": 'has no attribute "restore"',
    "compare(pipe, 'x', styles={})": 'Unexpected keyword argument "styles" for "compare"',
    "sweep_steps(pipe, 'x', gidance_scale=1)": 'Unexpected keyword argument "gidance_scale" for "sweep_steps"',
    "sweep_guidance(pipe, 'x', hight=1)": 'Unexpected keyword argument "hight" for "sweep_guidance"',
    "benchmark(pipe, stpes=(4, 25))": 'Unexpected keyword argument "stpes" for "benchmark"; did you mean "steps"?',
    "inspect_lora('x', weightname='y')": 'Unexpected keyword argument "weightname" for "inspect_lora"',
    "set_styles(pipe, styles={'ink': None})": "has incompatible type",
    "acelerate(pipe)": 'Module has no attribute "acelerate"',
    "testing.tiny_lora(pipe, 'x', spelling='khoya')": 'Argument "spelling" to "tiny_lora" has incompatible type',
}
CONFIG = """
[mypy]
strict = true
[mypy-lcmlora.*]
follow_imports = silent
[mypy-diffusers.*,torch.*,peft.*,transformers.*,safetensors.*,tokenizers.*,PIL.*,huggingface_hub.*,accelerate.*,numpy.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, str]:
    """What mypy says of the program, and of each mistake: one run for all."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("typed")
    files = {str(PROGRAM): "program"}
    for number, mistake in enumerate(MISTAKES):
        file = folder / f"mistake_{number}.py"
        file.write_text(f"import lcmlora\nfrom lcmlora import testing\npipe = object()\nlcmlora.{mistake}\n")
        files[str(file)] = mistake
    (folder / "mypy.ini").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", folder / "mypy.ini", "--cache-dir", folder / "cache", *files],
        capture_output=True,
        text=True,
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
        cwd=folder,
    )
    said = dict.fromkeys(files.values(), "")
    for line in done.stdout.splitlines()[:-1]:
        said[files[str((folder / line.partition(":")[0]).resolve())]] += line + "\n"
    assert done.returncode == 1, done.stderr
    return said


def test_a_program_that_uses_every_public_name_is_free_of_type_errors(told):
    assert told["program"] == ""


def test_the_program_does_use_every_public_name():
    used = {node.attr for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.Attribute)}
    assert set(lcmlora.__all__) <= used


@pytest.mark.parametrize("mistake", MISTAKES)
def test_E6_a_mistake_is_a_type_error(mistake, told):
    assert MISTAKES[mistake] in told[mistake]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("style", "styles"),
        ("num_inference_steps", "steps"),
        ("guidance_scale", "guidance"),
        ("enforce_inference_step", "enforce_inference_steps"),
        ("lora_path", "lora"),
    ],
)
def test_a_wrong_name_of_an_argument_is_answered_with_the_right_one(given, meant):
    with pytest.raises(TypeError, match=rf"accelerate takes no argument '{given}'. Is {meant} meant\?"):
        lcmlora.accelerate(None, **{given: 1})


@pytest.mark.parametrize(
    ("verb", "given", "meant"),
    [
        (lcmlora.distill, "progess", r"progress"),
        (lcmlora.distill, "steps", r"config=DistillConfig\(steps=\.\.\.\)"),
        (lcmlora.generate, "batchsize", "batch_size"),
        (lcmlora.generate, "steps", r"call=\{'steps': \.\.\.\}"),
    ],
)
def test_every_verb_of_many_arguments_does_so(verb, given, meant):
    with pytest.raises(TypeError, match=rf"{verb.__name__} takes no argument '{given}'. Is {meant} meant\?"):
        verb(None, **{given: 1})


NAMED = (
    lcmlora.accelerate,
    lambda pipe: lcmlora.generate(pipe, ["x"], "out"),
    lambda pipe: lcmlora.compare(pipe, "x"),
)


@pytest.mark.parametrize("verb", NAMED)
def test_a_name_in_a_pipes_place_is_answered_with_load(verb):
    with pytest.raises(lcmlora.PipelineError, match=r"lcmlora.load\('pocket'\) makes a pipe"):
        verb("pocket")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stpes": 4}, r"accelerated takes no argument 'stpes'. Is steps meant\?"),
        ({"style": {}}, r"'style'. Is styles meant\?"),
        ({"zzz": 1}, r"takes no argument 'zzz'\.$"),
    ],
)
def test_E6_accelerated_refuses_unknown_arguments_before_the_block_is_entered(arguments, words):
    pipe = sd_pipe()
    before = snapshot(pipe)
    with pytest.raises(TypeError, match=words):
        lcmlora.accelerated(pipe, **arguments)
    with pytest.raises(TypeError, match="missing a required argument: 'pipe'"):
        lcmlora.accelerated()
    assert_same(before, snapshot(pipe))


def test_accelerated_has_the_arguments_of_accelerate(lcm_file):
    parameters = inspect.signature(lcmlora.accelerate).parameters
    assert inspect.signature(lcmlora.accelerated).parameters == parameters
    assert lcmlora.accelerated.__name__ == "accelerated"
    pipe = sd_pipe()
    with lcmlora.accelerated(pipe, "auto", lora=lcm_file(pipe), steps=3) as fast:
        assert fast is pipe
        assert lcmlora.status(pipe).steps == 3
    assert not lcmlora.is_accelerated(pipe)


def test_the_stubs_are_the_public_names():
    """The table that imports late and what a type checker reads name the same things in the same modules."""
    tree = ast.parse(Path(lcmlora.__file__).read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and any(isinstance(x, ast.ImportFrom) for x in n.body))
    named = {alias.name: node.module for node in block.body for alias in node.names if alias.asname == alias.name}
    stubs = {name: module for name, module in named.items() if module}
    assert stubs == lcmlora._HOME
    assert sorted(stubs) == lcmlora.__all__
    assert named.keys() - stubs.keys() == set(lcmlora._MODULES)
