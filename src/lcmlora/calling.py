"""What a call of an accelerated pipe does around the pipeline's own: one at a time, verified, prompts remembered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .calls import Hooks, Policy
from .errors import CallError
from .prompts import encode
from .transition.records import pipe_record_of
from .transition.verification import why_not_fast
from .warn import warn


def _policy_of(pipe: Any) -> Policy | None:
    record = pipe_record_of(pipe)
    return record.settings.policy if record is not None else None


@contextmanager
def _entered(pipe: Any) -> Iterator[None]:
    """Wait for who changes the UNet, refuse a second call of the same pipe, and see that the LCM-LoRA is in.

    Raises:
        CallError: another thread is calling this pipe: its scheduler serves one call at a time.
    """
    record = pipe_record_of(pipe)
    if record is None:  # restored since, or a pipe made of this one's parts
        yield
        return
    with record.gate.calling():
        if not record.running.acquire(blocking=False):
            styles = "{}" if record.baked else "styles"
            raise CallError(
                "another call of this pipe is running in another thread, and a scheduler serves one call at a time: "
                "give each thread a pipe of its own (copy.copy(pipe) shares the models and has its own scheduler), or "
                f"use `with lcmlora.styled(pipe, {styles})`, in which the others wait."
            )
        try:
            if (why := why_not_fast(pipe, record)) and why not in record.told:
                record.told.add(why)
                warn(f"this call runs without the LCM-LoRA: {why}.")
            yield
        finally:
            record.running.release()


def _encode(pipe: Any, encode_prompt: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    record = pipe_record_of(pipe)
    return encode(record.cache if record is not None else None, encode_prompt, pipe, args, kwargs)


def _saving(pipe: Any) -> None:
    """Say what `save_pretrained` makes of an accelerated pipe."""
    record = pipe_record_of(pipe)
    if record is None:
        return
    merged = all(module.content.merged for module in record.modules.values() if module.content.touched)
    what = "with the LCM-LoRA in it, and nothing that says so"
    what = what if merged else "with PEFT's names, which no loader takes"
    warn(
        f"save_pretrained writes this pipe {what}: lcmlora.bake(pipe, folder) writes one that knows how it is called"
        + ("." if record.baked else "; lcmlora.restore(pipe) first, and it is written as it was.")
    )


HOOKS = Hooks(_policy_of, _encode, _entered, _saving)
