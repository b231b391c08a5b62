"""Do the stages of a benchmark add up to the call, and does a delay show where it is?

    python benchmarks/stages.py [--repeats 3] [--size 256] [--cpu]

(1) SD 1.5's shape, accelerated: calls with the stopwatch and calls without take turns. The stages of the one have to
add up to the wall time of the other within 3 %. (2) The same shape: 50 ms asleep in each step of the base's scheduler.
(3) The embedded model: 50 ms asleep in one stage after the other. The stage has to grow by as much, and the advice has
to name it.

`--cpu` counts the process's own time on one thread in (1), for a machine that others use too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import EulerDiscreteScheduler

import lcmlora
import shapes
from lcmlora.benchmarking.stages import OTHER, Stopwatch, watched
from lcmlora.devices import device_of, synchronize
from shapes import save, write_lora
from whole_call import pipeline

DELAY = 0.05


def adds_up(pipe: Any, lora: Path, repeats: int, size: int) -> dict[str, Any]:
    """Stages against the wall time of calls that nobody watches."""
    call = partial(pipe, "a fox", num_inference_steps=2, height=size, width=size)
    alone, sums, stages = [], [], []
    with lcmlora.accelerated(pipe, lora=lora):
        call()
        for _ in range(repeats):
            alone.append(shapes.seconds(call))
            watch = Stopwatch(shapes.clock, partial(synchronize, device_of(pipe)))
            with watched(pipe, watch), watch.stage(OTHER):
                call()
            sums.append(watch.total)
            stages.append(watch.seconds)
    ratio = statistics.median(sums) / statistics.median(alone)
    return {"calls alone": alone, "sums of stages": sums, "ratio": ratio, "stages": stages, "wanted": "0.97 to 1.03"}


class SlowScheduler(EulerDiscreteScheduler):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(DELAY)
        return super().step(*args, **kwargs)


@contextmanager
def hooked(module: Any) -> Iterator[None]:
    def sleep(*_: Any) -> None:
        time.sleep(DELAY)

    with module.register_forward_hook(sleep):
        yield


@contextmanager
def slow_scheduler(pipe: Any) -> Iterator[None]:
    own = pipe.scheduler
    pipe.scheduler = SlowScheduler.from_config(own.config)
    yield
    pipe.scheduler = own


PLANTED: dict[str, Callable[[Any], Any]] = {
    "text": lambda pipe: hooked(pipe.text_encoder),
    "unet": lambda pipe: hooked(pipe.unet),
    "vae_decode": lambda pipe: hooked(pipe.vae.decoder),
    "scheduler": slow_scheduler,
}


def planted(pipe: Any, stage: str, **options: Any) -> dict[str, Any]:
    """What a stage takes without and with the delay, in seconds a pass of it, and what the advice says."""
    found = {}
    for name in ("without", "with"):
        with PLANTED[stage](pipe) if name == "with" else nullcontext():
            found[name] = lcmlora.benchmark(pipe, **options)
    rows = {name: one.base if stage == "scheduler" else one.fast for name, one in found.items()}
    passes = rows["with"].passes if stage in ("unet", "scheduler") else 1
    took = {name: row.of(stage) / passes for name, row in rows.items()}
    said = [one.text for one in found["with"].advice]
    return {**took, "grew by": took["with"] - took["without"], "planted": DELAY, "advice": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.cpu:
        shapes.count_one_processors_time()
    with tempfile.TemporaryDirectory() as folder:
        pipe = pipeline()
        lora = write_lora(pipe.unet, Path(folder) / "lcm.safetensors")
        options: dict[str, Any] = {"progress": False, "accelerate": {"lora": lora}, "height": args.size}
        options |= {"width": args.size, "repeats": 1, "warmup": 0, "steps": (1, 4)}
        result = {
            "size": args.size,
            "adds up": adds_up(pipe, lora, args.repeats, args.size),
            "planted, SD 1.5": {"scheduler": planted(pipe, "scheduler", **options)},
        }
    del pipe
    pocket = lcmlora.load_pocket()
    options = {"prompt": "a fox on a teal background", "steps": (4, 8), "progress": False}
    result["planted, embedded model"] = {stage: planted(pocket, stage, **options) for stage in PLANTED}
    save("stages", result)


if __name__ == "__main__":
    main()
