"""The command line: what each command does, refuses and prints."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import lcmlora
from lcmlora import pictures
from lcmlora.cli import main
from lcmlora.cli.words import in_shell_words
from lcmlora.testing import tiny_lora, tiny_pipeline

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(main.commands)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shell")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "pipe")
    tiny_lora(pipe, folder / "lcm.safetensors")
    tiny_lora(pipe, folder / "ink.safetensors", only=lambda name: name.endswith("to_q"), seed=2)
    Image.new("RGB", (24, 16), "teal").save(folder / "teal.png")
    for name, text in (
        ("empty.txt", b""),
        ("odd.txt", b"\xff"),
        ("p.txt", b"a fox"),
        ("p.jsonl", b'{"title": "a fox"}'),
    ):
        (folder / name).write_bytes(text)
    return folder


@pytest.fixture
def shell(tmp_path, monkeypatch, model):
    """Run a command; in its words {pipe} and {lcm} are the tiny model's."""
    monkeypatch.chdir(tmp_path)

    def run(line: str, *more: str):
        words = [word.format(pipe=model / "pipe", lcm=model / "lcm.safetensors", at=model) for word in line.split()]
        return CliRunner().invoke(main, [*words, *more], standalone_mode=True)

    return run


FAST = "-m {pipe} --lora {lcm}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("generate rows.csv -m {pipe}", "rows.csv is a file: type --rows rows.csv"),
        ("generate fox -m {pipe} --style at/ink.safetensors", "such as ink=ink.safetensors:0.8"),
        ("generate fox -m pocket --vae tinyy", "Is 'tiny' meant?"),
        ("generate fox -m {pipe} --base sd1.5", "Is 'sd15' meant?"),
    ],
)
def test_what_newcomers_type_is_answered_with_what_they_mean(line, words, shell, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt\nfox\n")
    shown = shell(line)
    assert shown.exit_code in (1, 2)
    assert words in " ".join(shown.stderr.split())


def test_the_base_beside_it_has_a_guidance_of_its_own(shell, tmp_path):
    small = "--size 16x16 --base-steps 1 --lcm-steps 1 --json"
    for said, guidance in (
        ("-m pocket", 2.5),
        ("-m pocket --base-guidance 3", 3.0),
        (f"{FAST} --base-guidance 4", 4.0),
    ):
        rows = json.loads(shell(f"compare fox {said} {small}").stdout)["rows"]
        assert [row["guidance_scale"] for row in rows] == [guidance, 1.0]
    rows = json.loads(shell("sweep fox -m pocket --x steps=1 --without --size 16x16 --json").stdout)["rows"]
    assert rows[0]["guidance_scale"] == 2.5


# -- every command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_json_and_quiet_and_a_place_in_the_documents(name, shell):
    shown = shell(f"{name} -h")
    assert shown.exit_code == 0
    for option in ("--json", "--quiet", "--help"):
        assert option in shown.output
    assert f"\n$ lcmlora {name}" in (ROOT / "docs/shell.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["bases", "recipes"])
def test_tables_are_json_too(name, shell):
    table = json.loads(shell(f"{name} --json").stdout)
    assert {one["name"] for one in table} == {one.name for one in getattr(lcmlora, name)()}


def test_inspect_as_json(shell):
    found = json.loads(shell("inspect {lcm} --json").stdout)
    assert (found["modules"], found["ranks"]) == (len(lcmlora.inspect_lora(found["path"]).modules), [4])


# -- generate ---------------------------------------------------------------------------------------------------------


def test_prompts_become_pictures_named_after_them(shell, tmp_path, model):
    line = f"generate {FAST} --seeds 3,5 --style ink={{at}}/ink.safetensors:0.5"
    shown = shell(line, "A fox, red!", "狐")
    assert shown.exit_code == 0, shown.output
    names = ["a-fox-red-3", "a-fox-red-5", "狐-3", "狐-5"]
    assert shown.stdout.split() == [f"pictures/{name}.png" for name in names]
    assert "4 pictures in pictures" in shown.stderr
    record = pictures.record_of("pictures/a-fox-red-5.png")
    assert (record["prompt"], record["seed"], record["status"]["styles"]) == ("A fox, red!", 5, {"ink": 0.5})
    again = shell(
        f"generate {FAST} --seeds 3,5 --style ink={{at}}/ink.safetensors:0.5 --json --quiet", "狐", "A fox, red!"
    )
    assert json.loads(again.stdout)["already"] == 4
    assert again.stderr == ""


def test_prompts_that_are_alike_have_files_of_their_own(shell):
    shown = shell(f"generate {FAST} --steps 1", "A 3", "a", "a")
    assert shown.exit_code == 0, shown.stderr
    assert sorted(file.name for file in Path("pictures").iterdir()) == ["a-0.png", "a-3-0.png", "a-4-0.png"]


def test_a_name_that_the_locale_lacks_is_shown_all_the_same(model):
    line = f"-m lcmlora generate 狐 -m {model / 'pipe'} --lora {model / 'lcm.safetensors'} --out {model} -q"
    source = str(Path(lcmlora.__file__).parent.parent)
    place = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": source}
    shown = subprocess.run([sys.executable, *line.split()], env=place, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout) == (0, f"{model}/\\u72d0-0.png\n"), shown.stderr


def test_rows_of_a_file_and_a_picture_to_start_from(shell, model, tmp_path):
    (tmp_path / "rows.csv").write_text(f"prompt,image,styles\na fox,{model}/teal.png,ink:0.2\nan owl,none.png,\n")
    line = f"generate {FAST} --rows rows.csv --strength 0.5 --style ink={{at}}/ink.safetensors --seeds 1-2 --steps 2"
    shown = shell(line)
    assert shown.exit_code == 1
    assert shown.stdout.split() == ["pictures/0001-1.png", "pictures/0001-2.png"]
    assert "Row 2 (line 3): image='none.png': there is no such file" in shown.stderr
    record = pictures.record_of("pictures/0001-2.png")
    assert record["pipeline"] == "StableDiffusionImg2ImgPipeline"
    assert record["status"]["styles"] == {"ink": 0.2}
    assert (record["settings"]["strength"], record["ran"]["num_inference_steps"]) == (0.5, 2)
    assert pictures.load("pictures/0001-1.png")[0].size == (24, 16)
    shown = shell(f"generate {FAST} --image {{at}}/teal.png --mask {{at}}/teal.png --size 16x16", "x")
    assert shown.exit_code == 0, shown.output
    assert pictures.record_of("pictures/x-0.png")["pipeline"] == "StableDiffusionInpaintPipeline"


def test_again_makes_the_identical_picture(shell):
    shell(f"generate {FAST} --steps 2", "x")
    shown = shell("generate --again pictures/x-0.png --out other")
    assert "other/x-0.png is identical to pictures/x-0.png" in shown.stderr
    beside = shell("generate --again pictures/x-0.png --json -m {pipe}")
    assert json.loads(beside.stdout) == [
        {"file": "pictures/x-0-again.png", "of": "pictures/x-0.png", "identical": True}
    ]
    assert pictures.record_of("pictures/x-0-again.png")["key"] == pictures.record_of("pictures/x-0.png")["key"]
    refused = shell("generate --again pictures/x-0.png --out other")
    assert refused.exit_code == 1
    assert "give another --out, or --overwrite" in refused.stderr


def test_without_acceleration(shell):
    shown = shell("generate -m {pipe} --no-accelerate --steps 3 --guidance 2", "x")
    assert shown.exit_code == 0, shown.output
    assert pictures.record_of("pictures/x-0.png")["accelerated"] is None


def test_ctrl_c_has_its_exit_code_and_keeps_what_is_done(shell, monkeypatch):
    real, count = lcmlora.generating.loop.drawn, []

    def stopped(*given, **more):
        count.append(given)
        if len(count) > 1:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(lcmlora.generating.loop, "drawn", stopped)
    shown = shell(f"generate {FAST} --json", "x", "y")
    assert shown.exit_code == 130
    assert json.loads(shown.stdout)["files"] == ["pictures/x-0.png"]
    monkeypatch.setattr(lcmlora.loading, "load", stopped)
    shown = shell(f"generate {FAST}", "x", "y")
    assert (shown.exit_code, shown.stdout) == (130, "")


# -- sweep, compare -----------------------------------------------------------------------------------------------


def test_sheets_over_axes_and_of_both_ways(shell):
    ink = "--style ink={at}/ink.safetensors"
    shown = shell(f"sweep a fox {FAST} {ink} --x steps=1-2 --y styles.ink=0.2,1 --size 16x24 --json -q")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["files"] == ["sheets/sheet.png"]
    assert [row["num_inference_steps"] for row in found["rows"]] == [1, 2] * 4
    assert {row["styles"]["ink"] for row in found["rows"]} == {0.2, 1.0}
    assert shown.stderr == ""
    line = f"compare x {FAST} --base-steps 1,2 --lcm-steps 1-3 --out both --json"
    assert [row["accelerated"] for row in json.loads(shell(line).stdout)["rows"]] == [False] * 2 + [True] * 3
    refused = shell(f"sweep x {FAST} --x stpes=1,2")
    assert (refused.exit_code, "takes no argument 'stpes'" in refused.stderr) == (2, True)


# -- bake, demo, distill ----------------------------------------------------------------------------------------------


def test_true_and_false_are_values_of_an_axis(shell):
    shown = shell(f"sweep a {FAST} --x accelerated=false,True --steps 1 --json -q")
    assert [row["accelerated"] for row in json.loads(shown.stdout)["rows"]] == [False, True]


def test_bake_and_draw_with_what_was_baked(shell):
    shown = shell(f"bake fast {FAST} --json -q")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    assert shell("generate -m fast", "x").exit_code == 0
    assert pictures.record_of("pictures/x-0.png")["accelerated"]["baked"] is True
    assert shell("generate --again pictures/x-0.png --out b").stderr.count("identical") == 1


def test_distill_takes_its_settings_from_the_config(shell, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(lcmlora.distillation, "distill", lambda *given, **more: seen.append((given, more)) or "file")
    (tmp_path / "data").mkdir()
    shown = shell("distill pocket data out --rank 8 --random-flip --learning-rate 1e-3 --json -q")
    assert json.loads(shown.stdout) == {"file": "file"}
    ((teacher, data, output, config), more) = seen[0]
    assert type(teacher).__name__ == "StableDiffusionPipeline"
    assert (data, output, more) == (Path("data"), Path("out"), {"progress": False, "strict": False, "styles": {}})
    assert config == lcmlora.DistillConfig(rank=8, random_flip=True, learning_rate=1e-3)
    Path("prompts.txt").write_text("a fox")
    shown = shell("distill pocket --prompts prompts.txt out --style ink={at}/ink.safetensors:0.5 --strict")
    ((_, data, output, _), more) = seen[1]
    assert (data.name, output, more["strict"]) == ("prompts.txt", Path("out"), True)
    assert more["styles"]["ink"].weight == 0.5
    refused = shell("distill {pipe} data out --rank 0")
    assert (refused.exit_code, "--rank 0: at least 1" in refused.stderr) == (1, True)


# -- what is refused, and in which words ------------------------------------------------------------------------------

USAGE = {
    "nothing": "generate -m pocket",
    "two ways": "generate x --rows {at}/rows.csv -m pocket",
    "no model": "generate x",
    "seeds": "generate x -m pocket --seeds 8-1",
    "size": "generate x -m pocket --size 100",
    "odd size": "generate x -m pocket --size 100x100",
    "strength": "generate x -m pocket --strength 2",
    "without acceleration": "generate x -m pocket --no-accelerate --recipe lcm",
    "a style without a source": "generate x -m pocket --style ink:0.5",
    "axis": "sweep x -m pocket --x steps",
    "steps": "benchmark -m pocket --steps 4",
    "unknown": "generate x --stpes 4",
    "a mask alone": "generate x -m pocket --mask {at}/teal.png",
    "size of a benchmark": "benchmark -m pocket --size abc",
    "again and steps": "generate --again {at}/teal.png --steps 4",
    "again and a type": "generate --again {at}/teal.png --dtype float16",
    "again and a style": "generate --again {at}/teal.png --style ink=x",
}


@pytest.mark.parametrize("what", USAGE)
def test_wrong_usage_is_exit_code_2(what, shell, model):
    (model / "rows.csv").write_text("prompt\nx\n")
    shown = shell(USAGE[what])
    assert shown.exit_code == 2, shown.output
    assert shown.stderr.startswith("Usage: main")
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("generate x -m nowhere", "there is no model 'nowhere': a pipeline's folder"),
        ("generate x -m {at}", "no model_index.json"),
        ("generate x -m {at}/none.safetensors", "there is no file"),
        ("generate x -m {at}/teal.png", "is no checkpoint"),
        ("generate x -m {lcm}", "no checkpoint of a whole model"),
        ("generate x -m pocket:pastel", "'pocket' or 'pocket:chalk'"),
        ("generate x -m {pipe}", "structure of no known base. Pass --lora"),
        ("generate x -m {pipe} --lora {lcm} --recipe lmc", "--recipe 'lmc' is not known"),
        ("generate x -m {pipe} --lora none/none --local-files-only", "LoRA none/none"),
        ("generate x -m {pipe} --device nonsense", "nonsense"),
        ("generate --rows none.txt -m {pipe}", "does not exist"),
        ("distill {pipe} {at}/teal.png out", "teal.png: a folder, or a file that ends in"),
        ("distill {pipe} --prompts {at}/empty.txt out", "Error: {at}/empty.txt holds no picture and no prompt"),
        ("distill {pipe} --prompts {at}/p.txt out --validation-prompts {at}/odd.txt", "odd.txt is no text in UTF-8"),
        ("distill {pipe} {at}/p.jsonl out", "its columns are 'title'; --text-column says"),
        ("distill {pipe} {at}/p.jsonl out --text-column title --cache-limit 1e-9", "more than --cache-limit 1e-09"),
        ("generate x -m {pipe} --out {lcm}/x", "can't be written to"),
        ("bake {at} -m {pipe}", "is no checkpoint"),
        ("demo --out {lcm}/x", "can't be written to"),
        ("inspect none.safetensors", "LoRA"),
    ],
)
def test_a_refusal_is_one_line_and_no_traceback(line, words, shell, model):
    shown = shell(line)
    assert shown.exit_code in (1, 2)
    assert words.format(at=model) in shown.stderr
    assert "Traceback" not in shown.output
    assert isinstance(shown.exception, SystemExit)
    assert shown.stdout == ""


def test_a_traceback_where_asked(shell, monkeypatch):
    monkeypatch.setenv("LCMLORA_TRACEBACK", "1")
    assert isinstance(shell("inspect none.safetensors").exception, lcmlora.LcmLoraError)


@pytest.mark.parametrize(
    "line",
    [
        "generate x -m {pipe} --out {lcm}/x",
        "bake {lcm}/x -m {pipe}",
        "sweep x -m {pipe} --x steps=1 --out {lcm}/x",
        "sweep x -m {pipe} --x steps=1 --html {lcm}/x.html",
        "compare x -m {pipe} --out {lcm}/x",
        "benchmark -m {pipe} --html {lcm}/x.html",
        "distill pocket {at} {lcm}/x",
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_anything_is_loaded(line, shell, monkeypatch):
    monkeypatch.setattr("lcmlora.loading.load", None)
    shown = shell(line)
    assert shown.exit_code == 1, shown.output
    assert "can't be written to" in shown.stderr


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("fuse=False leaves PEFT adapters", "--no-fuse leaves PEFT adapters"),
        ("fuse=True: it can't be merged", "--fuse: it can't be merged"),
        ("num_inference_steps=99: whole numbers", "--steps 99: whole numbers"),
        ("recipe='lcm' takes any number", "--recipe 'lcm' takes any number"),
        ("type accelerate(pipe, recipe='tcd').", "type --recipe 'tcd'."),
        ("2 is used. accelerate(guidance=None) turns this off.", "2 is used. --no-guidance-limit turns this off."),
        ("accelerate(enforce_inference_steps=False) gives", "--diffusers-steps gives"),
        ("pass guidance_scale=1.5 (up to 2)", "pass --guidance 1.5 (up to 2)"),
        ("strength=0.5 leaves room", "--strength 0.5 leaves room"),
        ("give another folder, or overwrite=True.", "give another folder, or --overwrite."),
        ("Pass lora= with an LCM-LoRA", "Pass --lora with an LCM-LoRA"),
        ("type lcmlora.Style(source, weight).", "type --style name=source:weight."),
        ("learning_rate=0: a number above 0", "--learning-rate 0: a number above 0"),
        ("file base=model.bin", "file --base model.bin"),
        ("the prompt 'my fuse=False' stays", "the prompt 'my --no-fuse' stays"),
    ],
)
def test_messages_name_the_shell_s_options(message, words):
    assert in_shell_words(message) == words


def test_every_setting_of_distill_has_its_word():
    """`compile=` is another command's too, which has no such option."""
    names = {field.name for field in dataclasses.fields(lcmlora.DistillConfig)} - {"compile"}
    assert {in_shell_words(f"{name}=3") for name in names} == {f"--{name.replace('_', '-')} 3" for name in names}


def test_every_option_that_messages_may_name_is_there(shell):
    """The table of words names options of some command."""
    from lcmlora.cli.words import _OPTIONS, _PHRASES

    known = {o for name in COMMANDS for o in re.findall(r"--[\w-]+", shell(f"{name} -h").output)}
    named = {f"--{option}" for option in _OPTIONS.values()}
    named |= {o for _, words in _PHRASES for o in re.findall(r"--[\w-]+", words)}
    assert named <= known
