"""The page, and a server for it. gradio is imported where it is used."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from ..errors import DataError, LcmLoraError
from .room import Room

HOST = "127.0.0.1"
_PORTS = range(7860, 7960)
_PROMPT, _POCKET = "a red fox in the snow", "a fox on a teal background"


def require_gradio() -> None:
    """Refuse that gradio is not installed.

    Raises:
        LcmLoraError: it is not.
    """
    if importlib.util.find_spec("gradio") is None:
        raise LcmLoraError("the page needs gradio: pip install 'lcmlora[live]'")


def page(room: Room, prompt: str | None = None) -> Any:
    """The page in front of a room, as a `gradio.Blocks`: to launch; one made inside another becomes a part of it.

    Args:
        room: that draws. The page does not close it.
        prompt: to begin with.

    Raises:
        LcmLoraError: gradio is not installed.
    """
    require_gradio()
    from .web import build

    return build(room, prompt or (_POCKET if room.of_pocket else _PROMPT))


def free_port(host: str = HOST, port: int | None = None) -> int:
    """A port that nobody listens on; the first from 7860 on, where none is asked for.

    Raises:
        DataError: the one asked for is taken or forbidden, there is no such host, or all are taken.
    """
    for one in _PORTS if port is None else (port,):
        try:
            with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, one))
                return int(probe.getsockname()[1])
        except OSError as error:
            reason = error.strerror or str(error)
    asked = f"port {port}" if port is not None else f"no port from {_PORTS[0]} to {_PORTS[-1]}"
    raise DataError(f"{asked} of {host} can't be listened on ({reason}): give another host or port.")


@contextmanager
def serve(
    room: Room, prompt: str | None = None, *, host: str = HOST, port: int | None = None, share: bool = False
) -> Iterator[str]:
    """Serve the page of a room for the length of a block. It asks nothing of the network, unless it is shared.

    Args:
        room: that draws. It is not closed.
        prompt: to begin with.
        host: the address to listen on; "0.0.0.0" for all of this machine's.
        port: 0 for any; None for the first that is free from 7860 on.
        share: whether gradio makes the page public through a tunnel of its own.

    Yields:
        The page's address.

    Raises:
        LcmLoraError: gradio is not installed. DataError: that can't be listened on.
    """
    require_gradio()
    port = free_port(host, port)
    import gradio

    blocks, fonts = page(room, prompt), ["system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]  # no fonts from the network
    theme = gradio.themes.Default(primary_hue="blue", neutral_hue="gray", font=fonts, font_mono=mono)
    try:
        _, local, public = blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            inbrowser=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            theme=theme,
        )
        yield public or local
    finally:
        blocks.close(verbose=False)
