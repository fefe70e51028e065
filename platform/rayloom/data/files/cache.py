"""What was read last, kept in memory: callers come back to a chunk for other rows of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, TypeVar

CACHE_BYTES = 64 << 20

T = TypeVar("T")


class RecentlyRead:
    """Values by key, the last used ones up to `capacity` bytes; the newest stays whatever its size."""

    def __init__(self, capacity: int = CACHE_BYTES) -> None:
        self._capacity = capacity
        self._bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, read: Callable[[], tuple[T, int]]) -> T:
        """The value of `key`; where it is not kept, `read` gives it and its size in bytes.

        Two threads that miss the same key at once both read it.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        value, size = read()
        with self._lock:
            self._bytes += size - self._kept.pop(key, (None, 0))[1]
            self._kept[key] = (value, size)
            while self._bytes > self._capacity and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1][1]
        return value


RECENTLY_READ = RecentlyRead()
"""This process's. It holds what can be read again, so nothing depends on it but the time."""
