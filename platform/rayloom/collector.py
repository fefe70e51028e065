"""Python's cycle collector, off while libraries are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_off() -> Iterator[None]:
    """Let nothing be collected meanwhile, and what is there afterwards never be looked at again.

    An import makes hundreds of thousands of objects that stay, and the collector goes through them again and again:
    15 % of the time in which torch, transformers and PEFT are imported. Frozen, they also cost later collections
    nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
