"""Remembering what the text encoders made of a prompt: at four steps, encoding it anew is a good part of a call."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from . import compat
from .layers import ModuleIndex

ENCODERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_encoder")


_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


def encode(cache: PromptCache | None, encode_prompt: Callable[..., Any], pipe: Any, args: Any, kwargs: Any) -> Any:
    """`encode_prompt(pipe, *args, **kwargs)`, through the cache where there is one.

    One thread at a time for each tokenizer: a fast one has state (padding, truncation) that pipes which share it would
    change under each other.
    """
    with ExitStack() as stack:
        for lock in _locks_of(pipe):
            stack.enter_context(lock)
        if cache is None:
            return encode_prompt(pipe, *args, **kwargs)
        return cache.encode(encode_prompt, pipe, args, kwargs)


def _locks_of(pipe: Any) -> list[threading.RLock]:
    """The locks of a pipe's tokenizers, in one order for all pipes."""
    tokenizers = {
        id(t): t for name in ENCODERS if "tokenizer" in name and (t := getattr(pipe, name, None)) is not None
    }
    with _locks_lock:
        return [_locks.setdefault(tokenizers[key], threading.RLock()) for key in sorted(tokenizers)]


class PromptCache:
    """The last results of a pipeline's `encode_prompt`, each good for as long as the encoders are what they were.

    Args:
        size: how many results are kept. The one used longest ago goes first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._results: OrderedDict[str, tuple[list[weakref.ref[Any] | None], str, Any]] = OrderedDict()

    def encode(self, encode_prompt: Callable[..., Any], pipe: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """`encode_prompt(pipe, *args, **kwargs)`, or what it gave the last time.

        It is asked anew where a result would not tell all: with embeddings as arguments, a LoRA scale, or gradients.
        """
        given = dict(inspect.signature(encode_prompt).bind(pipe, *args, **kwargs).arguments)
        del given[next(iter(given))]  # self
        odd = any(isinstance(value, torch.Tensor) for value in given.values()) or given.get("lora_scale") is not None
        if odd or torch.is_grad_enabled():
            return encode_prompt(pipe, *args, **kwargs)
        key = repr(sorted(given.items()))
        parts = [getattr(pipe, name, None) for name in ENCODERS]
        state = repr([_state(part) for part in parts if isinstance(part, nn.Module)])
        if key in self._results:
            then, state_then, result = self._results[key]
            if state == state_then and all((r and r()) is part for r, part in zip(then, parts, strict=True)):
                self._results.move_to_end(key)
                return _copied(result)
        result = encode_prompt(pipe, *args, **kwargs)
        refs = [None if part is None else weakref.ref(part) for part in parts]
        self._results[key] = (refs, state, _copied(result))
        self._results.move_to_end(key)
        if len(self._results) > self.size:
            self._results.popitem(last=False)
        return result


def _copied(result: Any) -> Any:
    """A result of its own for each caller, who may write into it."""
    if isinstance(result, tuple | list):
        return type(result)([_copied(part) for part in result])
    return result.clone() if isinstance(result, torch.Tensor) else result


def _state(encoder: nn.Module) -> Any:
    """What changes when an encoder's weights or adapters do; no weight is read."""
    weights = hash(tuple((p.data_ptr(), compat.version_of(p)) for p in encoder.parameters()))
    wrappers: Any = ModuleIndex.of(encoder).wrappers.values()
    tuners = [
        (t.active_adapters, t.disable_adapters, getattr(t, "merged_adapters", None), getattr(t, "scaling", None))
        for t in wrappers
    ]
    return weights, encoder.training, tuners
