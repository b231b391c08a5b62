"""Every recipe of the table against plain diffusers set up by hand as its card says, and every way to get one wrong.

The snippets are written from notes of the cards (docs/recipes.md says what is inferred): no hub could be reached.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

import lcmlora
from conftest import assert_same, sd_pipe, sdxl_pipe, snapshot, tiny_unet, write_lora
from lcmlora import base as registry
from lcmlora import recipe as table
from lcmlora.cli import main
from lcmlora.layers import layers, lcm_layers
from lcmlora.lora.sources import Source
from lcmlora.transition import plan
from tiny_pipelines import BETAS, build, mask, picture

OUTSIDE = (
    "conv_in",
    "conv_out",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "add_embedding.linear_1",
    "add_embedding.linear_2",
)
"""Layers that Hyper-SD's and Lightning's files cover and LCM's do not."""
_BOTH = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
FOUND = {
    "StableDiffusion": lambda: PNDMScheduler.from_config(_BOTH),
    "StableDiffusionXL": lambda: EulerDiscreteScheduler.from_config({**_BOTH, "timestep_spacing": "leading"}),
}
"""The schedulers that Stable Diffusion 1.5 and SDXL come with."""


def trailing(cls: type, **more: Any) -> Callable[[Any], Any]:
    return lambda config: cls.from_config(config, timestep_spacing="trailing", **more)


def ddim_of_pcm(config: Any) -> DDIMScheduler:
    """Made of Stable Diffusion's betas and what is noted of PCM's card, not of the config that was found."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )


OFF: dict[str, Any] = {"guidance_scale": 0}
FOUR = [999, 749, 499, 249]
LCM_FOUR = [999, 759, 499, 259]
EIGHT = [999, 874, 749, 624, 499, 374, 249, 124]
SIXTEEN = [999, 937, 874, 811, 749, 687, 624, 561, 499, 437, 374, 311, 249, 187, 124, 61]
DDIM, EULER = trailing(DDIMScheduler), trailing(EulerDiscreteScheduler)
CARDS: dict[str, tuple[Callable[[Any], Any], dict[str, Any], list[int]]] = {
    "lcm": (LCMScheduler.from_config, {"guidance_scale": 1.0}, LCM_FOUR),
    "tcd": (TCDScheduler.from_config, {**OFF, "eta": 0.3}, LCM_FOUR),
    "hyper-1": (TCDScheduler.from_config, {**OFF, "eta": 1.0}, [999]),
    "hyper-2": (DDIM, OFF, [999, 499]),
    "hyper-4": (DDIM, OFF, FOUR),
    "hyper-8": (DDIM, OFF, EIGHT),
    "hyper-8-cfg": (DDIM, {"guidance_scale": 5.0}, EIGHT),
    "hyper-12-cfg": (DDIM, {"guidance_scale": 5.0}, [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82]),
    "lightning-2": (EULER, OFF, [999, 499]),
    "lightning-4": (EULER, OFF, FOUR),
    "lightning-8": (EULER, OFF, EIGHT),
    "dmd2": (LCMScheduler.from_config, {**OFF, "timesteps": [999, 749, 499, 249]}, FOUR),
    "pcm-2": (ddim_of_pcm, {"guidance_scale": 1.0}, [999, 499]),
    "pcm-4": (ddim_of_pcm, {"guidance_scale": 1.0}, FOUR),
    "pcm-8": (ddim_of_pcm, {"guidance_scale": 1.0}, EIGHT),
    "pcm-16": (ddim_of_pcm, {"guidance_scale": 1.0}, SIXTEEN),
    "pcm-normalcfg-4": (ddim_of_pcm, {"guidance_scale": 3.0}, FOUR),
    "pcm-normalcfg-8": (ddim_of_pcm, {"guidance_scale": 4.5}, EIGHT),
    "pcm-normalcfg-16": (ddim_of_pcm, {"guidance_scale": 4.5}, SIXTEEN),
    "pcm-lcm": (LCMScheduler.from_config, OFF, LCM_FOUR),
    "flash": (trailing(LCMScheduler), OFF, LCM_FOUR),
    "tdd": (TCDScheduler.from_config, {"guidance_scale": 1.7, "eta": 0.2}, LCM_FOUR),
}
"""The card's scheduler, its call beside the number of steps, and the timesteps of a whole schedule."""


def few_step_file(path: Path, unet: torch.nn.Module, **options: Any) -> Path:
    """A LoRA for LCM's layers and those outside of them, in diffusers' spelling."""
    generator, extra = torch.Generator().manual_seed(5), {}
    for name, layer in layers(unet).items():
        if name in OUTSIDE:
            out, *rest = layer.weight.shape
            extra[f"unet.{name}.lora_A.weight"] = torch.randn(4, *rest, generator=generator) * 0.05
            ones = (1,) * (len(rest) - 1)
            extra[f"unet.{name}.lora_B.weight"] = torch.randn(out, 4, *ones, generator=generator) * 0.05
    return write_lora(path, unet, spelling="diffusers", extra=extra, **options)


@dataclasses.dataclass
class Twins:
    """One pipeline twice: for plain diffusers, its LoRA loaded, and for lcmlora, as it was built."""

    plain: Any
    ours: Any
    file: Path
    call: dict[str, Any]
    config: Any


@pytest.fixture(
    scope="module", params=[family + kind for family in FOUND for kind in ("", "Img2Img", "Inpaint", "ControlNet")]
)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    family = "StableDiffusionXL" if "XL" in request.param else "StableDiffusion"
    kind = request.param.removeprefix(family)
    made = [build(getattr(diffusers, f"{family}{kind}Pipeline"), {}) for _ in range(2)]
    for pipe in made:
        pipe.scheduler = FOUND[family]()
    call: dict[str, Any] = {"prompt": "a fox", "output_type": "latent"}
    call |= {"image": picture()} if kind else {"height": 16, "width": 16}
    call |= {"strength": 0.5} if kind in ("Img2Img", "Inpaint") else {}
    call |= {"mask_image": mask()} if kind == "Inpaint" else {}
    file = few_step_file(tmp_path_factory.mktemp("few") / "few.safetensors", made[0].unet)
    made[0].load_lora_weights(str(file))
    before = snapshot(made[1])
    yield Twins(*made, file, call, made[0].scheduler.config)
    lcmlora.restore(made[1])  # after a move through every recipe
    assert_same(before, snapshot(made[1]))


def drawn(pipe: Any, **call: Any) -> tuple[list[int], list[dict[str, Any]], torch.Tensor]:
    """(timesteps visited, what else the UNet was given, latents) of one call."""
    visited, given = [], []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        visited.append(int(args[1]))
        given.append({"sample": args[0], **kwargs})

    hook = pipe.unet.register_forward_pre_hook(see, with_kwargs=True)
    try:
        latents = pipe(generator=torch.Generator().manual_seed(0), **call).images
    finally:
        hook.remove()
    return visited, given, latents


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in ours.items())
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """For warnings that have tests of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lcmlora.LcmLoraWarning)
        yield


@pytest.mark.parametrize("name", CARDS)
def test_every_recipe_is_driven_as_its_card_says(name, twins):
    scheduler, call, whole = CARDS[name]
    twins.plain.scheduler = scheduler(twins.config)
    takes_part = "strength" in twins.call and "timesteps" not in call
    steps = {} if "timesteps" in call else {"num_inference_steps": len(whole) * (2 if takes_part else 1)}
    theirs = drawn(twins.plain, **twins.call, **call, **steps)
    with unheard():
        lcmlora.accelerate(twins.ours, recipe=name, lora=twins.file)
        ours = drawn(twins.ours, **twins.call)
    assert ours[0] == theirs[0]
    if "strength" not in twins.call:
        assert ours[0] == whole
    assert len(ours[0]) == (2 if "strength" in twins.call and "timesteps" in call else len(whole))
    assert same(ours[1], theirs[1]), "what the UNet is given"
    assert same(ours[2], theirs[2]), "latents"
    assert type(twins.ours.scheduler) is type(twins.plain.scheduler)


def test_animatelcm_is_driven_as_its_card_says(tmp_path):
    plain, ours = (build(diffusers.AnimateDiffPipeline, {}) for _ in range(2))
    file = write_lora(tmp_path / "motion.safetensors", ours.unet, spelling="diffusers")
    before = snapshot(ours)
    plain.scheduler = LCMScheduler.from_config(plain.scheduler.config, beta_schedule="linear", clip_sample=False)
    plain.load_lora_weights(str(file), adapter_name="lcm-lora")
    plain.set_adapters(["lcm-lora"], [0.8])
    call = {"prompt": "a fox", "num_frames": 2, "height": 16, "width": 16, "output_type": "latent"}
    lcmlora.accelerate(ours, recipe="animatelcm", lora=file)
    frames = [
        pipe(generator=torch.Generator().manual_seed(0), **call, **more).frames
        for pipe, more in ((ours, {}), (plain, {"num_inference_steps": 6, "guidance_scale": 2.0}))
    ]
    assert same(*frames)
    lcmlora.restore(ours)
    assert_same(before, snapshot(ours))


def test_every_recipe_of_the_table_has_a_card_here():
    assert {recipe.name for recipe in lcmlora.recipes()} == {*CARDS, "animatelcm"}


PUBLISHED = {
    ("lcm", "vega"): ("segmind/Segmind-VegaRT", None),
    ("tcd", "sd2"): ("h1t/TCD-SD21-base-LoRA", None),
    ("hyper-1", "sd15"): ("ByteDance/Hyper-SD", "Hyper-SD15-1step-lora.safetensors"),
    ("hyper-8", "sdxl"): ("ByteDance/Hyper-SD", "Hyper-SDXL-8steps-lora.safetensors"),
    ("hyper-12-cfg", "sdxl"): ("ByteDance/Hyper-SD", "Hyper-SDXL-12steps-CFG-lora.safetensors"),
    ("lightning-4", "sdxl"): ("ByteDance/SDXL-Lightning", "sdxl_lightning_4step_lora.safetensors"),
    ("dmd2", "sdxl"): ("tianweiy/DMD2", "dmd2_sdxl_4step_lora_fp16.safetensors"),
    ("pcm-16", "sd15"): ("wangfuyun/PCM_Weights", "sd15/pcm_sd15_smallcfg_16step_converted.safetensors"),
    ("pcm-lcm", "sdxl"): ("wangfuyun/PCM_Weights", "sdxl/pcm_sdxl_lcmlike_lora_converted.safetensors"),
    ("flash", "sd15"): ("jasperai/flash-sd", None),
    ("tdd", "sdxl"): ("RED-AIGC/TDD", "sdxl_tdd_lora_weights.safetensors"),
}


@pytest.mark.parametrize(("name", "base"), PUBLISHED)
def test_the_files_are_those_of_the_cards(name, base):
    source = table.by_name(name).loras[base]
    assert (source.lora, source.weight_name) == PUBLISHED[name, base]


# -- getting a recipe wrong -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One LoRA for the tiny SD pipe, under the names that published files have."""
    folder, unet = tmp_path_factory.mktemp("named"), tiny_unet()
    names = ("few", "sdxl_lightning_4step_lora", "Hyper-SD15-8steps-lora", "pcm_sd15_smallcfg_2step_converted")
    return {name: write_lora(folder / f"{name}.safetensors", unet) for name in names}


@pytest.fixture
def tiny() -> Any:
    return sd_pipe()


def call_of(pipe: Any, **more: Any) -> Any:
    return pipe("a fox", height=16, width=16, output_type="latent", **more)


def test_an_unknown_recipe_is_refused_by_name(tiny, files):
    with pytest.raises(lcmlora.BaseModelError, match=r"recipe='hyper' is not known.*'hyper-8'.*register"):
        lcmlora.accelerate(tiny, recipe="hyper", lora=files["few"])
    assert not lcmlora.is_accelerated(tiny)


def test_a_file_of_one_number_of_steps_says_which(tiny, files):
    lcmlora.accelerate(tiny, recipe="hyper-8", lora=files["few"])
    with pytest.warns(lcmlora.LcmLoraWarning, match=r"num_inference_steps=4.*'hyper-8' was made for 8 steps"):
        call_of(tiny, num_inference_steps=4)
    call_of(tiny, num_inference_steps=5)  # said once
    lcmlora.accelerate(tiny, strict=True)
    with pytest.raises(lcmlora.CallError, match="made for 8 steps"):
        call_of(tiny, num_inference_steps=4)
    with pytest.raises(lcmlora.CallError, match=r"steps=4: the file of recipe 'hyper-8' was made for 8 steps"):
        lcmlora.accelerate(tiny, steps=4)
    assert call_of(tiny).images.shape[0] == 1


@pytest.mark.parametrize(
    ("recipe", "guidance", "used", "words"),
    [
        ("hyper-4", 7.5, 1, r"burns pictures made with a Hyper-SD LoRA.*0 to 1 \(off\) works"),
        ("pcm-4", 7.5, 2, "burns pictures made with a PCM LoRA.*1 to 2 works"),
        ("hyper-8-cfg", 1.0, 5, r"guidance_scale=1: a Hyper-SD LoRA .* is made for guidance; 5 to 8 works"),
    ],
)
def test_guidance_is_kept_in_the_recipes_own_range(recipe, guidance, used, words, tiny, files):
    lcmlora.accelerate(tiny, recipe=recipe, lora=files["few"])
    with pytest.warns(lcmlora.LcmLoraWarning, match=words):
        call_of(tiny, guidance_scale=guidance)
    assert tiny.guidance_scale == used
    lcmlora.accelerate(tiny, strict=True)
    with pytest.raises(lcmlora.CallError, match=words):
        call_of(tiny, guidance_scale=guidance)
    with pytest.raises(lcmlora.CallError, match=r"works with a (Hyper-SD|PCM) LoRA"):
        lcmlora.accelerate(tiny, guidance=guidance)


def test_a_negative_prompt_does_nothing_only_where_guidance_is_off(tiny, files):
    lcmlora.accelerate(tiny, recipe="hyper-4", lora=files["few"])
    with pytest.warns(lcmlora.LcmLoraWarning, match="negative_prompt has no effect.*works without guidance alone"):
        call_of(tiny, negative_prompt="blurred")
    lcmlora.accelerate(tiny, recipe="hyper-8-cfg", lora=files["few"])
    call_of(tiny, negative_prompt="blurred")  # a warning of ours would be an error


def test_eta_does_nothing_only_where_the_scheduler_takes_none(tiny, files):
    lcmlora.accelerate(tiny, recipe="tcd", lora=files["few"])
    seen = []
    step = tiny.scheduler.step

    def see(sample: Any, timestep: Any, latents: Any, eta: Any = None, generator: Any = None, **more: Any) -> Any:
        seen.append(eta)
        return step(sample, timestep, latents, eta=eta, generator=generator, **more)

    tiny.scheduler.step = see
    call_of(tiny, eta=0.7, num_inference_steps=1)
    call_of(tiny, num_inference_steps=1)
    assert seen == [0.7, 0.3]
    lcmlora.accelerate(tiny, recipe="lightning-2", lora=files["few"])
    with pytest.warns(lcmlora.LcmLoraWarning, match="eta has no effect: EulerDiscreteScheduler takes none"):
        call_of(tiny, eta=0.7)


class WithoutEta(diffusers.StableDiffusionPipeline):
    def __call__(self, prompt, num_inference_steps=50, guidance_scale=7.5, output_type="pil", height=16, width=16):
        kwargs = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return super().__call__(prompt, height, width, output_type=output_type, **kwargs)


def test_a_pipeline_that_takes_no_eta_is_told(files):
    pipe = sd_pipe(cls=WithoutEta)
    lcmlora.accelerate(pipe, recipe="tcd", lora=files["few"])
    with pytest.warns(lcmlora.LcmLoraWarning, match=r"WithoutEta takes no eta, and recipe 'tcd' wants 0\.3"):
        call_of(pipe)


def test_fixed_timesteps_at_a_strength_say_what_the_file_was_made_for(files):
    pipe = sd_pipe(cls=diffusers.StableDiffusionImg2ImgPipeline)
    with unheard():
        lcmlora.accelerate(pipe, recipe="dmd2", lora=files["few"])
    with pytest.warns(
        lcmlora.LcmLoraWarning, match=r"strength=0\.5 starts at 499 and runs 2 of 4.*\[999, 749, 499, 249\]"
    ):
        visited, *_ = drawn(pipe, prompt="a fox", image=picture(), strength=0.5)
    assert visited == [499, 249]
    with pytest.raises(lcmlora.CallError, match=r"start timesteps \[999.*pass 0\.25 or more"):
        pipe("a fox", image=picture(), strength=0.2)
    visited, *_ = drawn(pipe, prompt="a fox", image=picture(), strength=0.5, num_inference_steps=6)
    assert len(visited) == 6  # other numbers of steps are LCMScheduler's own


def test_steps_beyond_fifty_fit_schedulers_that_can_place_them(files):
    pipe = sd_pipe(cls=diffusers.StableDiffusionImg2ImgPipeline)
    lcmlora.accelerate(pipe, recipe="hyper-4", lora=files["few"])
    visited, *_ = drawn(pipe, prompt="a fox", image=picture(), strength=0.05)
    assert len(visited) == 4


def test_settings_of_the_found_sampler_do_not_spoil_the_steps(tiny, files):
    """Fine-tunes are often used under DPM++ with Karras sigmas, which the card's from_config would take along."""
    betas = {"beta_start": 0.001, "beta_end": 0.011, "beta_schedule": "linear", "prediction_type": "v_prediction"}
    tiny.scheduler = diffusers.DPMSolverMultistepScheduler(**betas, use_karras_sigmas=True, timestep_spacing="leading")
    with pytest.warns(lcmlora.LcmLoraWarning, match="predicts 'v_prediction'"):
        lcmlora.accelerate(tiny, recipe="lightning-4", lora=files["few"])
    config = tiny.scheduler.config
    assert {key: config[key] for key in betas} == betas
    assert (config.use_karras_sigmas, config.timestep_spacing) == (False, "trailing")


@pytest.mark.parametrize(
    ("recipe", "file", "words"),
    [
        ("lcm", "sdxl_lightning_4step_lora", "its name says lightning"),
        ("hyper-4", "Hyper-SD15-8steps-lora", "its name says 8 steps"),
        ("tcd", "pcm_sd15_smallcfg_2step_converted", "its name says pcm"),
    ],
)
def test_a_file_of_another_recipe_is_told_by_its_name(recipe, file, words, tiny, files):
    with pytest.warns(lcmlora.LcmLoraWarning, match=rf"driven as .*{re.escape(repr(recipe))}.*{words}"):
        lcmlora.accelerate(tiny, recipe=recipe, lora=files[file])


def test_a_file_says_its_recipe_in_its_metadata(tiny, files, tmp_path):
    written = tmp_path / "mine.safetensors"
    save_file(load_file(files["few"]), written, metadata={"format": "pt", "lcmlora_recipe": "tcd"})
    lcmlora.accelerate(tiny, lora=written)
    assert (lcmlora.status(tiny).recipe, type(tiny.scheduler)) == ("tcd", TCDScheduler)
    with pytest.warns(lcmlora.LcmLoraWarning, match="it names recipe 'tcd'"):
        lcmlora.accelerate(tiny, recipe="hyper-4", lora=written)
    save_file(load_file(files["few"]), written, metadata={"format": "pt", "lcmlora_recipe": "nobodys"})
    with pytest.raises(lcmlora.BaseModelError, match="'nobodys' is not known"):
        lcmlora.accelerate(tiny, lora=written)


@pytest.mark.parametrize(("recipe", "licence"), [("dmd2", "cc-by-nc-4.0"), ("flash", "cc-by-nc-nd-4.0")])
def test_a_licence_without_commerce_is_said_once(recipe, licence, tiny, files):
    with pytest.warns(lcmlora.LcmLoraWarning, match=rf"licensed {licence}: no commercial use"):
        lcmlora.accelerate(tiny, recipe=recipe, lora=files["few"])
    lcmlora.accelerate(tiny, weight=0.9)
    lcmlora.accelerate(tiny, recipe=recipe, lora=files["few"])
    call_of(tiny)
    status = lcmlora.status(tiny)
    assert (status.recipe, status.licence) == (recipe, licence)


def test_a_file_may_cover_what_its_recipe_allows(tiny, tmp_path):
    part = write_lora(tmp_path / "part.safetensors", tiny.unet, only=lambda name: "attn" in name)
    lcmlora.accelerate(tiny, recipe="hyper-4", lora=part)
    lcmlora.restore(tiny)
    with pytest.raises(lcmlora.LoraMismatchError, match="layers an LCM-LoRA of this UNet has to cover"):
        lcmlora.accelerate(tiny, lora=part)
    none = write_lora(tmp_path / "none.safetensors", tiny.unet, only=lambda name: name.startswith("mid"), rank=2)
    foreign = {f"lora_unet_elsewhere.{key.partition('.')[2]}": value for key, value in load_file(none).items()}
    save_file(foreign, none)
    with pytest.raises(lcmlora.LoraMismatchError, match="names 1 modules that the UNet has not"):
        lcmlora.accelerate(tiny, recipe="hyper-4", lora=none)


@pytest.mark.parametrize("fuse", ["auto", False])
def test_layers_outside_of_lcms_are_merged_and_given_back(fuse, tmp_path):
    """conv_in, conv_out and the embeddings: in kohya's spelling, as Hyper-SD's and Lightning's files have them."""
    pipe = sdxl_pipe()
    pipe.scheduler = FOUND["StableDiffusionXL"]()
    file = few_step_file(tmp_path / "few.safetensors", pipe.unet)
    sides = {".lora_A": ".lora_down", ".lora_B": ".lora_up"}
    kohya = {}
    for key, value in load_file(file).items():
        module, side = re.fullmatch(r"unet\.(.+)(\.lora_[AB])\.weight", key).groups()
        kohya[f"lora_unet_{module.replace('.', '_')}{sides[side]}.weight"] = value
    save_file(kohya, file)
    before, old = snapshot(pipe), pipe.unet.conv_in.weight.detach().clone()
    lcmlora.accelerate(pipe, recipe="lightning-4", lora=file, fuse=fuse)
    if fuse == "auto":
        assert not torch.equal(pipe.unet.conv_in.weight, old)
    else:
        assert all(hasattr(pipe.unet.get_submodule(name), "lora_A") for name in OUTSIDE)
    lcmlora.restore(pipe)
    assert_same(before, snapshot(pipe))


def test_a_base_without_a_file_of_the_recipe_says_what_there_is(tiny, files):
    here = {"tiny": lcmlora.LoraSource(str(files["few"]))}
    lcmlora.register(lcmlora.Base("tiny", "Tiny", 32, (8, 16), 79))
    try:
        with pytest.raises(lcmlora.BaseModelError, match=r"'tiny' has no Lightning LoRA \(4 steps\); pass lora="):
            lcmlora.accelerate(tiny, recipe="lightning-4")
        with pytest.raises(lcmlora.BaseModelError, match=r"LoraSource\(file\), recipe='lcm', base='tiny'\)"):
            lcmlora.accelerate(tiny)
        lcmlora.register(dataclasses.replace(table.LCM, name="acme-2", title="an Acme LoRA", loras=here))
        with pytest.raises(lcmlora.BaseModelError, match=r"It has files for recipes 'acme-2': pass recipe="):
            lcmlora.accelerate(tiny)
        with pytest.raises(lcmlora.BaseModelError, match=r"no TDD LoRA.*It has files for recipes 'lcm'.*'hyper-4'"):
            plan.lcm_source(registry.by_name("sd15"), table.by_name("tdd"), Source.of(None))
    finally:
        lcmlora.unregister("acme-2")
        lcmlora.unregister("tiny")


@pytest.fixture
def shape_of() -> Callable[..., torch.nn.Module]:
    """A UNet of that config, with weights that take no memory."""

    def make(**config: Any) -> torch.nn.Module:
        with torch.device("meta"):
            unet = UNet2DConditionModel(sample_size=64, **config)
        return unet.half().to_empty(device="cpu")

    return make


def test_tcd_has_a_file_for_a_base_without_an_lcm_lora(shape_of, tmp_path):
    unet = shape_of(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    with pytest.raises(lcmlora.LoraFileError, match="hf download h1t/TCD-SD21-base-LoRA"):
        lcmlora.accelerate(sd_pipe(unet=unet), recipe="tcd", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(lcmlora.BaseModelError, match=r"no LCM-LoRA exists.*It has files for recipes 'tcd'"):
        lcmlora.accelerate(sd_pipe(unet=unet))


def test_a_smaller_bases_file_is_refused_where_parts_are_allowed(tiny, files):
    """All of Segmind-Vega's layers fit SDXL's: a file that may cover little would pass."""
    deeper = sd_pipe(unet=tiny_unet(layers_per_block=2))
    lcmlora.register(lcmlora.Base("tiny", "Tiny", 32, (8, 16), 79))
    lcmlora.register(lcmlora.Base("deeper", "Deeper", 32, (8, 16), len(lcm_layers(deeper.unet))))
    try:
        part = write_lora(
            files["few"].with_name("part.safetensors"), deeper.unet, only=set(lcm_layers(tiny.unet)).__contains__
        )
        with pytest.raises(lcmlora.LoraMismatchError, match=r"layers a Hyper-SD LoRA .* can cover.*LCM-LoRA of Tiny"):
            lcmlora.accelerate(deeper, recipe="hyper-4", lora=part)
    finally:
        lcmlora.unregister("tiny")
        lcmlora.unregister("deeper")


def test_a_pipeline_that_takes_no_timesteps_says_so(files):
    pipe = build(diffusers.StableDiffusionControlNetImg2ImgPipeline, {})
    with unheard():
        lcmlora.accelerate(pipe, recipe="dmd2", lora=files["few"])
    with pytest.warns(lcmlora.LcmLoraWarning, match=r"start timesteps \[999.*can't be told here"):
        pipe("a fox", image=picture(), control_image=picture(), strength=0.5, output_type="latent")


# -- moving, registering, writing down --------------------------------------------------------------------------------


def test_another_recipe_brings_its_own_file_weight_steps_and_guidance(tiny, files):
    lcmlora.accelerate(tiny, lora=files["few"], weight=0.5, steps=6, guidance=1.5)
    with pytest.raises(lcmlora.BaseModelError, match="structure of no known base"):
        lcmlora.accelerate(tiny, recipe="hyper-8")  # not the file of the recipe before
    assert lcmlora.status(tiny).steps == 6
    lcmlora.accelerate(tiny, recipe="hyper-8-cfg", lora=files["few"])
    status = lcmlora.status(tiny)
    assert (status.recipe, status.weight, status.steps, status.guidance) == ("hyper-8-cfg", 1.0, 8, 5.0)
    assert status.scheduler == "DDIMScheduler"
    lcmlora.accelerate(tiny, guidance=7)  # what is left out stays as it is
    assert (lcmlora.status(tiny).recipe, lcmlora.status(tiny).guidance) == ("hyper-8-cfg", 7)


def test_a_sibling_of_another_recipe_says_so_and_follows(tiny, files):
    sibling = type(tiny)(**tiny.components, requires_safety_checker=False)
    for pipe in (tiny, sibling):
        lcmlora.accelerate(pipe, lora=files["few"])
    with pytest.warns(lcmlora.LcmLoraWarning, match=r"another accelerated pipe, a Stable.*'tcd'.*in place of .*'lcm'"):
        lcmlora.accelerate(tiny, recipe="tcd", lora=files["few"])
    sibling.set_progress_bar_config(disable=True)
    with pytest.warns(lcmlora.LcmLoraWarning, match="given recipe 'tcd' through another pipe"):
        call_of(sibling)
    lcmlora.accelerate(sibling)
    assert type(sibling.scheduler) is TCDScheduler
    call_of(sibling)


def test_another_file_under_a_sibling_is_told_to_who_gives_it(tiny, files, tmp_path):
    sibling = type(tiny)(**tiny.components, requires_safety_checker=False)
    for pipe in (tiny, sibling, tiny):
        lcmlora.accelerate(pipe, lora=files["few"])  # the same again
    copied = tmp_path / "other.safetensors"
    copied.write_bytes(files["few"].read_bytes())
    with pytest.warns(lcmlora.LcmLoraWarning, match=r"gets \S*other.safetensors \(recipe 'lcm'\) with it"):
        lcmlora.accelerate(sibling, lora=copied)
    assert lcmlora.status(tiny).lora == str(copied)
    lcmlora.restore(sibling)
    lcmlora.accelerate(tiny, lora=files["few"])  # nobody else's any more


def test_a_recipe_of_ones_own(tiny, files):
    mine = lcmlora.Recipe("mine-3", "a LoRA of mine", "DDIMScheduler", {"timestep_spacing": "trailing"}, 3, (3, 3))
    lcmlora.register(mine)
    try:
        with pytest.raises(lcmlora.BaseModelError, match="has that name already"):
            lcmlora.register(mine)
        lcmlora.accelerate(tiny, recipe="mine-3", lora=files["few"])
        visited, *_ = drawn(tiny, prompt="a fox", height=16, width=16, output_type="latent")
        assert visited == [999, 666, 332]
    finally:
        assert lcmlora.unregister("mine-3") is mine
    for wrong in (
        {"scheduler": "NoScheduler"},
        {"settings": {"no_such": 1}},
        {"steps": 9, "within": (1, 8)},
        {"guidance": 3.0},
    ):
        with pytest.raises(lcmlora.BaseModelError, match="'wrong'"):
            lcmlora.register(lcmlora.Recipe(**{"name": "wrong", "title": "a LoRA", **wrong}))


def test_a_new_file_for_a_known_recipe(tiny, files, monkeypatch):
    monkeypatch.setattr(table, "_registered", dict(table._registered))
    lcmlora.register(lcmlora.Base("tiny", "Tiny", 32, (8, 16), 79))
    try:
        lcmlora.register(lcmlora.LoraSource(str(files["few"]), weight=0.6), recipe="hyper-8", base="tiny")
        lcmlora.accelerate(tiny, recipe="hyper-8")
        lcmlora.restore(tiny)
        named = files["sdxl_lightning_4step_lora"]
        with pytest.warns(lcmlora.LcmLoraWarning, match="its name says lightning"):
            lcmlora.restore(lcmlora.accelerate(tiny, recipe="hyper-8", lora=named))
        lcmlora.register(lcmlora.LoraSource(str(named)), recipe="hyper-8", base="tiny")
        lcmlora.restore(lcmlora.accelerate(tiny, recipe="hyper-8", lora=named))  # the one that is registered
        lcmlora.register(lcmlora.LoraSource(str(files["few"]), weight=0.6), recipe="hyper-8", base="tiny")
        lcmlora.accelerate(tiny, recipe="hyper-8")
        status = lcmlora.status(tiny)
        assert (status.lora, status.weight) == (str(files["few"]), 0.6)
        assert status.licence == "none given by its source"
        with pytest.raises(lcmlora.BaseModelError, match="base='no' is not known"):
            lcmlora.register(lcmlora.LoraSource("a/b"), recipe="hyper-8", base="no")
    finally:
        lcmlora.unregister("tiny")


def test_a_baked_pipe_knows_its_recipe(tiny, files, tmp_path):
    lcmlora.accelerate(tiny, recipe="pcm-4", lora=files["few"], guidance=1.5)
    baked = lcmlora.load_baked(lcmlora.bake(tiny, tmp_path / "baked"), safety_checker=None)
    baked.set_progress_bar_config(disable=True)
    status = lcmlora.status(baked)
    assert (status.recipe, status.scheduler, status.steps, status.guidance) == ("pcm-4", "DDIMScheduler", 4, 1.5)
    assert same(
        drawn(baked, prompt="a fox", height=16, width=16, output_type="latent")[2],
        drawn(tiny, prompt="a fox", height=16, width=16, output_type="latent")[2],
    )


def test_an_identity_adapter_under_lcm_hears_what_serves_better(tiny, files):
    class IPAdapterFaceIDImageProjection(torch.nn.Module):
        pass

    holder = torch.nn.Module()
    holder.image_projection_layers = torch.nn.ModuleList([IPAdapterFaceIDImageProjection()])
    tiny.unet.encoder_hid_proj = holder
    with pytest.warns(lcmlora.LcmLoraWarning, match=r"IP-Adapter FaceID.*likeness.*0\.55.*recipe='hyper-4'"):
        lcmlora.accelerate(tiny, lora=files["few"])
    lcmlora.restore(tiny)
    lcmlora.accelerate(tiny, recipe="hyper-4", lora=files["few"])  # and not under others


def test_instantid_is_told_by_its_class(files):
    class StableDiffusionInstantIDPipeline(diffusers.StableDiffusionPipeline):
        pass

    with pytest.warns(lcmlora.LcmLoraWarning, match="InstantID, and an LCM-LoRA costs likeness"):
        lcmlora.accelerate(sd_pipe(cls=StableDiffusionInstantIDPipeline), lora=files["few"])


def test_compare_takes_several_recipes(tiny, files):
    sheet = lcmlora.compare(
        tiny, "a fox", base_steps=[2], recipes={"lcm": files["few"], "hyper-2": files["few"]}, height=16, width=16
    )
    assert sheet.columns == ("base, 2 steps", "lcm, 4 steps", "hyper-2, 2 steps")
    assert [row["recipe"] for row in sheet.rows] == [None, "lcm", "hyper-2"]
    assert not lcmlora.is_accelerated(tiny)


def test_the_command_line_lists_recipes():
    shown = CliRunner().invoke(main, ["recipes"]).output
    assert re.search(r"dmd2 +LCMScheduler +4 to 8 steps +sdxl\n.*guidance 1 to 1\.8; cc-by-nc-4\.0", shown)
    assert "no licence given" in shown
