"""Going on where a run stopped: what it was told, and what it can't compute anew."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import DataError
from ..writing import whole, write_text
from .config import DistillConfig

SETTINGS, CHECKPOINT = "settings.json", "checkpoint.pt"


def chosen(config: DistillConfig, *, free: bool = False) -> dict[str, Any]:
    """The settings that decide what a run learns; or the free ones, such as where its cache is."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata["free"] == free}


def settings(config: DistillConfig, **facts: Any) -> dict[str, Any]:
    """All that decides what a run learns, as JSON has it, and what does not under "free"."""
    told: dict[str, Any] = json.loads(json.dumps({**chosen(config), **facts}))
    return {"lcmlora": __version__, "settings": told, "free": chosen(config, free=True)}


def write_settings(output: Path, told: dict[str, Any]) -> None:
    """Note the run's settings in its folder."""
    write_text(output / SETTINGS, json.dumps(told, indent=2) + "\n")


def check(output: Path, state: dict[str, Any], told: dict[str, Any]) -> None:
    """Refuse to go on with a run that was told something else, or is further already.

    Raises:
        DataError: naming what differs.
    """
    before, now = state["settings"], told["settings"]
    longer = now["schedule"] == "constant" and now["then"] == "none"  # then the first steps are the same
    differ = sorted(
        name
        for name in before.keys() | now.keys()
        if before.get(name) != now.get(name) and not (name == "steps" and longer)
    )
    if differ:
        words = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in differ)
        raise DataError(f"{output} holds a run with other settings: {words}. Give those, or another output folder.")
    if state["step"] > now["steps"]:
        raise DataError(
            f"{output} holds a run that has {state['step']} steps already, more than steps={now['steps']}. Give "
            "another output folder."
        )


def save(output: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint; it takes the place of the last.

    Raises:
        LcmLoraError: the disk is full.
    """
    with whole(output / CHECKPOINT) as file:
        torch.save(state, file)


def load(output: Path) -> dict[str, Any] | None:
    """The checkpoint, on the CPU; None where there is none.

    Raises:
        DataError: it can't be read.
    """
    file = output / CHECKPOINT
    if not file.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise DataError(f"{file} can't be read as a checkpoint; delete it to begin anew.") from error
    if not {"step", "params", "optimizer", "settings"} <= state.keys():
        raise DataError(f"{file} is no checkpoint of this version; delete it to begin anew.")
    return state
