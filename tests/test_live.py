"""`lcmlora live`: the room, the command, and the page as a person uses it, in the system's own chromium.

`python tests/test_live.py FOLDER` writes pictures of the page to look at. What needs gradio, playwright or chromium is
skipped where they are missing (`pip install --group live --group browser`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

import lcmlora
from browsing import CHROMIUM, keep_looks, look, visiting
from browsing import browser as browser
from conftest import assert_same, sd_pipe, snapshot, write_lora
from lcmlora import live, pocket
from lcmlora.cli import main
from lcmlora.live import Room, Scene, room, serving

GRADIO = importlib.util.find_spec("gradio") is not None
INK = {"ink": 0.5}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder, unet = tmp_path_factory.mktemp("live"), sd_pipe().unet
    ink = folder / "ink.safetensors"
    some = {"only": lambda name: name.endswith("to_q"), "seed": 2}
    return {
        "lcm": write_lora(folder / "lcm.safetensors", unet),
        "ink": write_lora(ink, unet, **some),
    }


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(room, "QUIET", 0.0)


@pytest.fixture
def made(files, quick) -> Iterator[Room]:
    with Room(sd_pipe(), base_steps=3, lora=files["lcm"], styles={"ink": lcmlora.Style(files["ink"], 0.5)}) as one:
        yield one


def call(pipe, prompt: str, steps: int, guidance: float, seed: int = 0, **more) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    made = pipe(prompt, num_inference_steps=steps, guidance_scale=guidance, generator=generator, **more)
    return made.images[0].tobytes()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        threading.Event().wait(0.001)


class Held:
    """A UNet that waits in its first pass from now on."""

    def __init__(self, unet) -> None:
        self.begun, self.on, self.passes = threading.Event(), threading.Event(), 0
        self.hook = unet.register_forward_pre_hook(self.wait)

    def wait(self, *_: object) -> None:
        self.passes += 1
        self.begun.set()
        assert self.on.wait(60)


@contextmanager
def held(unet) -> Iterator[Held]:
    one = Held(unet)
    with ThreadPoolExecutor(4) as one.pool:
        try:
            yield one
        finally:
            one.on.set()
            one.hook.remove()


# -- the room ---------------------------------------------------------------------------------------------------------


def test_each_picture_is_what_the_pipe_gives(made, files):
    fast = lcmlora.accelerate(sd_pipe(), lora=files["lcm"], styles={"ink": lcmlora.Style(files["ink"], 0.5)})
    assert made.draw(Scene("a fox")).image.tobytes() == call(fast, "a fox", 4, 1)
    drawn = made.draw(Scene("a fox", steps=2, guidance=1.5, seed=3, styles={"ink": 0.2}))
    lcmlora.set_styles(fast, {"ink": 0.2})
    assert (drawn.steps, drawn.guidance, drawn.image.tobytes()) == (2, 1.5, call(fast, "a fox", 2, 1.5, 3))
    sketch = Image.new("RGB", made.size, "teal")
    other = lcmlora.accelerate(StableDiffusionImg2ImgPipeline(**fast.components), lora=files["lcm"])
    lcmlora.set_styles(other, {})
    drawn = made.draw(Scene("a fox", image=sketch, strength=0.5, styles={}))
    assert drawn.image.tobytes() == call(other, "a fox", 4, 1, image=sketch, strength=0.5)
    lcmlora.set_styles(fast, INK)
    assert made.draw(Scene("a fox")).image.tobytes() == call(fast, "a fox", 4, 1)  # back from the sketch's weights


def test_the_base_and_none_are_the_pipe_as_it_is_with_its_styles(made, files):
    plain = sd_pipe()
    plain.load_lora_weights(files["ink"].parent, weight_name=files["ink"].name, adapter_name="ink")
    plain.set_adapters(["ink"], [0.5])
    assert made.draw_base(Scene("a fox")).image.tobytes() == call(plain, "a fox", 3, 7.5)
    assert made.draw(Scene("a fox", recipe="none", steps=2)).image.tobytes() == call(plain, "a fox", 2, 7.5)
    drawn = made.draw(Scene("a fox", recipe="none", styles={}))
    assert drawn.image.tobytes() == call(sd_pipe(), "a fox", 4, 7.5)
    assert made.draw_base(Scene("a fox", styles={})).image.tobytes() == call(sd_pipe(), "a fox", 3, 7.5)


def test_only_the_newest_wish_of_a_visitor_is_drawn(made):
    with held(made._pipes["text2img"].unet) as unet:
        first = unet.pool.submit(made.draw, Scene("one"), "me")
        assert unet.begun.wait(60)
        late = []
        for count, prompt in enumerate(("two", "three"), 2):
            late.append(unet.pool.submit(made.draw, Scene(prompt), "me"))
            until(lambda count=count: made._waiting == count)
        other = unet.pool.submit(made.draw, Scene("four"), "you")
        unet.on.set()
        assert first.result().image
        assert late[0].result() is None
        assert late[1].result().image
        assert other.result().image
    assert unet.passes == 12


def test_the_base_is_given_up_where_its_visitor_wants_another(made):
    with held(made._base_pipes["text2img"].unet) as unet:
        base = unet.pool.submit(made.draw_base, Scene("one"), "me")
        assert unet.begun.wait(60)
        fast = unet.pool.submit(made.draw, Scene("two"), "me")
        until(lambda: made._waiting == 1)
        unet.on.set()
        assert base.result() is None
        assert fast.result().image
        assert unet.passes == 1
        assert made.draw_base(Scene("one"), "me") is None
        assert made.draw_base(
            Scene("two", steps=2, guidance=1.2, recipe="none"), "me"
        ).image  # the base has none of these


def test_the_base_makes_way_for_others_and_is_drawn_afterwards(made):
    with held(made._base_pipes["text2img"].unet) as unet:
        base = unet.pool.submit(made.draw_base, Scene("one"), "me")
        assert unet.begun.wait(60)
        fast = unet.pool.submit(made.draw, Scene("two"), "you")
        until(lambda: made._waiting == 1)
        unet.on.set()
        assert fast.result().image
        again = base.result()
        passes = unet.passes
    assert passes > 1
    assert made.draw_base(Scene("one"), "me") is again  # remembered
    assert unet.passes == passes


def test_the_base_is_given_up_where_its_visitor_leaves(made):
    with held(made._base_pipes["text2img"].unet) as unet:
        base = unet.pool.submit(made.draw_base, Scene("one"), "me")
        assert unet.begun.wait(60)
        made.leave("me")
        unet.on.set()
        assert base.result() is None


def test_a_base_that_waits_while_the_room_closes_is_drawn_or_refused(made):
    with held(made._pipes["text2img"].unet) as unet:
        fast = unet.pool.submit(made.draw, Scene("one"), "me")
        assert unet.begun.wait(60)
        base = unet.pool.submit(made.draw_base, Scene("two"), "you")
        until(lambda: "you" in made._newest)
        closing = unet.pool.submit(made.close)
        unet.on.set()
        assert fast.result().image
        closing.result()
        error = base.exception()  # None where it came first
        assert error is None or (isinstance(error, lcmlora.PipelineError) and "closed" in str(error))


def test_closing_gives_the_pipe_back_bit_for_bit(files, quick):
    pipe = sd_pipe()
    pipe("x", num_inference_steps=1)
    before = snapshot(pipe)
    with Room(pipe, lora=files["lcm"], styles={"ink": files["ink"]}) as one:
        one.draw(Scene("a fox", image=Image.new("RGB", one.size), steps=2))
        one.draw_base(Scene("a fox"))
    assert_same(before, snapshot(pipe))
    assert not pipe.vae.decoder.mid_block._forward_pre_hooks
    with pytest.raises(lcmlora.PipelineError, match="closed"):
        one.draw(Scene("a fox"))
    with pytest.raises(lcmlora.LcmLoraError):
        Room(pipe)  # no known base, and no file
    assert_same(before, snapshot(pipe))


def test_the_choices_are_the_recipes_for_this_base_that_are_here(tmp_path):
    file = shutil.copy(pocket.LCM_LORA / "pytorch_lora_weights.safetensors", tmp_path / "near.safetensors")
    source = lcmlora.LoraSource(str(file))
    lcmlora.register(lcmlora.Recipe("near", "a LoRA", within=(2, 2), steps=2, loras={"pocket": source}))
    lcmlora.register(lcmlora.Recipe("far", "a LoRA", loras={"pocket": lcmlora.LoraSource("nobody/nothing")}))
    try:
        pipe = lcmlora.load_pocket()
        pipe.set_progress_bar_config(disable=True)
        with Room(pipe, base_guidance=pocket.GUIDANCE, guidance=1.5) as one:
            assert list(one.choices) == ["lcm", "tcd", "near", "none"]
            lcm, _, near, none = one.choices.values()
            assert (lcm.steps, lcm.guidance, lcm.usual_guidance) == ((1, 8), (1, 2), 1.5)
            assert (near.steps, near.guidance, near.usual_steps) == ((2, 2), (1, 1), 2)
            assert none.guidance == (1, pocket.GUIDANCE)
            got = [one.draw(Scene("a fox", recipe=name)).image.tobytes() for name in ("near", "lcm")]
            lcmlora.restore(one._pipes["text2img"])
        with lcmlora.accelerated(pipe, recipe="near"):
            assert got[0] == call(pipe, "a fox", 2, 1)
        with lcmlora.accelerated(pipe):
            assert got[1] == call(pipe, "a fox", 4, 1.5)
    finally:
        lcmlora.unregister("near")
        lcmlora.unregister("far")


def test_a_page_may_begin_with_a_recipe_of_one_guidance():
    """Its slider has nothing to choose, and gradio takes none without a length."""
    pytest.importorskip("gradio")
    pipe = lcmlora.load_pocket()
    with Room(pipe, base=False, recipe="tcd") as one:
        assert next(iter(one.choices.values())).guidance == (1, 1)
        live.page(one)


def test_a_baked_model_is_drawn_with_as_it_is(files, tmp_path):
    lcmlora.bake(lcmlora.accelerate(sd_pipe(), lora=files["lcm"]), tmp_path / "baked")
    pipe = lcmlora.load_baked(tmp_path / "baked")
    pipe.set_progress_bar_config(disable=True)
    with Room(pipe) as one:
        assert (one.base, one.sketches, list(one.choices)) == (False, False, ["lcm"])
        assert one.draw(Scene("a fox")).image.tobytes() == call(pipe, "a fox", 4, 1)
        with pytest.raises(lcmlora.CallError, match="baked"):
            one.draw(Scene("a fox", image=Image.new("RGB", one.size)))
        with pytest.raises(lcmlora.PipelineError, match="no base"):
            one.draw_base(Scene("a fox"))
    with pytest.raises(lcmlora.PipelineError, match="baked: there is nothing for steps="):
        Room(pipe, steps=2)


def test_what_no_room_can_be_made_of_is_refused_at_once(files):
    for pipe in (sd_pipe(cls=StableDiffusionImg2ImgPipeline), object()):
        with pytest.raises(lcmlora.PipelineError, match="does not draw pictures from texts"):
            Room(pipe)
    pipe = lcmlora.accelerate(sd_pipe(), lora=files["lcm"])
    with pytest.raises(lcmlora.PipelineError, match=r"accelerated already.*lcmlora.restore"):
        Room(pipe)


@pytest.mark.parametrize(
    ("scene", "words"),
    [
        (Scene("x", recipe="hyper-8"), "recipe='hyper-8': this room has lcm, none"),
        (Scene("x", styles={"oil": 1}), r"no style 'oil' in this room; those that are there: \['ink'\]"),
        (Scene("x", steps=0), "num_inference_steps"),
        (Scene("x", seed=10**30), "this can't be drawn: "),
        (Scene("x", recipe="none", image=Image.new("RGB", (16, 16)), strength=7), "this can't be drawn: .*strength"),
    ],
)
def test_what_can_not_be_drawn_is_said_in_a_sentence(scene, words, made):
    with pytest.raises(lcmlora.CallError, match=words) as told:
        made.draw(scene)
    assert "\n" not in str(told.value)


def test_what_a_prompt_is_too_long_for_is_noted(made):
    assert made.draw(Scene("a fox", steps=1)).notes == ()
    (note,) = made.draw(Scene("fox " * 100, steps=1)).notes
    assert re.match(r"The prompt is too long: the model does not read '.*fox fox", note)


def test_pictures_have_the_size_asked_for(files):
    with Room(sd_pipe(), lora=files["lcm"], size=(32, 16), base=False) as one:
        assert list(one.choices) == ["lcm"]
        assert one.draw(Scene("a fox")).image.size == one.size == (32, 16)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--no-accelerate", "--no-accelerate leaves nothing"),
        ("--host 203.0.113.1", "of 203.0.113.1 can't be listened on"),
        ("-m nowhere", "there is no model 'nowhere'"),
        ("--recipe flash -q", "has no Flash Diffusion LoRA"),
        ("--size 30x30", "multiples of 8"),
    ],
)
@pytest.mark.skipif(not GRADIO, reason="no gradio")
def test_the_command_refuses_in_a_sentence(line, words):
    shown = CliRunner().invoke(main, ["live", *line.split()])
    assert shown.exit_code in (1, 2)
    assert words in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.skipif(not GRADIO, reason="no gradio")
def test_a_port_that_is_taken_is_refused_before_anything_is_loaded():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        shown = CliRunner().invoke(main, ["live", "--port", str(port)])
        assert serving.free_port() != port
    assert (shown.exit_code, shown.stderr.count("\n")) == (1, 1)
    assert f"port {port} of 127.0.0.1 can't be listened on" in shown.stderr


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    shown = CliRunner().invoke(main, ["live"])
    assert (shown.exit_code, shown.stderr) == (1, "Error: the page needs gradio: pip install 'lcmlora[live]'\n")


@pytest.mark.skipif(not GRADIO, reason="no gradio")
def test_it_says_where_the_page_is_and_ends_quietly_on_ctrl_c(tmp_path):
    line = [sys.executable, "-m", "lcmlora", "live", "--port", "0", "--quiet", "--no-compare"]
    place = {**os.environ, "PYTHONPATH": str(Path(lcmlora.__file__).parents[1]), "GRADIO_TEMP_DIR": str(tmp_path)}
    running = subprocess.Popen(line, env=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    address = running.stdout.readline()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert re.fullmatch(r"http://127.0.0.1:\d+/\n", address), err
    assert (running.returncode, out, err) == (0, "", "")


# -- the page ---------------------------------------------------------------------------------------------------------

sync_api = pytest.importorskip("playwright.sync_api") if GRADIO and CHROMIUM else None
in_browser = pytest.mark.skipif(sync_api is None, reason="no gradio, playwright or chromium")


@pytest.fixture(scope="module")
def address(files, tmp_path_factory) -> Iterator[str]:
    """The page of a tiny model. gradio keeps no file of it."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(cache))
        styles = {"ink": lcmlora.Style(files["ink"], 0.5)}
        with Room(sd_pipe(), base_steps=3, lora=files["lcm"], styles=styles) as one, live.serve(one, port=0) as at:
            yield at
        assert [one.name for one in cache.iterdir()] in ([], ["vibe_edit_history"])  # its own, empty, made at once


@pytest.fixture
def visit(browser, address) -> Iterator[Callable[..., sync_api.Page]]:
    """Open the page. Nothing may go wrong in it, and nothing may be asked of anybody else."""
    own = (address, "data:", "blob:")
    with visiting(browser, address, own, 950, allowed=("info", "log")) as open_page:

        def opened(*given: object, **more: object) -> sync_api.Page:
            page = open_page(*given, **more)
            settled(page)
            return page

        yield opened


def expect(thing):
    return sync_api.expect(thing)


def settled(page) -> None:
    """Both pictures are there, and of what the page says now."""
    expect(page.locator("#live-fast img")).to_be_visible(timeout=60_000)
    expect(page.locator("#live figure.busy:visible")).to_have_count(0, timeout=60_000)


def picture(page, frame: str = "fast") -> str:
    settled(page)
    return page.locator(f"#live-{frame} img").get_attribute("src")


@in_browser
def test_the_pictures_follow_what_is_typed(visit):
    page = visit()
    expect(page.locator("#live-base figcaption")).to_contain_text(re.compile(r"as it is3 steps, guidance 7\.5.*\d s"))
    expect(page.locator("#live-fast figcaption")).to_contain_text(re.compile(r"lcm4 steps, guidance 1.*\d s"))
    before = picture(page), picture(page, "base")
    page.get_by_label("Prompt").fill("")
    nasty = "an owl & '<b>' ${1 + 1} {{value}}"
    page.get_by_label("Prompt").press_sequentially(nasty)
    for frame in ("fast", "base"):
        expect(page.locator(f"#live-{frame} img")).to_have_attribute("alt", nasty, timeout=60_000)
    settled(page)
    assert picture(page) != before[0]
    assert picture(page, "base") != before[1]


TYPE_ON = """async () => {
  const collect = lcmloraLive.collect;
  let wishes = 0;
  lcmloraLive.collect = (...given) => { wishes += 1; return collect(...given); };
  for (let key = 0; key < 30; key++) {
    document.querySelector("#live-fast figure").dataset.seconds = 9;
    lcmloraLive.ask();
    await new Promise((done) => setTimeout(done, 50));
  }
  return wishes;
}"""


@in_browser
def test_who_types_on_without_a_pause_has_pictures_all_the_same(visit):
    page = visit()
    assert page.evaluate(TYPE_ON) > 1  # though each slow picture gives the next key a grace
    settled(page)


@in_browser
def test_sliders_change_the_accelerated_picture_and_the_styles_both(visit):
    page = visit()
    before, base = picture(page), picture(page, "base")
    page.get_by_role("slider", name=re.compile("Steps")).fill("2")
    expect(page.locator("#live-fast figcaption")).to_contain_text("2 steps, guidance 1")
    assert picture(page) != before
    assert picture(page, "base") == base
    page.get_by_role("slider", name=re.compile("Guidance")).fill("1.5")
    expect(page.locator("#live-fast figcaption")).to_contain_text("2 steps, guidance 1.5")
    now = picture(page)
    page.get_by_role("slider", name=re.compile("Style: ink")).fill("1.5")
    expect(page.locator("#live-fast img")).not_to_have_attribute("src", now)
    expect(page.locator("#live-base img")).not_to_have_attribute("src", base, timeout=60_000)


@in_browser
def test_another_recipe_has_other_limits_and_another_picture(visit):
    page = visit()
    before, guidance = picture(page), page.get_by_role("slider", name=re.compile("Guidance"))
    page.get_by_label("none").check()
    expect(page.locator("#live-fast figcaption")).to_contain_text("none4 steps, guidance 7.5")
    expect(guidance).to_have_attribute("max", "7.5")
    page.get_by_label("lcm").check()
    expect(page.locator("#live-fast figcaption")).to_contain_text("lcm4 steps, guidance 1")
    expect(guidance).to_have_attribute("max", "2")
    assert picture(page) == before


@in_browser
def test_another_seed_is_another_picture_and_a_seed_that_is_none_is_said(visit):
    page = visit()
    before, seed = picture(page), page.get_by_label("Seed")
    page.get_by_role("button", name="Another seed").click()
    expect(seed).not_to_have_value("0")
    expect(page.locator("#live-fast img")).not_to_have_attribute("src", before)
    seed.fill("999999999999999999999999")
    expect(page.locator("#live-fast").get_by_role("alert")).to_contain_text("this can't be drawn: ")
    seed.fill("0")
    expect(page.locator("#live-fast img")).to_have_attribute("src", before)


@in_browser
def test_a_prompt_that_is_too_long_is_drawn_and_noted(visit):
    page = visit()
    expect(page.locator("#live-fast").get_by_role("status")).to_contain_text("the model does not read '")
    page.get_by_label("Prompt").press("Control+A")
    page.get_by_label("Prompt").press("Backspace")
    expect(page.locator("#live-fast").get_by_role("status")).to_have_count(0)
    settled(page)


@in_browser
def test_the_picture_follows_what_is_drawn(visit):
    page = visit()
    page.get_by_role("tab", name="Draw").click()
    canvas = page.get_by_label("Sketch", exact=True)
    expect(canvas).to_be_visible()
    expect(page.locator("#live-base")).to_be_hidden()
    empty, box = picture(page), canvas.bounding_box()
    page.get_by_role("button", name="#d33").click()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 200, steps=5)
    page.mouse.up()
    expect(page.locator("#live-fast img")).not_to_have_attribute("src", empty)
    drawn = picture(page)
    look(page, "draw")
    page.get_by_role("slider", name=re.compile("Strength")).fill("0.4")
    expect(page.locator("#live-fast img")).not_to_have_attribute("src", drawn)
    page.get_by_role("slider", name=re.compile("Strength")).fill("0.7")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#live-fast img")).to_have_attribute("src", empty)
    page.get_by_role("tab", name="Type").click()
    expect(page.locator("#live-base")).to_be_visible()
    settled(page)
    expect(page.locator("#live-strength")).to_be_hidden()


@in_browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("dark", 390)])
def test_it_fits_its_window(scheme, width, visit):
    page = visit(width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    base, fast = (page.locator(f"#live-{name} img").bounding_box() for name in ("base", "fast"))
    assert base["y"] == fast["y"]  # side by side
    assert base["width"] == pytest.approx(fast["width"], abs=1)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    look(page, f"{scheme}-{width}", full_page=True)


@in_browser
def test_each_visitor_has_pictures_of_his_own(visit):
    one, two = visit(), visit()
    one.get_by_label("Prompt").fill("an owl")
    two.get_by_label("Prompt").fill("a rocket")
    for page, prompt in ((one, "an owl"), (two, "a rocket")):
        for frame in ("fast", "base"):
            expect(page.locator(f"#live-{frame} img")).to_have_attribute("alt", prompt, timeout=60_000)
        settled(page)


if __name__ == "__main__":
    keep_looks(__file__)
