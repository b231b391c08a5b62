"""Put what `lcmlora.benchmark` says of the embedded model into docs/benchmark.md, and make its picture.

    python benchmarks/benchmark_page.py

It counts this process's own seconds, on one thread, so that others on the machine do not matter.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import lcmlora
from lcmlora import pocket
from shapes import ROOT

PROMPT = "a small fox on a teal background"
FILE = ROOT / "docs/benchmark.md"


def measured(**options: Any) -> lcmlora.Benchmark:
    common: dict[str, Any] = {"base_guidance": pocket.GUIDANCE, "repeats": 9, "clock": time.process_time}
    return lcmlora.benchmark(lcmlora.load_pocket(), prompt=PROMPT, **common, **options)


def put(name: str, output: str) -> None:
    """Replace what stands between two marks of the page."""
    front, mark, rest = FILE.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    end = rest[rest.index("<!-- end -->") :]
    FILE.write_text(f"{front}{mark}```text\n{output.strip()}\n```\n{end}", encoding="utf-8")
    print(output)


def main() -> None:
    torch.set_num_threads(1)
    found = measured(fused=(True, False))
    put("output", str(found).partition("\n\nPublished")[0])
    (ROOT / "docs/images").mkdir(exist_ok=True)
    found.figure().savefig(ROOT / "docs/images/benchmark.png", dpi=110)
    worse = measured(accelerate={"fuse": False, "guidance": 1.5}, try_advice=True)
    put("advice", "\n\n".join(f"- {one.text}.\n    {one.code}\n    {one.outcome}" for one in worse.advice))


if __name__ == "__main__":
    main()
