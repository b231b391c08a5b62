"""What the training scripts share: the optimisers, checkpoints, a log.

The optimisers are Muon for the weights of linear layers and convolutions, and AdamW for the rest. Muon (Jordan et al.
2024) orthogonalises each matrix's update. With it the VAE had half the squared error that AdamW left after as many
steps of the same cost. torch's takes matrices alone, so it gets each convolution as a matrix on the same memory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def matrix_of(tensor: torch.Tensor) -> torch.Tensor:
    """A weight as (outputs, everything else), on the same memory if it is channels_last."""
    return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).flatten(1)


class MuonAndAdamW:
    """Both optimisers, for what wants a gradient in `modules`, which must be channels_last."""

    def __init__(self, modules: Iterable[nn.Module], weight_decay: float = 1e-4) -> None:
        layers = [layer for module in modules for layer in module.modules()]
        self.params = list({p: None for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad})
        weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d)]
        self.weights = [w for w in weights if w.requires_grad and min(w.shape[:2]) > 4]
        ids = {id(p) for p in self.weights}
        self.matrices = [nn.Parameter(matrix_of(w.detach())) for w in self.weights]
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            if weight.data_ptr() != matrix.data_ptr():
                raise ValueError(f"A weight of {tuple(weight.shape)} is not channels_last: Muon would train a copy.")
        rest = [p for p in self.params if id(p) not in ids]
        self.optimizers = [torch.optim.Muon(self.matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]
        if rest:
            self.optimizers.append(torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=weight_decay))

    def step(self, loss: torch.Tensor, rate: float, clip: float) -> None:
        """One step down the gradient of `loss`, whose norm is clipped, with one rate for both."""
        for p in self.params:
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, clip)
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = matrix_of(weight.grad)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, one in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(one)


def save(state: Any, file: Path) -> None:
    """Write a checkpoint in one go: whoever is stopped meanwhile has the one before."""
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


class Checkpoint:
    """What a training goes on from: its parts, put where they were by their names, and how many steps were made."""

    def __init__(self, file: Path, **parts: Any) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        state = torch.load(file, weights_only=True) if file.exists() else {"step": 0}
        self.file, self.parts, self.step = file, parts, int(state["step"])
        for name, part in parts.items() if self.step else ():
            part.load_state_dict(state[name])

    def save(self, step: int) -> None:
        save({**{name: part.state_dict() for name, part in self.parts.items()}, "step": step}, self.file)


class Log:
    """Means of what was measured in every 20 steps, a line of JSON each."""

    def __init__(self, file: Path) -> None:
        self.file, self.began, self.rows = file.open("a", encoding="utf-8"), time.monotonic(), []

    def add(self, step: int, **measured: torch.Tensor) -> None:
        self.rows.append({name: value.item() for name, value in measured.items()})
        if step % 20:
            return
        means = {name: sum(row[name] for row in self.rows) / len(self.rows) for name in measured}
        self.file.write(json.dumps({"step": step, **means, "seconds": round(time.monotonic() - self.began, 1)}) + "\n")
        self.file.flush()
        self.rows.clear()
