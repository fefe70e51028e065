"""Folders at addresses that fsspec knows, such as `s3://bucket/runs`: what is written there, read, listed and deleted.

Object storage has no folders and no renaming; a file is there when all of it is, and not before. So what counts is
always said by a file that is written last.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayloom.errors import RequestError, first_line

# Keys, endpoints and regions, as the storages' own libraries read them.
_VARIABLES = re.compile("^(AWS|FSSPEC|GOOGLE|GCSFS|AZURE|STORAGE)_")
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss"}
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://[^/]|^file:///")
_EXTRAS = {"s3": "s3", "s3a": "s3"}


def is_remote(address: str) -> bool:
    """Whether an address has a scheme, such as `s3://`."""
    return "://" in address


def file_system(address: str) -> tuple[Any, str]:
    """The fsspec file system of a remote address, and the path in it.

    Raises:
        RequestError: an unknown scheme, or one whose package is not installed.
    """
    import fsspec

    try:
        # Listings go stale: with them a changed file would not be noticed.
        return fsspec.core.url_to_fs(address, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        extra = _EXTRAS.get(address.partition("://")[0])
        hint = f"; pip install 'rayloom[{extra}]'" if extra and isinstance(error, ImportError) else ""
        raise RequestError(f"{address}: cannot be read here: {error}{hint}") from None


@dataclass(frozen=True)
class Remote:
    """A folder at an address. It takes the variables that give access (`AWS_*` and the like) along to the processes
    that it is sent to, where they are not set already: with its own bytes, not in a runtime environment, which Ray
    lists.

    Every method but `check` raises OSError, which names the address and the reason.
    """

    address: str
    """Without a slash at its end."""
    variables: tuple[tuple[str, str], ...] = field(repr=False, compare=False)

    @classmethod
    def at(cls, address: str) -> Remote:
        """The folder, with this process's variables."""
        found = {name: value for name, value in os.environ.items() if _VARIABLES.match(name)}
        return cls(address.rstrip("/"), tuple(sorted(found.items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.address, self.variables)

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.address}/{name}", self.variables)

    @property
    def path(self) -> str:
        """The path within its file system."""
        return str(file_system(self.address)[1]).rstrip("/")

    @property
    def arrow(self) -> Any:
        """Its file system as pyarrow, and so Ray Train, knows such things."""
        import pyarrow.fs

        return pyarrow.fs.PyFileSystem(_handler(self))

    def check(self, key: str) -> None:
        """Write a small file there and delete it again.

        Args:
            key: the key of the job file that gave the address.

        Raises:
            RequestError: it cannot be written; names the key, the address and the reason.
        """
        scheme = self.address.partition("://")[0]
        if scheme == "memory" or not _SCHEME.match(self.address):
            raise RequestError(f"{key}: {self.address}: is no address of a storage; say one like s3://BUCKET/FOLDER")
        probe = f".rayloom-{secrets.token_hex(4)}"
        try:
            self.write(probe, b"can it be written?\n")
            self.delete(probe)
        except RequestError as error:
            raise RequestError(*(f"{key}: {message}" for message in error.messages)) from None
        except OSError as error:
            raise RequestError(f"{key}: {error}; nothing was started") from None

    def names(self) -> set[str]:
        """What is in the folder, without its subfolders' content; empty where there is none."""
        with self._telling("listed"):
            files, path = file_system(self.address)
            try:
                found = files.ls(path, detail=False)
            except FileNotFoundError:
                return set()
            return {name.rstrip("/").rpartition("/")[2] for name in found} - {""}

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is no such file."""
        with self._telling("read"):
            files, path = file_system(self.address)
            try:
                return bytes(files.cat_file(f"{path}/{name}"))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Put a file there, in the place of one that was."""
        with self._telling("written"):
            files, path = file_system(self.address)
            _make_parent(files, f"{path}/{name}")
            files.pipe_file(f"{path}/{name}", content)

    def upload(self, folder: Path) -> None:
        """Write every file of a local folder there."""
        with self._telling("written"):
            files, path = file_system(self.address)
            for file in sorted(file for file in folder.rglob("*") if file.is_file()):
                target = f"{path}/{file.relative_to(folder).as_posix()}"
                _make_parent(files, target)
                files.put_file(str(file), target)

    def download(self, folder: Path) -> Path:
        """Read every file there into a local folder; the folder."""
        with self._telling("read"):
            files, path = file_system(self.address)
            folder.mkdir(parents=True, exist_ok=True)
            for name in files.find(path):
                target = folder / name[len(path) :].lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(name, str(target))
        return folder

    def delete(self, name: str = "") -> None:
        """Delete a file, or a folder with all that is in it, if there is one; without a name, the whole folder."""
        with self._telling("deleted"):
            files, path = file_system(self.address)
            with suppress(FileNotFoundError):
                files.rm(f"{path}/{name}".rstrip("/"), recursive=True)

    def move_to(self, other: Remote) -> None:
        """Put all that is there to another place of the same storage. None is deleted until every file is there."""
        with self._telling("moved"):
            files, path = file_system(self.address)
            for name in files.find(path):
                target = other.path + name[len(path) :]
                _make_parent(files, target)
                files.cp_file(name, target)
        self.delete()

    @contextmanager
    def _telling(self, done: str) -> Iterator[None]:
        """Say of any failure where it was: each file system raises what its library does."""
        try:
            yield
        except RequestError:
            raise
        except Exception as error:
            said = first_line(error) or type(error).__name__
            raise OSError(f"{self.address} cannot be {done}: {said}") from error


def _arrive(address: str, variables: tuple[tuple[str, str], ...]) -> Remote:
    """A `Remote` in another process, which gets the variables that it lacks."""
    for name, value in variables:
        os.environ.setdefault(name, value)
    return Remote(address, variables)


def _make_parent(files: Any, path: str) -> None:
    if not _has_no_folders(files):
        files.makedirs(path.rpartition("/")[0], exist_ok=True)


def _has_no_folders(files: Any) -> bool:
    """Whether it is object storage. There "making" a folder would make a bucket that is misspelt."""
    protocols = (files.protocol,) if isinstance(files.protocol, str) else files.protocol
    return not _OBJECT_STORES.isdisjoint(protocols)


def _handler(remote: Remote) -> Any:
    """What pyarrow calls, in this process or another."""
    import pyarrow.fs

    class Handler(pyarrow.fs.FSSpecHandler):
        def __reduce__(self) -> tuple[Any, ...]:
            return _handler, (remote,)

        def create_dir(self, path: str, recursive: bool) -> None:
            if not _has_no_folders(self.fs):
                super().create_dir(path, recursive)

    make: Callable[[Any], Any] = Handler
    return make(file_system(remote.address)[0])
