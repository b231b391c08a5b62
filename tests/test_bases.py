"""Which base a UNet is, and which LCM-LoRA goes with which: the real UNets' structure, without their weights."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from torch import nn

import lcmlora
from conftest import sd_pipe, tiny_unet, write_lora
from lcmlora import base as registry
from lcmlora.layers import TARGET_MODULES, ModuleIndex, layers
from lcmlora.lora import files as lorafile
from lcmlora.lora.sources import HubOptions, Source
from lcmlora.recipe import LCM as LCM_RECIPE
from lcmlora.recipe import by_name
from lcmlora.transition import plan
from lcmlora.transition.snapshot import Snapshot
from lcmlora.transition.target import LCM, Target

_SDXL = dict(
    sample_size=128,
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    transformer_layers_per_block=(1, 2, 10),
)
_NO_MIDDLE = dict(mid_block_type="UNetMidBlock2D")
CONFIGS = {
    "sd15": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "sd21": dict(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
    "sdxl": _SDXL,
    "ssd-1b": {
        **_SDXL,
        **_NO_MIDDLE,
        "transformer_layers_per_block": (1, (2, 2), (4, 4)),
        "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
    },
    "vega": {**_SDXL, **_NO_MIDDLE, "transformer_layers_per_block": (1, 1, 2)},
}
TITLES = {
    "sd15": "Stable Diffusion 1.x",
    "sd21": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "ssd-1b": "SSD-1B",
    "vega": "Segmind-Vega",
}
REPOSITORIES = {
    "sd15": "latent-consistency/lcm-lora-sdv1-5",
    "sdxl": "latent-consistency/lcm-lora-sdxl",
    "ssd-1b": "latent-consistency/lcm-lora-ssd-1b",
    "vega": "segmind/Segmind-VegaRT",
}
MODULES = {"sd15": 278, "sd21": 278, "sdxl": 788, "ssd-1b": 423, "vega": 233}
BYTES_OF_HALVES = {"sd15": 2 * 67_252_224, "sdxl": 2 * 196_751_360, "ssd-1b": 2 * 104_902_656}
"""What the published fp16 files of rank 64 hold beside header and alphas."""


def shape_only(config: dict[str, object], cls: type[nn.Module] = UNet2DConditionModel) -> nn.Module:
    with torch.device("meta"):
        return cls(**config)


@pytest.fixture(scope="module")
def unets() -> dict[str, UNet2DConditionModel]:
    return {name: shape_only(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def files(unets: dict[str, UNet2DConditionModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("official")
    return {
        name: official_file(folder / f"{number}.safetensors", unet, rank=128 if name == "vega" else 64)
        for number, (name, unet) in enumerate(unets.items())
    }


def official_file(path: Path, unet: nn.Module, rank: int, alpha: float = 8.0) -> Path:
    """A file laid out as the published LCM-LoRAs, fp16, of full size: header and alphas, and a hole for the halves."""
    shapes = {}
    for name, module in unet.named_modules():  # the kinds are named here, so that lcmlora's count has a judge
        if name.endswith(tuple("." + kind for kind in TARGET_MODULES)) and "motion_modules" not in name:
            out, *rest = module.weight.shape
            key = "lora_unet_" + name.replace(".", "_")
            shapes[f"{key}.lora_down.weight"] = (rank, *rest)
            shapes[f"{key}.lora_up.weight"] = (out, rank, *(1,) * (len(rest) - 1))
    alphas = [key.replace(".lora_up.weight", ".alpha") for key in shapes if key.endswith("up.weight")]
    header, end = {}, 0
    for key, shape in [*shapes.items(), *((key, ()) for key in alphas)]:
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        file.seek(-2 * len(alphas), 2)
        file.write(struct.pack("<e", alpha) * len(alphas))
    return path


def request(lora: Path | str | None, base: str = "auto", **changes: object) -> Target:
    return Target(base=base, lora=Source.of(lora), **changes)


def hollow(unet: nn.Module) -> nn.Module:
    """The same with weights on the CPU, which take address space but no memory, as nothing ever touches them."""
    return shape_only(dict(unet.config), type(unet)).half().to_empty(device="cpu")


# -- which base -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPOSITORIES)
def test_base_is_found_from_the_structure_alone(name, unets):
    base = lcmlora.detect_base(unets[name])
    source = LCM_RECIPE.loras[name]
    assert (base.name, base.title, source.lora) == (name, TITLES[name], REPOSITORIES[name])
    assert base.layers == MODULES[name]
    assert source.rank == (128 if name == "vega" else None)


def test_finetune_with_other_input_channels_is_still_its_base():
    """Inpainting (9) and instruct-pix2pix (8) UNets."""
    for channels in (8, 9):
        assert lcmlora.detect_base(shape_only({**CONFIGS["sd15"], "in_channels": channels})).name == "sd15"


UNSUPPORTED = {
    "Stable Diffusion 2.x": CONFIGS["sd21"],
    "the SDXL refiner": {
        **_SDXL,
        "cross_attention_dim": 1280,
        "block_out_channels": (384, 768, 1536, 1536),
        "attention_head_dim": (6, 12, 24, 24),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 4,
        "projection_class_embeddings_input_dim": 2560,
    },
    "Kolors": {
        **_SDXL,
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "projection_class_embeddings_input_dim": 5632,
    },
    "KOALA": {**_SDXL, "layers_per_block": 1, "transformer_layers_per_block": (1, 2, 5), "mid_block_type": None},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_known_bases_without_an_lcm_lora_are_refused_by_name(name):
    with pytest.raises(lcmlora.BaseModelError, match=rf"This UNet is {name} .*no LCM-LoRA exists.*lora=.*distill"):
        lcmlora.detect_base(shape_only(UNSUPPORTED[name]))


def test_sd21_pipe_is_refused_before_anything_is_fetched(unets):
    pipe = sd_pipe(unet=hollow(unets["sd21"]))
    with pytest.raises(lcmlora.BaseModelError, match=r"Stable Diffusion 2\.x.*no LCM-LoRA exists"):
        lcmlora.accelerate(pipe)


def test_unknown_structure_is_described():
    with pytest.raises(lcmlora.BaseModelError, match=r"width 32, block widths \[8, 16\], 79 adaptable layers"):
        lcmlora.detect_base(sd_pipe())
    with pytest.raises(lcmlora.BaseModelError, match="list has no UNet"):
        lcmlora.detect_base([])


def test_full_lcm_is_refused(files):
    full = shape_only({**CONFIGS["sd15"], "time_cond_proj_dim": 256})
    with pytest.raises(lcmlora.PipelineError, match="full latent consistency model"):
        lcmlora.accelerate(sd_pipe(unet=full), lora=files["sd15"])


def test_offloaded_weights_are_refused(unets, files):
    with pytest.raises(lcmlora.PipelineError, match=r"meta device.*enable_sequential_cpu_offload"):
        lcmlora.accelerate(sd_pipe(unet=unets["sd15"]), lora=files["sd15"])


@pytest.mark.parametrize("lora", [True, False], ids=["with-lora", "without"])
def test_another_base_named_than_the_pipe_has(lora, unets, files):
    pipe = sd_pipe(unet=hollow(unets["sd15"]))
    words = r"base='sdxl' was given, Stable Diffusion XL, but the pipe's UNet is Stable Diffusion 1\.x \(base='sd15'\)"
    with pytest.raises(lcmlora.BaseModelError, match=words):
        lcmlora.accelerate(pipe, base="sdxl", lora=files["sdxl"] if lora else None)


def test_sd21_is_named_where_another_base_was_given(unets, files):
    words = r"base='sd15' was given, Stable Diffusion 1\.x, but .* Stable Diffusion 2\.x"
    with pytest.raises(lcmlora.BaseModelError, match=words):
        lcmlora.accelerate(sd_pipe(unet=hollow(unets["sd21"])), base="sd15", lora=files["sd15"])


@pytest.mark.parametrize("name", REPOSITORIES)
def test_each_base_asks_for_its_own_repository(name, unets, tmp_path):
    base = lcmlora.detect_base(unets[name])
    offline = HubOptions(tmp_path, local_files_only=True)
    with pytest.raises(lcmlora.LoraFileError) as caught:
        plan.lcm_source(base, LCM_RECIPE, Source.of(None)).find(offline)
    assert f"hf download {REPOSITORIES[name]} pytorch_lora_weights.safetensors" in str(caught.value)


# -- which file on which UNet -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_are_as_the_published_ones(name, files):
    info = lcmlora.inspect_lora(files[name])
    assert (info.format, len(info.modules), info.text_modules) == ("kohya", MODULES[name], {})
    assert (info.ranks, info.alphas) == ((128,) if name == "vega" else (64,), (8.0,))
    assert info.cross_attention_dim == CONFIGS[name]["cross_attention_dim"]
    if name in BYTES_OF_HALVES:
        head = 8 + struct.unpack("<Q", files[name].open("rb").read(8))[0]
        assert files[name].stat().st_size - head - 2 * MODULES[name] == BYTES_OF_HALVES[name]


@pytest.mark.parametrize("unet", CONFIGS)
@pytest.mark.parametrize("file", CONFIGS)
def test_every_file_on_every_unet(file, unet, files, unets):
    """Five pairs are right. Of the other twenty, diffusers would load six without an error."""
    base = registry.find_base(registry.structure_of(unets[unet]))
    assert (base and base.name) == (None if unet == "sd21" else unet)
    if file == unet:
        lora = plan.lcm_lora(ModuleIndex.of(unets[unet]), base, Source.of(files[file]).find())
        assert (lora.label, len(lora.pairs)) == (str(files[file]), MODULES[unet])
        return
    with pytest.raises(lcmlora.LoraMismatchError) as caught:
        plan.lcm_lora(ModuleIndex.of(unets[unet]), base, Source.of(files[file]).find())
    text = str(caught.value)
    assert f"does not fit this pipe, {TITLES[unet]}:" in text
    assert re.search(rf"It looks like \w+ LCM-LoRA of {re.escape(TITLES[file])}\.", text)
    named = [repository for repository in REPOSITORIES.values() if repository in text]
    assert named == ([REPOSITORIES[unet]] if unet in REPOSITORIES else [])
    if unet == "sd21":
        assert "Pass lora= with a file made for this UNet." in text


FITS = {
    ("sd15", "sd21"): (246, 32, 0),
    ("sd15", "sdxl"): (89, 73, 116),
    ("sdxl", "sd15"): (89, 73, 626),
    ("sdxl", "ssd-1b"): (423, 0, 365),
    ("sdxl", "vega"): (233, 0, 555),
    ("ssd-1b", "sdxl"): (423, 0, 0),
    ("ssd-1b", "vega"): (233, 0, 190),
    ("vega", "sdxl"): (233, 0, 0),
    ("vega", "ssd-1b"): (233, 0, 0),
}


@pytest.mark.parametrize(("file", "unet"), FITS)
def test_names_and_shapes_alone_would_let_wrong_files_in(file, unet, files, unets):
    """Layers that fit, have other shapes, are not there. SD 1.x's 1 x 1 convolutions count as linear layers."""
    found = lorafile.cover("unet", lcmlora.inspect_lora(files[file]).modules, layers(unets[unet]))
    assert (len(found.pairs), len(found.clashes), len(found.foreign)) == FITS[file, unet]


def test_a_right_file_of_another_rank_is_right(unets, tmp_path):
    """lcm-lora-sdxl-rank1 and its like."""
    file = official_file(tmp_path / "small.safetensors", unets["sdxl"], rank=1, alpha=1.0)
    assert (
        len(plan.lcm_lora(ModuleIndex.of(unets["sdxl"]), registry.by_name("sdxl"), Source.of(file).find()).pairs)
        == 788
    )


# -- bases of one's own -----------------------------------------------------------------------------------------------


@pytest.fixture
def registered() -> Iterator[Callable[..., lcmlora.Base]]:
    """Register a base for the tiny UNet, for the length of a test."""
    before = lcmlora.bases()

    def register(**changes: object) -> lcmlora.Base:
        own = dict(name="tiny", title="Tiny", cross_attention_dim=32, block_out_channels=(8, 16), layers=79, lora=None)
        base = lcmlora.Base(**{**own, **changes})
        lcmlora.register(base)
        return base

    yield register
    for base in lcmlora.bases():
        if base not in before:
            lcmlora.unregister(base.name)
    assert lcmlora.bases() == before


def test_a_registered_base_is_found_with_its_lora_and_weight(registered, tmp_path):
    pipe = sd_pipe()
    write_lora(tmp_path / "mine.safetensors", pipe.unet)
    base = registered(lora=str(tmp_path), weight_name="mine.safetensors", weight=0.7)
    assert base in lcmlora.bases()
    assert lcmlora.detect_base(pipe) is base
    lcmlora.accelerate(pipe)
    status = lcmlora.status(pipe)
    assert (status.base, status.weight, status.lora) == ("tiny", 0.7, str(tmp_path / "mine.safetensors"))
    lcmlora.restore(pipe)
    lcmlora.accelerate(pipe, base="tiny", weight=0.5)
    assert lcmlora.status(pipe).weight == 0.5


def test_a_registered_base_without_lora_says_so(registered):
    registered()
    with pytest.raises(lcmlora.BaseModelError, match="'tiny' has no LCM-LoRA; pass lora="):
        lcmlora.accelerate(sd_pipe())


def test_a_registered_base_is_named_in_mismatches(registered, tmp_path):
    registered(lora="mine/tiny-lcm")
    write_lora(tmp_path / "deeper.safetensors", tiny_unet(layers_per_block=2))
    with pytest.raises(lcmlora.LoraMismatchError, match=r"does not fit this pipe, Tiny:.*use mine/tiny-lcm"):
        lcmlora.accelerate(sd_pipe(), lora=tmp_path / "deeper.safetensors")


def test_names_and_structures_are_registered_once(registered):
    registered()
    with pytest.raises(lcmlora.BaseModelError, match="'tiny' has that name or structure"):
        registered(layers=80)
    with pytest.raises(lcmlora.BaseModelError, match="'tiny' has that name or structure"):
        registered(name="small")
    with pytest.raises(lcmlora.BaseModelError, match="'sd15' has that name or structure"):
        registered(name="sd15")
    assert [base.name for base in lcmlora.bases()].count("tiny") == 1


def test_an_unregistered_base_is_known_no_more(registered, tmp_path):
    pipe = sd_pipe()
    before, base = lcmlora.bases(), registered(lora=str(write_lora(tmp_path / "l.safetensors", pipe.unet)))
    lcmlora.accelerate(pipe)
    assert lcmlora.unregister("tiny") is base
    assert lcmlora.bases() == before
    assert lcmlora.status(pipe).base == "tiny"
    lcmlora.restore(pipe)
    with pytest.raises(lcmlora.BaseModelError, match="structure of no known base"):
        lcmlora.accelerate(pipe)
    with pytest.raises(lcmlora.BaseModelError, match="base='tiny' is not known"):
        lcmlora.unregister("tiny")
    registered()


def test_all_bases_are_listed_and_unknown_names_refused():
    names = [base.name for base in lcmlora.bases()]
    assert names[:5] == ["sd15", "sdxl", "ssd-1b", "vega", "pocket"]
    with pytest.raises(lcmlora.BaseModelError, match=re.escape(", ".join(map(repr, names)))):
        registry.by_name("sd2")


# -- AnimateLCM -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def motion_unet() -> UNetMotionModel:
    return shape_only(dict(cross_attention_dim=768), UNetMotionModel)


def animate_pipe(unet: nn.Module) -> AnimateDiffPipeline:
    still = sd_pipe()
    motion = MotionAdapter(
        block_out_channels=(8,), motion_layers_per_block=1, motion_num_attention_heads=1, motion_norm_num_groups=4
    )
    parts = {name: still.components[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return AnimateDiffPipeline(**parts, unet=unet, motion_adapter=motion)


def test_animatelcm_is_never_found_by_itself(motion_unet, unets):
    assert lcmlora.detect_base(motion_unet).name == "sd15"
    assert lcmlora.detect_base(unets["sd15"]).name == "sd15"


def test_animatelcm_needs_motion_modules(unets, files):
    pipe = sd_pipe(unet=hollow(unets["sd15"]))
    with pytest.raises(lcmlora.BaseModelError, match=r"recipe='animatelcm' is for UNets with motion modules"):
        lcmlora.accelerate(pipe, recipe="animatelcm", lora=files["sd15"])


def test_animatelcm_as_a_base_says_what_to_type():
    with pytest.raises(lcmlora.BaseModelError, match=r"type accelerate\(pipe, recipe='animatelcm'\)"):
        lcmlora.accelerate(sd_pipe(), base="animatelcm")


def test_animatelcm_has_its_own_weight_betas_and_file(motion_unet, files, tmp_path):
    pipe = animate_pipe(hollow(motion_unet))
    now = Snapshot.of(pipe)
    made = plan.make_plan(now, request(files["sd15"], recipe="animatelcm"))
    assert (made.applied.base.name, made.applied.recipe) == ("sd15", by_name("animatelcm"))
    assert made.contents["unet"].weights == {LCM: 0.8}
    assert plan.scheduler_for(pipe.scheduler, made.applied.recipe).config.beta_schedule == "linear"
    assert set(made.contents["unet"].loras) == {LCM}
    plain = plan.make_plan(now, request(files["sd15"]))
    assert (plain.applied.recipe.name, plain.contents["unet"].weights) == ("lcm", {LCM: 1.0})
    assert plan.scheduler_for(pipe.scheduler, plain.applied.recipe).config.beta_schedule == "scaled_linear"
    lighter = plan.make_plan(now, request(files["sd15"], recipe="animatelcm", weight=0.5))
    assert lighter.contents["unet"].weights == {LCM: 0.5}
    offline = HubOptions(tmp_path, local_files_only=True)
    with pytest.raises(lcmlora.LoraFileError, match=r"wangfuyun/AnimateLCM AnimateLCM_sd15_t2v_lora\.safetensors"):
        plan.make_plan(now, request(None, recipe="animatelcm", hub=offline))
