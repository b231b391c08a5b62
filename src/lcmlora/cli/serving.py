"""`lcmlora live`."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import ExitStack, suppress
from typing import Any

import click

from .group import Say, command
from .options import Model, Pixels, Speed, model_options, sides, speed_options


@command()
@click.argument("prompt", required=False)
@click.option("--compare/--no-compare", default=True, help="Also the model as it is: it takes a second UNet.")
@click.option("--base-steps", type=click.IntRange(1), default=25, show_default=True, help="Of the model as it is.")
@click.option("--base-guidance", type=float, help="Of the model as it is; the pipeline's own by default.")
@click.option("--size", type=Pixels(), help="Width and height, such as 512x768.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 for everywhere.")
@click.option("--port", type=click.IntRange(0, 65535), help="The first free from 7860 on by default.")
@click.option("--share", is_flag=True, help="Make the page public, through gradio's tunnel.")
@click.option("--open", "browse", is_flag=True, help="Open the page in the browser.")
@model_options
@speed_options
def live(
    prompt: str | None,
    host: str,
    port: int | None,
    share: bool,
    browse: bool,
    model: Model,
    speed: Speed,
    say: Say,
    **how: Any,
) -> None:
    """Serve a page where pictures follow what you type.

    They follow sliders and sketches too: left the model as it is, right accelerated. PROMPT is there to begin with.
    Without --model it is the embedded one. Ctrl-C ends it.

    \b
    lcmlora live
    lcmlora live "a castle" -m my-model --style ink=ink.safetensors:0.8 --vae tiny
    """
    if not speed.accelerate:
        raise click.UsageError("live draws both ways by itself: --no-accelerate leaves nothing to follow the keys.")
    said = speed.arguments()
    from ..live.serving import free_port, require_gradio

    require_gradio()
    port = free_port(host, port)
    model = dataclasses.replace(model, model=model.model or "pocket")
    with ExitStack() as stack:
        room = stack.enter_context(_room(model, said, how, say))
        from ..live import serve

        address = stack.enter_context(serve(room, prompt, host=host, port=port, share=share))
        with suppress(KeyboardInterrupt):
            say.tell("Ctrl-C ends it.")
            say.result(address, {"address": address})
            if browse:
                click.launch(address)
            threading.Event().wait()


def _room(model: Model, said: dict[str, Any], how: dict[str, Any], say: Say) -> Any:
    """The room, in which a picture was drawn already: the first one takes longer."""
    from diffusers.utils import logging

    logging.set_verbosity_error()  # the page says what is left out of a prompt
    from .. import pocket
    from ..live import Room, Scene

    pipe = model.load(say, None)
    pipe.set_progress_bar_config(disable=True)
    if model.local_files_only:
        said["local_files_only"] = True
    of_pocket = str(model.model).partition(":")[0] == "pocket"
    guidance = pocket.GUIDANCE if how["base_guidance"] is None and of_pocket else how["base_guidance"]
    size = sides(how["size"]) if how["size"] else None
    made: dict[str, Any] = {"base": how["compare"], "base_steps": how["base_steps"], "base_guidance": guidance}
    room = Room(pipe, size=size, **made, **said)
    room.draw(Scene("a fox"))
    return room
