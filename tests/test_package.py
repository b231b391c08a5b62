"""The package as others see it: names, imports, the command line."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

import lcmlora
from conftest import sd_pipe, write_lora
from lcmlora.cli import main


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
