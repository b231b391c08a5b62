"""The page in front of a room, by gradio. What it says of pictures is in `page.js`, how it looks in `page.css`."""

from __future__ import annotations

import base64
import html
import io
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from .. import pocket
from ..errors import DataError, LcmLoraError
from ..pages import picture_uri
from ..pictures import key
from .room import Room
from .scene import Choice, Drawn, Scene

_HERE = Path(__file__).parent
_COLOURS = ("#111", "#fff", "#888", "#d33", "#f80", "#fc2", "#3a4", "#08b", "#84c")
_CANVAS = 512
_LOSSLESS = 256
_HIDDEN: Any = {"show_progress": "hidden", "api_visibility": "private"}
_ASK = "() => { window.lcmloraLive.ask(); return []; }"
_SETTLE = "() => { window.lcmloraLive.settle(); return []; }"
_DICE = "() => Math.floor(Math.random() * 2 ** 31)"


def build(room: Room, prompt: str) -> gr.Blocks:
    """The page, with a prompt to begin with."""
    page, frame = _Page(room), {"min_width": 120, "apply_default_css": False}
    with gr.Blocks(title="lcmlora live", analytics_enabled=False) as blocks, gr.Column(elem_id="live"):
        about = html.escape(f"{room.model}, {room.size[0]} x {room.size[1]} pixels. {room.hardware}")
        gr.HTML(f"<style>{_read('page.css')}</style><h1>lcmlora live</h1><p class='about'>{about}</p>")
        _tabs(room)
        text = gr.Textbox(prompt, label="Prompt", lines=1, max_lines=3, autofocus=True, elem_id="live-prompt")
        if room.of_pocket:
            gr.HTML(_vocabulary())
        with gr.Row(elem_id="live-pictures"):
            base = gr.HTML(page.nothing, elem_id="live-base", visible=room.base, **frame)
            gr.HTML(_sketch(room), js_on_load=_read("sketch.js"), elem_id="live-sketch", **frame)
            fast = gr.HTML(page.nothing, js_on_load=_read("page.js"), elem_id="live-fast", **frame)
        inputs = [text, *_controls(room), gr.Textbox(visible=False)]
        for control in inputs[:-1]:
            if not isinstance(control, gr.Radio):  # another recipe has other sliders first
                control.change(None, js=_ASK, **_HIDDEN)  # `input` of a Textbox is deaf to what is deleted or pasted
        latest: Any = {"trigger_mode": "always_last", **_HIDDEN}
        asked = fast.input(page.fast, inputs, [fast], js=_collect("#live-fast"), queue=False, **latest)
        asked.then(None, js=_SETTLE, **_HIDDEN)
        if room.base:
            drawn = asked.then(page.base, inputs, [base], js=_collect("#live-base"), concurrency_limit=1, **latest)
            drawn.then(None, js=_SETTLE, **_HIDDEN)
        blocks.load(None, js=_ASK, **_HIDDEN)
        blocks.unload(page.left)
    return blocks


def _tabs(room: Room) -> None:
    """The two ways to say what is wanted."""
    with gr.Tabs(elem_id="live-modes", visible=room.sketches):
        for name, mode in (("Type", "type"), ("Draw", "draw")):
            with gr.Tab(name) as tab:
                pass
            tab.select(None, js=f"() => {{ window.lcmloraLive.mode('{mode}'); return []; }}", **_HIDDEN)


def _controls(room: Room) -> list[Any]:
    """Steps, guidance, recipe, seed, the styles, and how far to go from a sketch, in this order."""
    first, slider = next(iter(room.choices.values())), {"buttons": [], "min_width": 150}
    with gr.Row():
        steps = gr.Slider(step=1, label="Steps", **_steps(first), **slider)
        guidance = gr.Slider(step=0.1, label="Guidance", **_guidance(first), **slider)
        styles = [
            gr.Slider(0, max(1.5, weight), weight, step=0.05, label=f"Style: {name}", **slider)
            for name, weight in room.styles.items()
        ]
        strength = gr.Slider(0.2, 1, 0.7, step=0.05, label="Strength", elem_id="live-strength", **slider)
    with gr.Row():
        recipe = gr.Radio(list(room.choices), value=first.name, label="Recipe", scale=3, min_width=150)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=110)
        dice = gr.Button("Another seed", min_width=110, elem_id="live-dice")
    dice.click(None, None, [seed], js=_DICE, **_HIDDEN)
    changed = recipe.input(
        lambda name: [gr.update(**_steps(room.choices[name])), gr.update(**_guidance(room.choices[name]))],
        [recipe],
        [steps, guidance],
        queue=False,
        **_HIDDEN,
    )
    changed.then(None, js=_ASK, **_HIDDEN)
    return [steps, guidance, recipe, seed, *styles, strength]


def _steps(choice: Choice) -> dict[str, Any]:
    return _slider(*choice.steps, choice.usual_steps)


def _guidance(choice: Choice) -> dict[str, Any]:
    return _slider(*choice.guidance, choice.usual_guidance)


def _slider(least: float, most: float, value: float) -> dict[str, Any]:
    """A slider that stands still where there is nothing to choose: gradio takes none without a length."""
    return {"minimum": least, "maximum": max(most, least + 1), "value": value, "interactive": least < most}


def _vocabulary() -> str:
    """What the embedded model can draw."""
    words = pocket.words()
    things, backgrounds = ", ".join(words["things"]), ", ".join(words["backgrounds"])
    rest = ", ".join([*words["sizes"], *words["positions"]])
    return (
        "<details><summary>What this small model can draw</summary>"
        f"<p><b>Things:</b> {things}</p><p><b>Backgrounds:</b> {backgrounds}</p><p><b>Where, how large:</b> {rest}</p>"
        "</details>"
    )


def _collect(frame: str) -> str:
    return f"(...values) => window.lcmloraLive.collect(values, '{frame}')"


def _sketch(room: Room) -> str:
    width, height = room.size
    colours = "".join(
        f"<button type='button' data-colour='{one}' style='--colour: {one}' aria-label='{one}'></button>"
        for one in _COLOURS
    )
    return (
        f"<canvas width='{_CANVAS}' height='{_CANVAS * height // width}' aria-label='Sketch'></canvas>"
        f"<div class='tools'><div class='colours'>{colours}</div>"
        "<input type='range' min='2' max='60' value='16' aria-label='Width of the pen'>"
        "<button type='button' class='undo'>Undo</button><button type='button' class='clear'>Clear</button></div>"
    )


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


class _Page:
    """What the page asks of its room, in values of gradio's components and in HTML."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._shape = "aspect-ratio: {} / {}".format(*room.size)
        self.nothing = self._figure("", "<b>&nbsp;</b>", "busy")

    def fast(self, request: gr.Request, *values: Any) -> Any:
        """The accelerated picture."""
        return self._answer(request, values, self._room.draw)

    def base(self, request: gr.Request, *values: Any) -> Any:
        """The base's picture; none beside a sketch."""
        return gr.skip() if values[-1] else self._answer(request, values, self._room.draw_base)

    def left(self, request: gr.Request) -> None:
        """A visitor has closed the page."""
        self._room.leave(str(request.session_hash))

    def _answer(self, request: gr.Request, values: Sequence[Any], draw: Callable[..., Drawn | None]) -> Any:
        try:
            scene = self._scene(*values)
            drawn = draw(scene, str(request.session_hash))
        except LcmLoraError as error:
            return self._figure("", f"<p role='alert'>{html.escape(str(error))}</p>")
        if drawn is None:
            return gr.skip()
        name = "as it is" if draw == self._room.draw_base else html.escape(str(scene.recipe))
        steps = f"{drawn.steps} step{'s' * (drawn.steps != 1)}, guidance {drawn.guidance:g}"
        caption = (
            f"<b>{name}</b><span class='steps'>{steps}</span><span class='times'></span>"
            f"<span class='seconds'>{drawn.seconds:.2f} s</span>"
            + "".join(f"<p role='status'>{html.escape(note)}</p>" for note in drawn.notes)
        )
        quality = None if max(drawn.image.size) <= _LOSSLESS else 88
        picture = f"<img alt='{html.escape(scene.prompt)}' src='{picture_uri(drawn.image, quality)}' decoding='sync'>"
        return self._figure(picture, caption, "", key(vars(scene.of_base)), drawn.seconds)

    def _scene(self, prompt: str, steps: int, guidance: float, recipe: str, seed: float | None, *more: Any) -> Scene:
        *styles, strength, sketch = more
        return Scene(
            prompt=prompt.strip(),
            steps=int(steps),
            guidance=float(guidance),
            recipe=recipe,
            styles=dict(zip(self._room.styles, map(float, styles), strict=True)),
            seed=int(seed or 0),
            image=_picture(sketch, self._room.size) if sketch else None,
            strength=float(strength),
        )

    def _figure(self, picture: str, caption: str, kind: str = "", key: str = "", seconds: float = 0.0) -> str:
        """A picture and what it took, or what there is in its place; never the same text twice."""
        return (
            f"<figure class='{kind}' data-key='{key}' data-seconds='{seconds}' data-once='{secrets.token_hex(4)}'>"
            f"<div class='frame' style='{self._shape}'>{picture}</div><figcaption>{caption}</figcaption></figure>"
        )


def _picture(uri: str, size: tuple[int, int]) -> Image.Image:
    """The sketch that a canvas sent.

    Raises:
        DataError: it is no picture.
    """
    try:
        data = base64.b64decode(uri.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data)) as picture:
            return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the sketch can't be read as a picture: {error}") from error
