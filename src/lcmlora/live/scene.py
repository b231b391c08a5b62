"""What is to be drawn, what may be chosen, and what came out: plain values, with no pipe in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from PIL import Image

Span = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Scene:
    """Everything that decides a picture. Two equal scenes are the same picture.

    Args:
        prompt: what to draw.
        steps, guidance: of the accelerated picture; None is what the recipe is made for.
        recipe: the name of one of `Room.choices`; None is the first.
        styles: the weights of the room's styles, 0 for one that is not named; None leaves them as they were given.
        seed: of the generator.
        image: a picture to start from; None draws from noise.
        strength: how far to go from that picture, 0 to 1.
    """

    prompt: str
    steps: int | None = None
    guidance: float | None = None
    recipe: str | None = None
    styles: Mapping[str, float] | None = None
    seed: int = 0
    image: Image.Image | None = None
    strength: float = 0.6

    @property
    def of_base(self) -> Scene:
        """What of it decides the base's picture."""
        return dataclasses.replace(self, steps=None, guidance=None, recipe=None)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One way to draw the accelerated picture.

    Attributes:
        name: the recipe's name; "none" is the model as it is, at as few steps.
        steps, guidance: what it takes, from and to.
        usual_steps, usual_guidance: what it is made for.
    """

    name: str
    steps: tuple[int, int]
    usual_steps: int
    guidance: Span
    usual_guidance: float


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A picture and what it took.

    Attributes:
        image: the picture.
        seconds: of the call, the device's work included.
        steps: `num_inference_steps` of the call.
        guidance: `guidance_scale` of the call.
        notes: what the model did not read of the prompt, in sentences.
    """

    image: Image.Image
    seconds: float
    steps: int
    guidance: float
    notes: tuple[str, ...] = ()
