"""Numbers for a sheet's pictures: what is compared with what, and by which measure. Models are tiny and random."""

from __future__ import annotations

import builtins
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import lcmlora
from lcmlora.sheets import Cell, Line, Sheet, metrics
from lcmlora.sheets.metrics import clip_score, distance, lpips, measured, pick_score
from lcmlora.testing import tiny_tokenizer


def grey(value: int, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), (value,) * 3)


def a_sheet(*lines: list[tuple[object, ...] | None], prompts=("a fox",), seeds=(1,)) -> Sheet:
    """Cells as (grey, steps) or (grey, steps, accelerated)."""

    def cell(value, steps, accelerated=False, seed=1):
        row = {"num_inference_steps": steps, "accelerated": accelerated, "seed": seed, "prompt": "a fox"}
        return Cell(grey(value), row)

    cells = tuple(tuple(one and cell(*one) for one in line) for line in lines)
    named = tuple(Line(prompts[number % len(prompts)], str(number)) for number in range(len(lines)))
    return Sheet(cells, tuple(map(str, range(len(lines[0])))), named)


def references(sheet: Sheet) -> list[int]:
    """The grey of what each picture is compared with."""
    compared = measured(sheet, {"grey": lambda image, row, reference: reference.getpixel((0, 0))[0]})
    return [row["grey"] for row in compared.rows]


@pytest.mark.parametrize(
    ("sheet", "compared"),
    [
        (a_sheet([(1, 4), (2, 25), (3, 8)]), [2, 2, 2]),
        (a_sheet([(1, 25), (2, 50), (3, 100, True)]), [2, 2, 2]),
        (a_sheet([(1, 2, True), (2, 4, True), None]), [2, 2]),
        (a_sheet([(1, 2), (2, 8)], [(3, 2), (4, 8)]), [2, 2, 4, 4]),  # steps across, another setting down
        (a_sheet([(1, 2), (2, 2)], [(3, 8), (4, 8)]), [3, 4, 3, 4]),  # and the other way round
        (a_sheet([(1, 2), (2, 8)], [(3, 2), (4, 8)], prompts=("a", "b")), [2, 2, 4, 4]),
        (a_sheet([(1, 2), (2, 8)], [(3, 2), (4, 4)], prompts=("a", "b")), [2, 2, 4, 4]),
        (a_sheet([(1, 2, False, 1), (2, 8, False, 2)]), [1, 2]),
        (a_sheet([(1, None), (2, None)]), [1, 2]),
    ],
)
def test_a_picture_is_compared_with_the_one_of_the_most_steps(sheet, compared):
    assert references(sheet) == compared


def test_a_picture_is_compared_with_none_of_another_size():
    sheet = a_sheet([(1, 2), (2, 8)])
    large = Cell(grey(9, 16), {"num_inference_steps": 50, "seed": 1})
    assert references(Sheet(((*sheet.cells[0], large),), ("a", "b", "c"), sheet.lines)) == [2, 2, 9]


def test_the_distance_is_the_root_mean_square_of_the_pixels():
    sheet = measured(a_sheet([(0, 1), (255, 9), None, (153, 4)]))
    assert [row["distance"] for row in sheet.rows] == pytest.approx([1, 0, 0.4])
    one, two = (Image.fromarray(np.uint8([[[a, 0, 0], [0, 0, 0]]])) for a in (0, 255))
    assert distance()(one, {}, two) == pytest.approx((1 / 6) ** 0.5)


def test_the_sheet_that_was_measured_is_as_it_was_and_numbers_go_wherever_rows_go(tmp_path):
    before = a_sheet([(0, 1), (255, 9)])
    after = measured(
        before, {"far": distance(), "none": lambda *given: None, "tensor": lambda *given: torch.tensor(2)}
    )
    assert "far" not in before.rows[0]
    assert after.images == before.images
    assert [row["far"] for row in after.to_dict()["pictures"]] == [1.0, 0.0]
    assert after.to_csv(tmp_path / "a.csv").read_text().splitlines()[1].endswith("1.0,,2.0")
    assert 'data-v="1.0">1</td>' in after.to_html(tmp_path / "a.html").read_text()


@pytest.mark.parametrize(
    ("given", "words"),
    [({"seed": distance()}, "'seed' already"), ({"bad": lambda *given: "far"}, "'bad' returned 'far'")],
)
def test_metrics_that_cannot_be_are_refused(given, words):
    with pytest.raises(lcmlora.DataError, match=words):
        measured(a_sheet([(0, 1)]), given)


# -- CLIP -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    """A tiny random CLIP and its processor."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {**shape, **tokens, "max_position_embeddings": 16}
    vision = {**shape, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return model, CLIPProcessor(images, tokenizer)


@pytest.fixture(scope="module")
def clip_folder(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    for part in clip:
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def noise():
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (20, 20, 3), dtype=np.uint8))


def logits(clip, image, prompt) -> float:
    """What the model itself says: logit scale times cosine."""
    model, processor = clip
    with torch.no_grad():
        given = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True, max_length=16)
        return float(model(**given).logits_per_image)


@pytest.mark.parametrize("prompt", ["a fox", "fox " * 40])
def test_clip_scores_are_the_cosines_that_the_model_itself_finds(clip, clip_folder, noise, prompt):
    pytest.importorskip("torchmetrics")
    row, scale = {"prompt": prompt}, clip[0].logit_scale.exp().item()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a prompt that was cut after its end token
        found = [clip_score(one)(noise, row, noise) for one in (clip_folder, lambda: clip)]
        liked = [pick_score(one)(noise, row, noise) for one in (str(clip_folder), lambda: clip)]
    expected = logits(clip, noise, prompt)
    assert liked == pytest.approx([expected] * 2, rel=1e-4)
    assert found == pytest.approx([max(0, 100 * expected / scale)] * 2, rel=1e-4)


def test_a_clip_score_reads_each_rows_prompt(clip):
    pytest.importorskip("torchmetrics")
    sheet = a_sheet([(10, 1)], [(10, 1)], prompts=("a fox", "an owl"))
    cells = tuple((Cell(line[0].image, {"seed": 1}),) for line in sheet.cells)  # rows without a prompt: the line's
    one, two = (
        row["score"] for row in measured(Sheet(cells, ("x",), sheet.lines), {"score": pick_score(lambda: clip)}).rows
    )
    assert one == pytest.approx(logits(clip, grey(10), "a fox"), rel=1e-4)
    assert two == pytest.approx(logits(clip, grey(10), "an owl"), rel=1e-4)


@pytest.mark.parametrize("metric", [clip_score, pick_score])
def test_a_model_that_is_not_here_is_refused_and_not_looked_for(metric, tmp_path):
    pytest.importorskip("torchmetrics")
    with pytest.raises(lcmlora.DataError, match=r"'openai/clip-vit-base-patch16' is no local folder"):
        metric("openai/clip-vit-base-patch16")
    with pytest.raises(lcmlora.DataError, match="holds no CLIP model"):
        metric(tmp_path)


def test_a_model_that_is_no_clip_is_refused(tmp_path, clip):
    from transformers import CLIPTextModel

    from lcmlora.testing import text_config

    CLIPTextModel(text_config(tiny_tokenizer())).save_pretrained(tmp_path)
    clip[1].save_pretrained(tmp_path)
    with pytest.raises(lcmlora.DataError, match=r"CLIP model and its processor are expected|holds no CLIP model"):
        pick_score(tmp_path)


def test_a_function_that_returns_no_clip_is_refused(clip):
    for given in (None, clip[0], (None, clip[1])):
        with pytest.raises(lcmlora.DataError, match=r"function gives .* CLIP model and its processor are expected"):
            pick_score(lambda given=given: given)


# -- what is not installed --------------------------------------------------------------------------------------------


@pytest.fixture
def without(monkeypatch):
    """Let a package not be installed."""

    def hide(package):
        real = builtins.__import__

        def refuse(name, *rest):
            if name.partition(".")[0] == package:
                raise ImportError(name)
            return real(name, *rest)

        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr(builtins, "__import__", refuse)

    return hide


@pytest.mark.parametrize("make", [lambda: clip_score(lambda: None), lpips])
def test_without_torchmetrics_a_sentence_says_what_to_install(make, without):
    without("torchmetrics")
    with pytest.raises(lcmlora.LcmLoraError, match=r"torchmetrics.*pip install 'lcmlora\[metrics\]'"):
        make()


def test_lpips_downloads_nothing(without, monkeypatch, tmp_path):
    """It says which file has to be where; a stand-in for torchvision names its address, as that does."""
    pytest.importorskip("torchmetrics")
    weights = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(url="https://example.org/models/alexnet-1234.pth"))
    stub = types.ModuleType("torchvision")
    stub.models = types.SimpleNamespace(get_model_weights=lambda name: {"alexnet": weights}[name])
    monkeypatch.setitem(sys.modules, "torchvision", stub)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(lcmlora.DataError, match=r"checkpoints/alexnet-1234.pth, and nothing is downloaded: put https"):
        lpips()
    with pytest.raises(lcmlora.DataError, match="net='resnet' is none of LPIPS: pass 'alex', 'vgg', 'squeeze'"):
        lpips("resnet")
    without("torchvision")
    with pytest.raises(lcmlora.LcmLoraError, match="needs torchvision"):
        metrics.lpips("vgg")
