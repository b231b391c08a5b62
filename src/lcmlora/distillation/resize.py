"""A LoRA at a smaller rank."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch

from ..errors import LoraFileError
from ..lora.files import LoraFile, LoraInfo, Pair, load, read
from ..lora.sources import READ_ERRORS, Given, Source
from ..lora.spellings import is_kohya
from .export import write


@dataclasses.dataclass(frozen=True)
class ResizedLora:
    """What `resize_lora` made.

    Attributes:
        file: the new file.
        kept: share of the energy (the squared singular values of all layers) that is still there.
        least: the layer that lost the most, and its own share.
    """

    file: Path
    kept: float
    least: tuple[str, float]


def resize_lora(
    source: Given, rank: int, output: str | os.PathLike[str], *, weight_name: str | None = None
) -> ResizedLora:
    """Write a LoRA at a smaller rank: in each layer, the best approximation of that rank there is (a truncated SVD).

    The spelling, the weights' dtype and the metadata stay. Scales are folded into the weights, so that alpha is the
    rank in every layer, whatever it was.

    Args:
        source: a file, a folder, a repository id, or a dict of tensors.
        rank: of the new file. Layers that have less are filled up with zeros.
        output: the new file.
        weight_name: the file's name in a folder or repository.

    Returns:
        The file, and how much of the LoRA is still there.

    Raises:
        LoraFileError: the source can't be read, is a DoRA or of no higher rank, or the output can't be written.
    """
    file = Path(output)
    found = Source.of(source, weight_name).find()
    info = read(found)
    _check(info, rank, file)
    tensors: dict[str, torch.Tensor] = {}
    kept: dict[str, tuple[float, float]] = {}
    with found.opened() as opened:
        for name, pair in _modules(info).items():
            up, down, energy = _smaller(*load(found, pair, opened), pair.scale, rank)
            kept[name] = (energy[:rank].sum().item(), energy.sum().item())
            dtype = opened.get_tensor(pair.down).dtype
            tensors[pair.down] = down.to(dtype).view(rank, *pair.down_shape[1:])
            tensors[pair.up] = up.to(dtype).view(len(up), rank, *pair.up_shape[2:])
            if is_kohya(name):
                tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    shares = {name: part / whole if whole else 1.0 for name, (part, whole) in kept.items()}
    parts, wholes = (sum(values) for values in zip(*kept.values(), strict=True))
    share = parts / wholes if wholes else 1.0
    write(
        tensors, file, {**_metadata(found, rank), "lcmlora_resized": json.dumps({"from": info.ranks, "kept": share})}
    )
    least = min(shares, key=shares.__getitem__)
    return ResizedLora(file, share, (least, shares[least]))


def _modules(info: LoraInfo) -> dict[str, Pair]:
    return {name: pair for part in (info.modules, *info.text_modules.values()) for name, pair in part.items()}


def _check(info: LoraInfo, rank: int, output: Path) -> None:
    if type(rank) is not int or not 1 <= rank < max(info.ranks):
        raise LoraFileError(f"rank={rank!r}: 1 to {max(info.ranks) - 1} is expected for {info.describe()}.")
    if any(pair.magnitude for pair in _modules(info).values()):
        raise LoraFileError(f"{info.describe()} is a DoRA, whose magnitudes hold for its own rank only.")
    if output.suffix != ".safetensors":
        raise LoraFileError(f"{output}: a file that ends in .safetensors is expected.")
    if info.path and output.exists() and output.samefile(info.path):
        raise LoraFileError(f"{output} is the source itself; give another file.")


def _smaller(
    up: torch.Tensor, down: torch.Tensor, scale: float, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(up, down, energies) of scale * up @ down, which is never formed: it may have a hundred million numbers. With
    up = Q_u R_u and down^T = Q_d R_d its singular values are those of scale * R_u R_d^T, which is rank x rank.
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(scale * r_up @ r_down.T, full_matrices=False)
    root = s[:rank].sqrt()
    new_up, new_down = q_up @ (u[:, :rank] * root), (q_down @ (vh[:rank].T * root)).T
    missing = max(0, rank - len(root))
    new_up = torch.nn.functional.pad(new_up, (0, missing))
    new_down = torch.nn.functional.pad(new_down, (0, 0, 0, missing))
    return new_up.contiguous(), new_down.contiguous(), s.square()


def _metadata(file: LoraFile, rank: int) -> dict[str, str]:
    """The source's, without what told ranks and alphas: where nothing tells, every loader takes alpha for the rank."""
    try:
        with file.opened() as opened:
            found = dict(opened.metadata() or {})
    except READ_ERRORS as error:
        raise file.unreadable(error) from error
    found.pop("lora_adapter_metadata", None)
    sizes = {"ss_network_dim": str(rank), "ss_network_alpha": str(float(rank))}
    return {**found, **{key: value for key, value in sizes.items() if key in found}}
