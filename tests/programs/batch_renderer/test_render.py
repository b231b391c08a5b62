"""The batch renderer's own tests, on the embedded model and on a tiny one."""

from __future__ import annotations

import json

import pytest
import render
from PIL import Image

import lcmlora
from lcmlora.testing import tiny_lora, tiny_pipeline

CSV = "prompt,seed,styles,steps\na fox,1-2,,2\na cat,3,ink:0.5,1\na dog,4,ink,1\n"


@pytest.fixture
def pipe(tmp_path):
    pipe = tiny_pipeline()
    return lcmlora.accelerate(pipe, lora=tiny_lora(pipe, tmp_path / "lcm.safetensors"))


@pytest.fixture
def ink(pipe, tmp_path):
    return tiny_lora(pipe, tmp_path / "ink.safetensors", only=lambda name: name.endswith("to_q"), seed=7)


def test_a_csv_becomes_pictures_a_sheet_and_no_failures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.csv").write_text(CSV)
    assert render.main(["jobs.csv", "out", "--style", f"ink={lcmlora.pocket.STYLE}"]) == 0
    assert sorted(file.name for file in (tmp_path / "out").glob("0*.png")) == [
        "0001-1.png",
        "0001-2.png",
        "0002-3.png",
        "0003-4.png",
    ]
    assert Image.open("out/contact.png").size == (640, 188)
    assert json.loads((tmp_path / "out/failed.json").read_text()) == []
    assert "4 pictures (0 were there)" in capsys.readouterr().out


def test_started_again_it_goes_on(pipe, ink, tmp_path):
    rows = tmp_path / "jobs.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "a fox", "seed": seed, "steps": 1}) for seed in range(3)))
    first = render.render(pipe, rows, tmp_path / "out", styles={"ink": ink})
    times = [file.stat().st_mtime_ns for file in first.files]
    first.files[1].unlink()
    second = render.render(pipe, rows, tmp_path / "out", styles={"ink": ink})
    assert second.files == first.files
    assert second.already == 2
    assert [file.stat().st_mtime_ns == time for file, time in zip(second.files, times, strict=True)] == [
        True,
        False,
        True,
    ]


def test_what_fails_is_tried_again_and_what_fails_always_is_told(pipe, tmp_path):
    failures = iter([RuntimeError("out of memory"), RuntimeError("out of memory")])

    def fails_twice(module, arguments):
        if (error := next(failures, None)) is not None:
            raise error

    pipe.unet.register_forward_pre_hook(fails_twice)
    rows = tmp_path / "jobs.csv"
    rows.write_text("prompt,seed,steps\na fox,1,1\na cat,2,1\na dog,3,77\n")
    made = render.render(pipe, rows, tmp_path / "out")
    assert [file.name for file in made.files] == ["0001-1.png", "0002-2.png"]
    assert [(row.row, "77" in row.reason) for row in made.failed] == [(3, True)]


def test_what_is_no_model_or_no_table_is_one_line(tmp_path, capsys):
    assert render.main([str(tmp_path / "none.csv"), str(tmp_path / "out"), "--model", "nowhere"]) == 1
    assert render.main([str(tmp_path / "none.csv"), str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[0] for line in told if line.startswith("refused")] == ["refused:", "refused:"]
