"""Every example as it stands, on the embedded model."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import runpy
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from diffusers.utils import logging
from PIL import Image

import lcmlora

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py"))
PROMPT = "a fox on a teal background"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example as a program, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    verbosity = logging.get_verbosity()

    def run(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")

    yield run
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def fast():
    pipe = lcmlora.accelerate(lcmlora.load("pocket"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompt=PROMPT, seed=1, **call):
    return pixels(pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0])


def pixels(image):
    """Of a picture that shows something."""
    found = np.asarray(image if isinstance(image, Image.Image) else Image.open(image).convert("RGB"), dtype=np.int16)
    assert found.std() > 8, "a flat picture"
    return found


def loaded(file):
    """A program as a module of its own."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_says_how_to_run_it(name):
    lines = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    head = "\n".join(lines[:12])
    assert head.startswith('"""')
    assert f"examples/{name}.py" in head or f"examples {name}:app" in head
    assert "MODEL" in head, "it takes the reader's own model"


def test_the_list_has_every_example_and_this_file_a_test():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    here = Path(__file__).read_text(encoding="utf-8")
    for name in NAMES:
        assert f"[{name}.py]({name}.py)" in text
        assert f"def test_{name}(" in here
    assert "[notebook.ipynb](notebook.ipynb)" in text


def test_first_picture(run, fast, capsys):
    run("first_picture")
    assert np.array_equal(pixels("first.png"), drawn(fast))
    assert "scheduler='LCMScheduler', steps=4" in capsys.readouterr().out


def test_fine_tune_and_two_styles(run):
    run("fine_tune_and_two_styles")
    pictures = sorted(Path().glob("styles*.png"))
    assert len(pictures) == 4
    assert len({pixels(picture).tobytes() for picture in pictures}) == 4


def test_img2img(run):
    run("img2img")
    pictures = [pixels(f"img2img-{strength}.png") for strength in (0.3, 0.5, 0.7, 0.9)]
    distances = [np.abs(picture - pictures[0]).mean() for picture in pictures]
    assert distances == sorted(distances), "a greater strength leaves less of the sketch"
    assert distances[1] > 0


def test_inpaint(run):
    run("inpaint")
    before, after = pixels("inpaint-before.png"), pixels("inpaint-after.png")
    assert before.shape == after.shape
    assert not np.array_equal(before, after)


def test_controlnet(run, fast):
    run("controlnet")
    assert np.array_equal(pixels("controlnet.png"), drawn(fast)), "an untrained ControlNet changes nothing"


def test_animatediff(run):
    run("animatediff")
    with Image.open("animatediff.gif") as film:
        assert film.n_frames == 8
        pixels(film.convert("RGB"))


def test_recipes_side_by_side(run, capsys):
    run("recipes_side_by_side")
    columns = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert columns == ["base, 4 steps", "base, 25 steps", "lcm, 4 steps", "tcd, 4 steps"]
    assert Path("recipes.html").stat().st_size > 20_000


def test_sheets_and_report(run, capsys):
    run("sheets_and_report")
    rows = json.loads(Path("sheets/sheet.json").read_text(encoding="utf-8"))["pictures"]
    assert len(rows) == 13 + 2, "without, beside each of three lines of four"
    assert all("distance" in row for row in rows)
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_benchmark(run, capsys):
    run("benchmark")
    assert "times faster, where the stages allow" in capsys.readouterr().out
    assert Path("benchmark.html").is_file()


def test_batch_from_csv(run, capsys):
    for before in (0, 5):  # the second time it goes on, where there is nothing left to do
        with pytest.warns(lcmlora.LcmLoraWarning, match="Row 4"):
            run("batch_from_csv")
        told = capsys.readouterr().out.splitlines()
        assert told[0] == f"5 pictures, {before} of them were there already"
        assert told[1].startswith("row 4: num_inference_steps=500")
    assert np.array_equal(pixels("again.png"), pixels("pictures/0001-1.png"))


def test_distil_from_folder(run):
    run("distil_from_folder", "pocket", "", "3")
    assert len(list(Path("pictures").glob("*.txt"))) == 4
    assert lcmlora.inspect_lora("my-lcm-lora/pytorch_lora_weights.safetensors").recipe == "lcm"
    pixels("distilled.png")


def test_distil_from_prompts(run, capsys):
    run("distil_from_prompts", "pocket", "", str(lcmlora.pocket.STYLE), "3")
    assert capsys.readouterr().out.splitlines()[-1] == "tcd"
    pixels("distilled.png")


def test_bake(run):
    run("bake")
    assert np.array_equal(pixels("plain.png"), pixels("baked.png"))


def test_several_processes(run, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (two := tmp_path / "two").mkdir()
    done = subprocess.run(
        [*torchrun, FOLDER / "several_processes.py"], cwd=two, capture_output=True, text=True, check=False
    )
    assert "8 pictures by 2 processes" in done.stdout, done.stderr
    run("several_processes")
    names = sorted(file.name for file in Path("pictures").iterdir())
    assert names == sorted(file.name for file in (two / "pictures").iterdir())
    for name in names:
        assert np.array_equal(pixels(f"pictures/{name}"), pixels(two / "pictures" / name))


@pytest.fixture
def service(monkeypatch):
    """The service under uvicorn on the loopback, and how to ask it."""
    uvicorn = pytest.importorskip("uvicorn")
    monkeypatch.delenv("MODEL", raising=False)
    module = loaded(FOLDER / "service.py")
    server = uvicorn.Server(uvicorn.Config(module.app, log_level="error"))
    with socket.create_server(("127.0.0.1", 0), backlog=100) as door:  # whoever comes early waits at the door
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()

        def ask(path, wish=None):
            data = None if wish is None else json.dumps(wish).encode()
            request = Request(f"http://127.0.0.1:{door.getsockname()[1]}{path}", data)
            request.add_header("Content-Type", "application/json")
            try:
                with urlopen(request, timeout=300) as answer:
                    return answer.status, answer.read()
            except HTTPError as refused:
                return refused.code, refused.read()

        yield module, ask
        server.should_exit = True
        thread.join()


def test_service(service, fast):
    """Forty requests at once, each equal to the direct call; meanwhile health answers."""
    module, ask = service
    wishes = [
        {"prompt": f"a {thing} on a teal background", "seed": seed, "steps": 1, "styles": styles}
        for thing in ("fox", "owl")
        for seed in (1, 2)
        for styles in ({}, {"soft": 0.8})
    ] * 5
    gate = threading.Event()
    module.painter.submit(gate.wait)
    with ThreadPoolExecutor(40) as clients:
        answers = [clients.submit(ask, "/picture", wish) for wish in wishes]
        health = json.loads(ask("/health")[1])
        gate.set()
    assert health["accelerated"] is True
    lcmlora.set_styles(fast, {"soft": lcmlora.Style(lcmlora.pocket.STYLE, 0)})
    expected = []
    for wish in wishes[:8]:
        with lcmlora.styled(fast, wish["styles"]):
            expected.append(drawn(fast, wish["prompt"], wish["seed"], num_inference_steps=1))
    for i, answer in enumerate(answers):
        status, png = answer.result()
        assert status == 200
        assert np.array_equal(pixels(io.BytesIO(png)), expected[i % 8])
    lcmlora.set_styles(fast, {})
    assert json.loads(ask("/health")[1]) == {"accelerated": True, "waiting": 0}

    for wrong, words in (({"steps": 77}, b"77"), ({"styles": {"ink": 1}}, b"ink"), ({"seed": -1}, b"seed")):
        status, reason = ask("/picture", {"prompt": PROMPT, **wrong})
        assert (status, words in reason) == (422, True)
    module.waiting = 100
    assert ask("/picture", {"prompt": PROMPT})[0] == 503


def test_the_notebook_runs_and_shows_what_it_makes():
    nbformat = pytest.importorskip("nbformat")
    file = FOLDER / "notebook.ipynb"
    assert file.stat().st_size < 500_000
    kept = nbformat.read(file, as_version=4)
    anew = loaded(ROOT / "scripts/notebook.py").run(nbformat.read(file, as_version=4))
    assert [shown(cell) for cell in anew.cells] == [shown(cell) for cell in kept.cells], "python scripts/notebook.py"
    assert shown(anew.cells[-1]) == ["True"]


def shown(cell):
    """A cell's texts, and the sizes of its pictures: their pixels hang on the machine."""
    found = []
    for output in cell.get("outputs", ()):
        if png := output.data.get("image/png"):
            found.append(Image.open(io.BytesIO(base64.b64decode(png))).size)
        else:
            found.append(output.data["text/plain"])
    return found
