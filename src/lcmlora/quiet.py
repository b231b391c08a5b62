"""Other libraries' hints, kept from the user of this one: only where it makes them speak, and only in its thread."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

IMPORTING = (
    "transformers.utils.import_utils",
    "torchao",
    "torch.utils._pytree",
    "diffusers.quantizers.torchao.torchao_quantizer",
)
"""Who logs, while diffusers is imported, that something optional is not installed or has no GPU."""
TEXT_ENCODERS = "diffusers.loaders.lora_base"
"""Who logs that a LoRA has nothing for the text encoders."""


@contextmanager
def hushed(*loggers: str) -> Iterator[None]:
    """Drop what these loggers of Python's `logging` say below the level of an error, in this thread.

    Loggers and levels stay as the program set them; other threads are heard.
    """
    here = get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or get_ident() != here

    for name in loggers:
        logging.getLogger(name).addFilter(passes)
    try:
        yield
    finally:
        for name in loggers:
            logging.getLogger(name).removeFilter(passes)
