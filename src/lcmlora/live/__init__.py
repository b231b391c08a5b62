"""Pictures that follow what is typed: a room that draws the newest wish of each visitor, and a page in front of it.

`Room` needs no gradio; `page` and `serve` do: `pip install 'lcmlora[live]'`.
"""

from __future__ import annotations

from .room import Room
from .scene import Choice, Drawn, Scene
from .serving import page, serve

__all__ = ["Choice", "Drawn", "Room", "Scene", "page", "serve"]
