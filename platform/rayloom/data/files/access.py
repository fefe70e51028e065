"""Bytes of one file, by range: local or at an address that fsspec knows; tried again, and refused when it changed."""

from __future__ import annotations

import hashlib
import io
import os
import time
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from rayloom.errors import RequestError
from rayloom.remote import file_system, is_remote

RETRIES = (0.5, 2.0)
"""Seconds to wait before each further try of a read that failed."""

_SAMPLES, _SAMPLE_BYTES = 16, 4096
_TRUSTED_SECONDS = 30.0  # a remote file is not asked again whether it changed within this time

# What file systems call the thing that changes with an object's content, the surest first.
_STAMP_KEYS = ("ETag", "etag", "md5Hash", "blob_id", "generation", "checksum", "mtime", "LastModified",
               "last_modified", "updated", "last_commit", "created")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A file as it was when it was located."""

    address: str
    """What is opened: a local path, or an address with a scheme that fsspec knows."""
    size: int
    """Bytes."""
    stamp: str
    """When it was changed: the local file's time in ns, or what the remote system gives (its etag, for example)."""
    fingerprint: str
    """Changes when the content does. Of a local file: from its size and samples of its bytes, since a copy of it on
    another node has another time. Of a remote one: from its size and stamp."""
    retries: tuple[float, ...] = RETRIES


class Changed(Exception):  # noqa: N818 - it is news of the file; `read_range` makes the message
    """The file is not the one that was located."""


def find_source(address: str, retries: tuple[float, ...] = RETRIES) -> Source:
    """What a file is now.

    Raises:
        RequestError: there is none, or it cannot be read.
    """
    if is_remote(address):
        return remote_source(address, remote_info(address), retries)
    try:
        with open(address, "rb") as handle:
            status = os.fstat(handle.fileno())
            return Source(address, status.st_size, str(status.st_mtime_ns), _sample(handle.fileno()), retries)
    except FileNotFoundError:
        raise RequestError(f"{address}: no such data file") from None
    except OSError as error:
        raise RequestError(f"{address}: cannot be read: {error.strerror or error}") from None


def remote_info(address: str) -> dict[str, Any]:
    """What the file system says of an address.

    Raises:
        RequestError: nothing is there, or it cannot be asked.
    """
    files, path = file_system(address)
    try:
        return files.info(path)
    except FileNotFoundError as error:
        # Of the web's addresses also one whose server does not answer.
        why = f" ({reason(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
        raise RequestError(f"{address}: no such data file{why}") from None
    except Exception as error:  # each file system raises what its library does
        raise RequestError(f"{address}: cannot be read: {reason(error)}") from None


def remote_source(address: str, info: dict[str, Any], retries: tuple[float, ...] = RETRIES) -> Source:
    """A remote file from what its file system says of it.

    Raises:
        RequestError: the size is not known, so no part can be read by itself.
    """
    if info.get("size") is None:
        raise RequestError(f"{address}: the server does not say how large it is; download the file and name its path")
    stamp = _remote_stamp(info)
    digest = hashlib.blake2b(f"{info['size']} {stamp}".encode(), digest_size=16).hexdigest()
    return Source(address, int(info["size"]), stamp, digest, retries)


def read_range(source: Source, start: int, stop: int) -> bytes:
    """The bytes `start..stop` (at most to the end) of a file; a read that fails is tried again after `retries`.

    Raises:
        RequestError: the file changed since it was located, or cannot be read any more.
    """
    stop = min(stop, source.size)
    if start >= stop:
        return b""
    fetch = _fetch_remote if is_remote(source.address) else _fetch_local
    for pause in (*source.retries, None):
        try:
            data = fetch(source, start, stop)
            if len(data) == stop - start:
                return data
            problem = f"gave {len(data)} bytes where {stop - start} were asked for"
        except Changed:
            raise RequestError(f"{source.address}: changed while the job was reading it; start the job again") from None
        except Exception as error:  # each file system raises what its library does
            problem = reason(error)
        if pause is not None:
            time.sleep(pause)
    raise RequestError(f"{source.address}: cannot be read any more: {problem}")


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().split("\n")[0]


class RangeReader(io.RawIOBase):
    """A file object over `read_range`, for libraries that want one. `failure` is what a read raised, if one did."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._position = 0
        self.failure: RequestError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        try:
            data = read_range(self._source, self._position, self._position + len(buffer))
        except RequestError as error:
            self.failure = error
            raise
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _fetch_local(source: Source, start: int, stop: int) -> bytes:
    with open(source.address, "rb") as handle:
        status = os.fstat(handle.fileno())
        same = status.st_size == source.size and (
            str(status.st_mtime_ns) == source.stamp
            # A copy on another node has another time; it is taken for the same file if its content looks the same.
            or _sampled(source.address, status.st_mtime_ns, status.st_size) == source.fingerprint
        )
        if not same:
            raise Changed
        handle.seek(start)
        return handle.read(stop - start)


@lru_cache(maxsize=4096)
def _sampled(path: str, modified: int, size: int) -> str:
    """`_sample`, once for each state of a file."""
    with open(path, "rb") as handle:
        return _sample(handle.fileno())


def _sample(descriptor: int) -> str:
    """A digest of the size and of some places of a file: the whole of a small one."""
    size = os.fstat(descriptor).st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    if size <= _SAMPLES * _SAMPLE_BYTES:
        digest.update(os.pread(descriptor, size, 0))
    else:
        for number in range(_SAMPLES):
            digest.update(os.pread(descriptor, _SAMPLE_BYTES, (size - _SAMPLE_BYTES) * number // (_SAMPLES - 1)))
    return digest.hexdigest()


def _fetch_remote(source: Source, start: int, stop: int) -> bytes:
    files, path = file_system(source.address)
    _check_remote(source, int(time.monotonic() // _TRUSTED_SECONDS))
    # The asynchronous ones ask for the range alone; the others go through a file object, which must not read ahead.
    options = {} if files.async_impl else {"cache_type": "none"}
    return files.cat_file(path, start=start, end=stop, **options)


@lru_cache(maxsize=4096)
def _check_remote(source: Source, moment: int) -> None:
    """Ask the file system whether the file is the same; an answer holds for the `moment`, an exception is not kept."""
    files, path = file_system(source.address)
    info = files.info(path)
    # A listing may give more than this does: what is not said is not compared.
    key = source.stamp.partition("=")[0]
    if info.get("size") != source.size or (info.get(key) is not None and _remote_stamp(info, (key,)) != source.stamp):
        raise Changed


def _remote_stamp(info: dict[str, Any], keys: tuple[str, ...] = _STAMP_KEYS) -> str:
    """What tells one state of a remote file from another, as `key=value`; empty where the system says nothing."""
    for key in keys:
        value = info.get(key)
        if value is not None:
            # Some systems give one time in two forms.
            return f"{key}={value.timestamp() if isinstance(value, datetime) else value}"
    return ""
