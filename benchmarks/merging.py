"""Seconds and memory of accelerating, swapping a style and restoring, against the same with plain diffusers.

    python benchmarks/merging.py [sd15 sdxl] [--repeats 5] [--ways diffusers memory source disk] [--cpu]

Full UNet shapes, half precision; an LCM-LoRA (rank 64, every layer) and two styles (rank 32, the attention layers), as
files. Plain diffusers: load, load, set_adapters, fuse_lora; to swap, unfuse, delete, load, set_adapters, fuse; to go
back, unfuse and unload. Every figure of one shape comes from one process in which both take turns. The UNet is loaded
from a folder, as keep="source" needs it; what a way back leaves changed is put back, uncounted, from there.
`--cpu` counts the process's own time on one thread, for a machine that others use too.

A virtual machine may have to get memory from its host first, which can take more time than all the rest. So the
originals are also kept in memory that was taken and given back a moment ago; the seconds of that are not counted.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import lcmlora
from lcmlora.layers import lcm_layers
from lcmlora.lora import originals
from lcmlora.transition.snapshot import Component
from lcmlora.transition.verification import examine
from shapes import build, count_one_processors_time, in_attention, peak_memory, save, seconds, summary, write_lora


class Plain:
    """The recipe with diffusers alone."""

    def __init__(self, pipe: Any, folder: Path) -> None:
        self.pipe, self.folder = pipe, folder

    def _load(self, name: str) -> None:
        self.pipe.load_lora_weights(str(self.folder), weight_name=f"{name}.safetensors", adapter_name=name)

    def accelerate(self) -> None:
        self._load("lcm")
        self._load("one")
        self.pipe.set_adapters(["lcm", "one"], [1.0, 0.8])
        self.pipe.fuse_lora(adapter_names=["lcm", "one"])

    def swap(self) -> None:
        self.pipe.unfuse_lora()
        self.pipe.delete_adapters("one")
        self._load("two")
        self.pipe.set_adapters(["lcm", "two"], [1.0, 0.8])
        self.pipe.fuse_lora(adapter_names=["lcm", "two"])

    def restore(self) -> None:
        self.pipe.unfuse_lora()
        self.pipe.unload_lora_weights()


class Ours:
    """The same with lcmlora."""

    def __init__(self, pipe: Any, folder: Path, keep: Any) -> None:
        self.pipe, self.folder, self.keep = pipe, folder, keep

    def accelerate(self) -> None:
        styles = {"one": self.folder / "one.safetensors"}
        lcmlora.accelerate(self.pipe, lora=self.folder / "lcm.safetensors", styles=styles, keep=self.keep)

    def swap(self) -> None:
        lcmlora.set_styles(self.pipe, {"two": self.folder / "two.safetensors"})

    def restore(self) -> None:
        lcmlora.restore(self.pipe)


def fresh(pipe: Any) -> Any:
    """Another pipeline around the same UNet, without a record of what was done to it."""
    pipe.unet.__dict__.pop("_lcmlora", None)
    return type(pipe)(**pipe.components)


def seconds_at_hand(ours: Ours) -> float:
    """Seconds to accelerate where the memory for the originals need not come from the host of a virtual machine."""
    fresh_memory, uncounted = originals._memory, 0.0

    def memory(size: int) -> torch.Tensor:
        nonlocal uncounted
        uncounted += seconds(lambda: fresh_memory(size))
        return fresh_memory(size)

    originals._memory = memory
    try:
        return seconds(ours.accelerate) - uncounted
    finally:
        originals._memory = fresh_memory


def changed(unet: torch.nn.Module, file: Path) -> float:
    """Share of the LCM layers' weights that are not what they were. They are put back."""
    differing, count, found = 0, 0, load_file(file)  # mapped
    with torch.no_grad():
        for name, layer in lcm_layers(unet).items():
            value = found[f"{name}.weight"]
            differing, count = differing + int((layer.weight != value).sum()), count + value.numel()
            layer.weight.copy_(value)
    return differing / count


def seconds_to_verify(unet: torch.nn.Module) -> float:
    """What `restore` verifies before it touches anything. The walk over the UNet is what the way back needs."""
    component = Component.of("unet", unet)
    return seconds(lambda: examine(component))


def loaded(shape: str, folder: Path) -> Any:
    """A pipeline with its UNet from a file."""
    pipe = build(shape)
    pipe.unet.save_pretrained(folder, max_shard_size="100GB")
    pipe.unet = None
    pipe.unet = UNet2DConditionModel.from_pretrained(folder, dtype=torch.float16)
    return pipe


def measure(shape: str, folder: Path, repeats: int, wanted: list[str]) -> dict[str, Any]:
    pipe, file = loaded(shape, folder), folder / "diffusion_pytorch_model.safetensors"
    write_lora(pipe.unet, folder / "lcm.safetensors")
    for seed, name in enumerate(("one", "two")):
        write_lora(pipe.unet, folder / f"{name}.safetensors", rank=32, only=in_attention, seed=seed + 2)
    ways: dict[str, Plain | Ours] = {
        "diffusers": Plain(pipe, folder),
        # before "disk", whose file would leave memory at hand when it is removed
        "memory": Ours(pipe, folder, "memory"),
        "source": Ours(pipe, folder, "source"),
        "disk": Ours(pipe, folder, "disk"),
    }
    ways = {name: way for name, way in ways.items() if name in wanted}
    acts: tuple[Callable[[Any], None], ...] = (
        lambda way: way.accelerate(),
        lambda way: way.swap(),
        lambda way: way.restore(),
    )
    names = ("accelerate", "swap", "restore")
    others = ("nothing", "memory at hand")
    times: dict[str, dict[str, list[float]]] = {way: {name: [] for name in names} for way in (*ways, *others)}
    left, kept = {}, {}
    verifying: dict[str, list[float]] = {way: [] for way in ways if way != "diffusers"}
    for turn in range(repeats + 1):  # the first round does not count
        for way, doer in ways.items():
            for name, act in zip(names, acts, strict=True):
                if name == "restore" and way in verifying:
                    verifying[way].append(seconds_to_verify(pipe.unet))
                took = seconds(functools.partial(act, doer))
                if turn:
                    times[way][name].append(took)
                if name == "accelerate" and way != "diffusers":
                    kept[way] = lcmlora.status(pipe).kept_bytes
            if turn == 0 or way == "diffusers":
                left.setdefault(way, changed(pipe.unet, file))
        alone, at_hand = (Ours(fresh(pipe), folder, keep) for keep in (None, "memory"))
        apart = {"memory at hand": seconds_at_hand(at_hand)}
        at_hand.restore()
        apart["nothing"] = seconds(alone.accelerate)
        pipe.unet.__dict__.pop("_lcmlora", None)
        if turn:
            for way in others:
                times[way]["accelerate"].append(apart[way])
        print(shape, turn, {way: {n: t[-1:] for n, t in rows.items()} for way, rows in times.items()}, flush=True)
    result: dict[str, Any] = {
        way: {name: summary(t) for name, t in acts_.items() if t} for way, acts_ in times.items()
    }
    for way, share in left.items():
        result[way]["changed_after_restore"] = share
    for way, times_ in verifying.items():
        result[way]["verifying"] = summary(times_)
    for way, count in kept.items():
        result[way]["kept_bytes"] = count
    for way, doer in {**ways, "nothing": Ours(fresh(pipe), folder, None)}.items():
        result[way]["peak_bytes"] = peak_memory(doer.accelerate) - (kept[way] if way == "memory" else 0)
        if way != "nothing":
            doer.restore()
        pipe.unet.__dict__.pop("_lcmlora", None)
        changed(pipe.unet, file)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["sd15", "sdxl"])
    parser.add_argument("--repeats", type=int, default=5)
    ways = ["diffusers", "memory", "source", "disk"]
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways, help="diffusers has to be there")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.cpu:
        count_one_processors_time()
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            save(f"merging-{shape}{'-cpu' * args.cpu}", measure(shape, Path(folder), args.repeats, args.ways))


if __name__ == "__main__":
    main()
