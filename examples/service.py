"""A web service: one pipe, whose requests are drawn one after another, each with styles of its own.

    MODEL=path/to/model uvicorn --app-dir examples service:app
    curl localhost:8000/picture --json '{"prompt": "a fox", "seed": 1, "styles": {"soft": 0.8}}' -o fox.png

Without MODEL it is the embedded model. What can't be drawn is a 422 with the reason, too long a queue a 503.
"""

import asyncio
import io
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field

import lcmlora

STYLES = {"soft": lcmlora.Style(lcmlora.pocket.STYLE, weight=0)}  # those that requests may name
pipe = lcmlora.accelerate(lcmlora.load(os.environ.get("MODEL", "pocket")), styles=STYLES)
pipe.set_progress_bar_config(disable=True)
painter = ThreadPoolExecutor(max_workers=1)  # one picture at a time, first come, first served
waiting = 0
app = FastAPI()


class Wish(BaseModel):
    prompt: str
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = 4
    styles: dict[str, float] = {}


def draw(wish):
    generator = torch.Generator().manual_seed(wish.seed)
    with lcmlora.styled(pipe, wish.styles):  # afterwards the pipe has the styles that it had
        made = pipe(wish.prompt, num_inference_steps=wish.steps, generator=generator)
    made.images[0].save(png := io.BytesIO(), "png")
    return png.getvalue()


@app.post("/picture")
async def picture(wish: Wish):
    global waiting
    if waiting >= 100:
        raise HTTPException(503, "100 pictures are waiting already")
    waiting += 1
    try:
        png = await asyncio.get_running_loop().run_in_executor(painter, draw, wish)
    except lcmlora.LcmLoraError as error:
        raise HTTPException(422, str(error)) from error
    finally:
        waiting -= 1
    return Response(png, media_type="image/png")


@app.get("/health")
async def health():
    return {"accelerated": lcmlora.is_accelerated(pipe), "waiting": waiting}
