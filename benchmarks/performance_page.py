"""Make docs/performance.md from the figures that the benchmarks left in benchmarks/results.

python benchmarks/performance_page.py
"""

from __future__ import annotations

import json
from typing import Any

from shapes import RESULTS, ROOT

MIB = 2**20


def load(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    result: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return result


def spread(row: dict[str, float]) -> str:
    return f"{row['median']:.2f} ({row['least']:.2f} to {row['most']:.2f})"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]


TITLES = {
    "diffusers": "plain diffusers",
    "memory": 'keep="memory"',
    "source": 'keep="source"',
    "disk": 'keep="disk"',
    "nothing": "keep=None",
}


def merging(shape: str, cpu: bool = False) -> str:
    result = load(f"merging-{shape}{'-cpu' * cpu}")
    if result is None and cpu:
        return ""
    if result is None:
        return f"### {shape}\n\nNot measured yet: `python benchmarks/merging.py {shape}`.\n"
    plain = result["diffusers"]
    lines = [
        f"### {shape}, one thread's own seconds" if cpu else f"### {shape}",
        "",
        f"`python benchmarks/merging.py {shape}{' --cpu' * cpu}`: {result['machine']}; median of "
        f"{plain['accelerate']['repeats']} (least to most), taking turns.",
        "",
    ]
    columns = ["way", "accelerate, s", "share", "swap a style, s", "share", "restore, s", "share"]
    columns += ["weights changed after it", "kept, MiB", "peak beyond that, MiB"]
    rows = []
    for way, title in TITLES.items():
        if (row := result.get(way)) is None:
            continue
        cells = [title]
        for act in ("accelerate", "swap", "restore"):
            if act in row:
                cells += [spread(row[act]), f"{row[act]['median'] / plain[act]['median']:.2f}"]
            else:
                cells += ["refused", ""]
        cells.append(f"{row['changed_after_restore']:.2%}" if "changed_after_restore" in row else "")
        cells.append(f"{row.get('kept_bytes', 0) / MIB:.0f}")
        cells.append(f"{row['peak_bytes'] / MIB:.0f}")
        rows.append(cells)
    at_hand = result["memory at hand"]["accelerate"]
    lines += [*table(columns, rows), ""]
    lines += [
        f"Before {TITLES[way]} restores, it verifies: {1000 * took:.1f} ms, "
        f"{took / result[way]['restore']['median']:.1%} of its time (wanted: below 3 %).\n"
        for way in ("memory", "source")
        if (took := result.get(way, {}).get("verifying", {}).get("median"))
    ]
    lines += [
        "A virtual machine may have to get fresh memory from its host first: this one did for "
        'keep="memory" (the turns go in the order of the table, so keep="disk" found what had just been given back). '
        f'Where that had been done before and was not counted, keep="memory" took {spread(at_hand)} s, '
        f"**{at_hand['median'] / plain['accelerate']['median']:.2f}** of plain diffusers' time.",
    ]
    return "\n".join(lines) + "\n"


def passes() -> str:
    result = load("passes")
    if result is None:
        return "Not measured yet: `python benchmarks/passes.py`.\n"
    xl = result.get("seconds_added_per_call_sdxl")
    lines = [
        f"`python benchmarks/passes.py`: {result['machine']}; SD 1.5's shape, 64 x 64 latents, bfloat16. The share is",
        "the median of the shares turn by turn.",
        "",
        *table(
            ["UNet", "one pass, s", "share of the bare one"],
            [[name, spread(row), f"{row['ratio']:.3f}"] for name, row in result["passes"].items()],
        ),
        "",
        f"lcmlora adds {1000 * result['seconds_added_per_call']:.2f} ms to a call (wanted: below 1)"
        + (f", {1000 * xl:.2f} ms on SDXL's shape (wanted: below 0.2)." if xl else "."),
    ]
    return "\n".join(lines) + "\n"


def whole_call() -> str:
    result = load("whole_call")
    if result is None:
        return "Not measured yet: `python benchmarks/whole_call.py`.\n"
    lines = [
        f"`python benchmarks/whole_call.py`: {result['machine']}; SD 1.5's shape, "
        f"{result['size']} x {result['size']} pixels, bfloat16.",
        "",
        *table(["what", "s"], [[name, spread(row)] for name, row in result["times"].items()]),
        "",
        f"{result['ratio']:.2f} times faster as a whole; the stages alone allow {result['ratio_of_stages']:.2f}: "
        f"{result['share']:.1%} of it (wanted: 92 %).",
    ]
    return "\n".join(lines) + "\n"


def startup() -> str:
    result = load("startup")
    if result is None:
        return "Not measured yet: `python benchmarks/startup.py`.\n"
    ms = {name: 1000 * result[name]["median"] for name in ("python", "import lcmlora", "lcmlora --help")}
    lines = [
        f"`python benchmarks/startup.py`: {result['machine']}.",
        "",
        *table(["command", "ms"], [[name, f"{value:.0f}"] for name, value in ms.items()]),
        "",
        f"`import lcmlora` itself: {ms['import lcmlora'] - ms['python']:.0f} ms (wanted: below 50); "
        "`lcmlora --help` as a whole (wanted: below 300).",
    ]
    return "\n".join(lines) + "\n"


def gpu() -> str:
    result = load("gpu")
    if result is None:
        return "Open: no GPU was at hand. `python benchmarks/gpu.py` measures these rows.\n"
    rows = [
        [
            way,
            batch.split()[1],
            *(f"{1000 * t:.0f}" for t in (row["call"]["median"], row["unet"], row["decoder"])),
            f"{1000 * row['step']:.1f}",
            f"{row['peak_bytes'] / MIB:.0f}",
        ]
        for way, batches in result.items()
        if isinstance(batches, dict)
        for batch, row in batches.items()
    ]
    lines = [
        f"`python benchmarks/gpu.py`: {result['machine']}.",
        "",
        *table(["way", "batch", "call, ms", "UNet, ms", "decoder, ms", "steps, ms", "peak, MiB"], rows),
        "",
        f"accelerate {result['accelerate_s']:.2f} s, restore {result['restore_s']:.2f} s.",
    ]
    return "\n".join(lines) + "\n"


def in_short() -> str:
    """What most readers come for, from the results that are there."""
    lines = []
    if call := load("whole_call"):
        lines.append(
            f"- A whole call, 25 steps with guidance against 4 without: **{call['ratio']:.1f} times faster** (Stable "
            f"Diffusion 1.5's shape, {call['size']} x {call['size']} pixels, on a processor)."
        )
    if unet := load("passes"):
        most = max(row["ratio"] for name, row in unet["passes"].items() if name.startswith("merged"))
        adapters = unet["passes"]["adapters"]["ratio"]
        lines.append(
            f"- Merged LoRAs, with one style or three, cost nothing a step ({most:.2f} of the bare UNet's time); PEFT "
            f"adapters cost {adapters - 1:.0%}."
        )
    if xl := load("merging-sdxl"):
        times = {act: xl["source"][act]["median"] for act in ("accelerate", "swap", "restore")}
        lines.append(
            f'- On SDXL\'s shape, on a processor with `keep="source"`: accelerate {times["accelerate"]:.1f} s, '
            f"another style {times['swap']:.1f} s, restore {times['restore']:.1f} s."
        )
    return "\n".join([*lines, "- For your machine and model: `print(lcmlora.benchmark(pipe))`. [How.](benchmark.md)"])


def page() -> str:
    return f"""# Where the time goes

{in_short()}

Made by `benchmarks/performance_page.py` from what the other scripts in `benchmarks/` measured. Random weights of the
real shapes, LoRA files of the official layout; plain diffusers and lcmlora take turns in one process, so that a
machine's moods meet both.

## Accelerate, swap, restore

An LCM-LoRA (rank 64, all its layers) and one style (rank 32, the attention layers). *Plain diffusers* is load, load,
set_adapters, fuse; to swap, unfuse, delete, load, set_adapters, fuse; to go back, unfuse and unload, which is not
exact. The goals, set before measuring, as shares of plain diffusers' time on SDXL's shape: to accelerate at most 0.5
keeping nothing and 0.6 keeping the originals in memory, 0.65 leaving them in the file that the UNet came from; to
restore at most 1.0; to swap at most 0.5; and at most 150 MiB beyond what is kept.

{merging("sdxl")}
{merging("sd15")}
{merging("sd15", cpu=True)}
How: each weight is read and written once. The LCM-LoRA and all styles make one product, in float32, tile by tile into
one buffer that stays in the processor's cache; the originals are copied onto huge pages, which all threads take from
the system beforehand. Nothing is injected and taken out again.

## One UNet pass

Merged LoRAs cost nothing (wanted: at most 1.02, with any number of styles); PEFT adapters cost at every step.

{passes()}
## A whole call

{whole_call()}
## Starting

{startup()}
## On a GPU

{gpu()}
## What was left out

- `channels_last` for the UNet is the user's choice: it helps some processors and harms others. Merging keeps whatever
  memory format a weight has.
- Nothing lossy is on by default: `vae="tiny"` changes pictures a little, so it has to be asked for.
"""


def main() -> None:
    (ROOT / "docs/performance.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
