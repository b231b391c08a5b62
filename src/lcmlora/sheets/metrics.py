"""Numbers for a sheet's pictures: how far each is from the one of the most steps, and what a model says of it.

Nothing is downloaded: models come from a local folder that is named, or from a function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from PIL import Image

from ..compat import bars_hidden
from ..errors import DataError, LcmLoraError, brief
from .sheet import Cell, Sheet

Metric: TypeAlias = Callable[[Image.Image, Mapping[str, Any], Image.Image], float | None]
"""Called with a picture, its row, and the picture to compare it with: `measured` says which that is."""
Model: TypeAlias = str | Path | Callable[[], tuple[Any, Any]]
"""A local folder as `save_pretrained` writes it, or a function that returns a model and its processor."""

_BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


def measured(sheet: Sheet, metrics: Mapping[str, Metric] | None = None) -> Sheet:
    """The sheet with numbers in its rows, one for each metric.

    A picture is compared with the one of the same prompt, seed and size that had the most steps; without acceleration
    where the sheet has such a one. Of several the picture itself comes first, then the nearest in its line or column.

    Args:
        sheet: with pictures in it.
        metrics: name in the rows -> metric. `{"distance": distance()}` where none is given.

    Returns:
        A new sheet with the same pictures.

    Raises:
        DataError: a row has something else of that name, or a metric returns no number.
    """
    metrics = {"distance": distance()} if metrics is None else metrics
    for name in metrics:
        if any(name in row for row in sheet.rows):
            raise DataError(f"The rows have {name!r} already: give the metric another name.")
    numbers: dict[tuple[int, int], dict[str, float | None]] = {}
    for place, cell, reference in _with_references(sheet):
        row = {"prompt": sheet.lines[place[0]].prompt, **cell.row}
        found = {name: metric(cell.image, row, reference) for name, metric in metrics.items()}
        numbers[place] = {name: _number(name, value) for name, value in found.items()}
    cells = tuple(
        tuple(cell and Cell(cell.image, {**cell.row, **numbers[at, column]}) for column, cell in enumerate(line))
        for at, line in enumerate(sheet.cells)
    )
    return dataclasses.replace(sheet, cells=cells)


def _number(name: str, value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"The metric {name!r} returned {brief(value)}: a number or None is expected.") from error


def _with_references(sheet: Sheet) -> Iterator[tuple[tuple[int, int], Cell, Image.Image]]:
    """Each cell, with its place and the picture to compare it with."""
    cells = {(at, c): cell for at, line in enumerate(sheet.cells) for c, cell in enumerate(line) if cell is not None}
    groups: dict[Any, list[tuple[int, int]]] = {}
    for place, cell in cells.items():
        kind = (sheet.lines[place[0]].prompt, cell.row.get("seed"), cell.image.size)
        groups.setdefault(kind, []).append(place)
    for group in groups.values():
        for line, column in group:

            def rank(place: tuple[int, int], line: int = line, column: int = column) -> tuple[Any, ...]:
                row = cells[place].row
                away = (abs(place[0] - line), abs(place[1] - column))
                return bool(row.get("accelerated")), -(row.get("num_inference_steps") or 0), *away

            yield (line, column), cells[line, column], cells[min(group, key=rank)].image


def distance() -> Metric:
    """The root mean square of the pixels' differences: 0 for the same picture, 1 for black and white. No model."""

    def rms(image: Image.Image, row: Mapping[str, Any], reference: Image.Image) -> float:
        return float(np.sqrt(np.mean((_array(image) - _array(reference)) ** 2)))

    return rms


def clip_score(model: Model) -> Metric:
    """How well a picture fits its prompt: torchmetrics' CLIPScore, 100 times the cosine of CLIP's embeddings, 0 at
    least. A longer prompt is cut to what the model reads. Hessel et al. 2021, arXiv 2104.08718.

    Args:
        model: a local folder of a CLIP model, or a function that returns model and processor. It runs where its
            weights are.

    Raises:
        DataError: the folder holds no such model.
        LcmLoraError: torchmetrics is not installed.
    """
    _needs("torchmetrics")
    from torchmetrics.multimodal import CLIPScore

    clip = _Clip(*_loaded(model))
    score = CLIPScore(lambda: (clip, clip.processed))

    def fits(image: Image.Image, row: Mapping[str, Any], reference: Image.Image) -> float:
        with torch.inference_mode():
            value = score(_tensor(image).to(clip.device), row["prompt"])
        score.reset()
        return float(value)

    return fits


def pick_score(model: Model) -> Metric:
    """How well people would like a picture for its prompt: the cosine of a CLIP model's embeddings times its logit
    scale. Kirstain et al. 2023, arXiv 2305.01569.

    Args:
        model: a local folder of PickScore's model (or another CLIP) with its processor, or a function that returns
            both. It runs where its weights are.

    Raises:
        DataError: the folder holds no such model.
    """
    clip = _Clip(*_loaded(model))

    def liked(image: Image.Image, row: Mapping[str, Any], reference: Image.Image) -> float:
        with torch.inference_mode():
            pixels = clip.processed(images=[_tensor(image)], return_tensors="pt")["pixel_values"]
            text = clip.processed(text=[row["prompt"]], return_tensors="pt")
            seen = clip.get_image_features(pixels.to(clip.device))
            read = clip.get_text_features(text["input_ids"].to(clip.device), text["attention_mask"].to(clip.device))
            return float((clip.model.logit_scale.exp() * torch.cosine_similarity(seen, read)).mean())

    return liked


def lpips(net: Literal["alex", "vgg", "squeeze"] = "alex") -> Metric:
    """How different a picture looks from the one of the most steps: torchmetrics' LPIPS, 0 for the same.
    Zhang et al. 2018, arXiv 1801.03924.

    Args:
        net: the backbone. Its weights have to be in torch's cache; they are not downloaded.

    Raises:
        DataError: the weights are not there.
        LcmLoraError: torchmetrics or torchvision is not installed.
    """
    if net not in _BACKBONES:
        raise DataError(f"net={net!r} is none of LPIPS: pass {', '.join(map(repr, _BACKBONES))}.")
    _needs("torchmetrics")
    _needs("torchvision")
    import torchvision
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    url = torchvision.models.get_model_weights(_BACKBONES[net]).DEFAULT.url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not file.is_file():
        raise DataError(f"LPIPS needs {file}, and nothing is downloaded: put {url} there.")
    network = LearnedPerceptualImagePatchSimilarity(net, normalize=True)

    def looks(image: Image.Image, row: Mapping[str, Any], reference: Image.Image) -> float:
        try:
            with torch.inference_mode():
                value = network(*(_tensor(one)[None] / 255 for one in (image, reference)))
        except RuntimeError as error:
            raise DataError(f"LPIPS can't read pictures of {image.size} pixels by net={net!r}: {error}") from error
        network.reset()
        return float(value)

    return looks


class _Clip(torch.nn.Module):
    """A CLIP model and its processor as torchmetrics calls them: transformers 5 returns objects instead of embeddings,
    and a prompt that is cut has to keep its end token.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor, self.config = model.eval(), processor, model.config

    @property
    def device(self) -> torch.device:
        return cast("torch.device", self.model.device)

    def processed(self, **given: Any) -> Any:
        if "text" in given:
            length = self.config.text_config.max_position_embeddings
            given |= {"truncation": True, "max_length": length, "padding": True}
        return self.processor(**given)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self._embedding(self.model.get_image_features(pixel_values=pixel_values))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self._embedding(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask))

    @staticmethod
    def _embedding(found: Any) -> torch.Tensor:
        return cast("torch.Tensor", found if isinstance(found, torch.Tensor) else found.pooler_output)


def _loaded(model: Model) -> tuple[Any, Any]:
    """Model and processor. A name that is no folder is refused: transformers would look for it on the hub."""
    if callable(model):
        source, found = "The function", model()
    else:
        source, found = str(model), _from_folder(model)
    if not isinstance(found, tuple) or len(found) != 2 or not hasattr(found[0], "get_text_features"):
        raise DataError(f"{source} gives {brief(found)}: a CLIP model and its processor are expected.")
    return found


def _from_folder(folder: str | Path) -> tuple[Any, Any]:
    if not Path(folder).is_dir():
        raise DataError(f"{str(folder)!r} is no local folder, and nothing is downloaded: name one with a CLIP model.")
    from transformers import AutoModel, AutoProcessor

    try:
        with bars_hidden():
            made = AutoModel.from_pretrained(folder, local_files_only=True)
        return made, AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        raise DataError(f"{folder} holds no CLIP model with its processor: {first}") from error


def _needs(package: str) -> None:
    import importlib

    try:
        importlib.import_module(package)
    except (ImportError, RuntimeError) as error:
        more = "'lcmlora[metrics]'" if package == "torchmetrics" else f"{package}, in a build that fits your torch"
        raise LcmLoraError(f"This metric needs {package}, which can't be imported: pip install {more}.") from error


def _array(image: Image.Image) -> Any:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def _tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W), whole numbers from 0 to 255."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
