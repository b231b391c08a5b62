"""The package as others see it: names, imports, the command line, the documents."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import lcmlora
from conftest import sd_pipe, write_lora
from lcmlora import testing
from lcmlora.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_public_name_is_there_and_documented():
    for name in lcmlora.__all__:
        value = getattr(lcmlora, name)
        assert not isinstance(value, type(sys)), f"{name} is a module"
        assert value.__doc__, name
    assert lcmlora.__all__ == sorted(lcmlora.__all__)
    assert set(lcmlora.__all__) <= set(dir(lcmlora))
    with pytest.raises(AttributeError, match="no attribute 'acelerate'"):
        _ = lcmlora.acelerate


def test_the_command_line_lists_bases():
    shown = CliRunner().invoke(main, ["bases"]).output
    assert "latent-consistency/lcm-lora-sdxl" in shown
    assert "788 layers" in shown


def test_the_command_line_inspects_a_file(tmp_path):
    file = write_lora(tmp_path / "l.safetensors", sd_pipe().unet, alpha=2.0)
    shown = CliRunner().invoke(main, ["inspect", str(file)])
    assert shown.exit_code == 0
    assert "rank 4" in shown.output
    assert "alphas 2" in shown.output


def test_the_command_line_tells_refusals_in_a_line(tmp_path):
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "none.bin")])
    assert shown.exit_code == 1
    assert shown.output.startswith("Error: LoRA")


def test_distill_has_an_option_for_every_setting():
    shown = CliRunner().invoke(main, ["distill", "--help"]).output
    for name in ("--rank", "--learning-rate", "--huber-c", "--gradient-checkpointing", "--mixed-precision"):
        assert name in shown


def test_every_pitfall_has_a_row_and_every_row_a_test_that_exists():
    """docs/pitfalls.md: numbered rows, each with a test's name, or with the words "out of reach" and why."""
    text = (ROOT / "docs/pitfalls.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 70
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    for number, row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named or "out of reach" in row, f"row {number} names no test"
        assert set(named) <= defined, f"row {number}: {set(named) - defined}"


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_documents_name_what_there_is(file):
    text = file.read_text(encoding="utf-8")
    assert set(re.findall(r"lcmlora\.(\w+)\(", text)) <= set(lcmlora.__all__)
    for place in re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", text):
        assert (file.parent / place).exists(), place


def blocks(file: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


GUIDES = """accelerating among-other-code benchmark distillation generate guidance in-your-library offline pipelines
recipes servers several-processes sharing sheets styles troubleshooting"""
"""The pages that begin with something to run."""


def test_every_python_block_of_the_documents_compiles():
    found = {file.name: blocks(file) for file in DOCUMENTS}
    assert len(found["README.md"]) >= 3
    for name in GUIDES.split():
        assert "lcmlora.load_pocket()" in found[f"{name}.md"][0], name
    for name, texts in found.items():
        for text in texts:
            compile(text, name, "exec")


RUNNABLE = {"README.md": ("lcmlora.accelerate(pipe)  # base", "tiny_pipeline")}
"""Words of the blocks that run with the embedded model, the working folder holding styles of the names they use."""


@pytest.mark.parametrize(
    ("name", "words"), [(name, words) for name, all_words in RUNNABLE.items() for words in all_words]
)
def test_blocks_run_as_they_stand(name, words, tmp_path, monkeypatch):
    (file,) = (file for file in DOCUMENTS if file.name == name)
    (block,) = (text for text in blocks(file) if words in text and "from_pretrained" not in text)
    monkeypatch.chdir(tmp_path)
    pipe = lcmlora.load_pocket()
    (tmp_path / "mine").mkdir()
    for style in ("mine/ink.safetensors", "paper.safetensors"):
        testing.tiny_lora(pipe, tmp_path / style, spelling="diffusers", only=lambda layer: "to_q" in layer)
    exec(compile(block, name, "exec"), {"pipe": pipe, "lcmlora": lcmlora})
