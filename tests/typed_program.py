"""Every public name in use, for a type checker: `test_typed.py` runs mypy --strict on it, and nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lcmlora
from lcmlora import live
from lcmlora.sheets.metrics import distance, measured
from lcmlora.testing import tiny_lora, tiny_pipeline


class Pipeline:
    """Stands for a pipeline class: what goes in comes out."""

    def draw(self) -> None: ...


def whole_life(pipe: Pipeline, folder: Path) -> None:
    paper = lcmlora.Style(folder / "paper.safetensors", 0.8, "paper.safetensors", subfolder="loras", revision="main")
    fast: Pipeline = lcmlora.accelerate(pipe, "sdxl", styles={"ink": "ink.safetensors", "paper": paper}, steps=6)
    fast.draw()
    lcmlora.accelerate(pipe, weight=0.9, keep="disk", fuse=True, guidance=None, vae="tiny", compile="regional").draw()
    lcmlora.set_styles(pipe, {"ink": 0.5, "paper": paper}).draw()
    with lcmlora.styled(pipe, {"ink": 1.0}) as styled:
        styled.draw()
    lcmlora.restore(pipe, force=True).draw()
    with lcmlora.accelerated(pipe, "sd15", steps=4, cache_dir=folder, token=True, local_files_only=True) as inside:
        inside.draw()
    if lcmlora.is_accelerated(pipe):
        baked: Path = lcmlora.bake(pipe, folder, overwrite=True)
        lcmlora.load_baked(baked, kind="img2img", dtype=None)
        lcmlora.load(baked, device="cpu", kind="img2img", config="sdxl-folder", local_files_only=True)


def what_there_is(pipe: Pipeline, file: Path) -> tuple[str | None, float | None, dict[str, Any]]:
    status: lcmlora.Status = lcmlora.status(pipe)
    info: lcmlora.LoraInfo = lcmlora.inspect_lora(
        file, subfolder="a", revision="main", cache_dir="hub", token="t", local_files_only=False
    )
    ranks: tuple[int, ...] = info.ranks
    found: lcmlora.Base = lcmlora.detect_base(pipe)
    own = lcmlora.Base("own", "My own", 768, (320, 640), 278, lora="me/lora", weight=0.8, rank=max(ranks))
    lcmlora.register(own)
    assert found in lcmlora.bases()
    assert lcmlora.unregister("own") == own
    source = lcmlora.LoraSource("me/tcd", weight_name="tcd.safetensors", rank=64)
    mine = lcmlora.Recipe("mine", "my LoRA", "TCDScheduler", eta=0.3, loras={"sdxl": source})
    lcmlora.register(mine)
    lcmlora.register(source, recipe="tcd", base="sdxl")
    names: list[str] = [recipe.name for recipe in lcmlora.recipes()]
    assert lcmlora.unregister("mine") == mine
    assert names
    return status.base, status.weight, status.to_dict()


def sheets(pipe: Pipeline) -> lcmlora.Sheet:
    steps = lcmlora.sweep_steps(pipe, ["a fox"], (1, 2), seed=1, height=64, width=64)
    guidance = lcmlora.sweep_guidance(pipe, "a fox", negative_prompt="blurred", call={"eta": 0.0})
    both = lcmlora.compare(pipe, "a fox", lcm_steps=(4,), base_steps=(4, 25), accelerate={"guidance": 1.5})
    lcmlora.sweep(pipe, "a fox", x={"steps": (1, 2)}, y={"styles.ink": (0, 0.5)}, without={"steps": 25}, folder="out")
    lcmlora.sweep_weights(pipe, "a fox", (0.5, 1), style={"ink": (0, 1)}, num_inference_steps=4)
    both.save("sheets", "compare")
    page: Path = measured(both, {"distance": distance()}).to_html("compare.html", quality=90)
    both.to_csv(page.with_suffix(".csv"))
    return steps + guidance


def speed(pipe: Pipeline, folder: Path) -> float:
    found: lcmlora.Benchmark = lcmlora.benchmark(
        pipe, (4, None), batch_sizes=(1, 4), fused=(True, False), accelerate={"vae": "tiny"}, height=64, width=64
    )
    page: Path = found.to_html(folder / "benchmark.html")
    found.to_csv(page.with_suffix(".csv"))
    found.to_json(page.with_suffix(".json"))
    return found.speedup / found.possible_speedup


def many(pipe: Pipeline, rows: list[dict[str, Any]], out: Path) -> list[Path]:
    made: lcmlora.Generated = lcmlora.generate(pipe, rows, out, styles={"ink": 0.5}, call={"steps": 4}, batch_size=2)
    for failed in lcmlora.generate(pipe, "rows.jsonl", out, resume=False, strict=True, overwrite=True).failed:
        rows[failed.row - 1].clear()
    lcmlora.again(made.files[0], pipe).save("again.png")
    return [file for file in made.files if not made.interrupted]


def own_lora(data: Path) -> Path:
    teacher = lcmlora.load_pocket("chalk")
    config, styles = lcmlora.DistillConfig.preset("paths", rank=8), {"3d": lcmlora.Style(lcmlora.pocket.STYLE)}
    lcmlora.distill("pocket", ["a fox"], "out", config, styles=styles, validation_prompts=["a fox"])
    file = lcmlora.distill(teacher, data, "out", lcmlora.DistillConfig(rank=8, steps=10))
    small: lcmlora.ResizedLora = lcmlora.resize_lora(file, 4, "small.safetensors")
    assert small.kept >= small.least[1]
    return small.file


def live_page(pipe: Pipeline, styles: dict[str, Path]) -> float:
    with live.Room(pipe, base_steps=50, base_guidance=7.5, size=(512, 768), recipe="hyper-8", styles=styles) as room:
        scene, choice = live.Scene("a fox", styles={"ink": 0.5}, seed=1), room.choices["none"]
        drawn: live.Drawn | None = room.draw(scene, "me")
        base = room.draw_base(scene, visitor="me")
        with live.serve(room, "a fox", port=0) as address:
            assert address.startswith("http"), live.page(room)
            assert choice.usual_steps
        room.leave("me")
    return base.seconds / drawn.seconds if base and drawn else 0.0


def refusals(pipe: Pipeline) -> str:
    try:
        lcmlora.accelerate(pipe)
    except (lcmlora.PipelineError, lcmlora.BaseModelError, lcmlora.LoraFileError, lcmlora.LoraMismatchError) as error:
        return str(error)
    except (lcmlora.CallError, lcmlora.DataError) as error:
        return str(error)
    except lcmlora.LcmLoraError as error:
        return str(error)
    except lcmlora.LcmLoraWarning as warning:
        return str(warning)
    return lcmlora.__version__


def tests_of_others(folder: Path) -> None:
    pipe = tiny_pipeline("sdxl", seed=1, in_channels=4)
    tiny_lora(pipe, folder / "lcm.safetensors", rank=4, only=lambda name: name.endswith("to_q"), spelling="peft")
