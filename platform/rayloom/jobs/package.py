"""Which files of the working directory go to the cluster, and the archive that holds them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

from rayloom.errors import RequestError

# Left out wherever they are, besides what .gitignore and .rayignore name.
_NEVER = (".git", ".venv", "venv", "__pycache__")
_ZIP_BYTES_PER_FILE = 256


@dataclass(frozen=True)
class Package:
    """The files of a working directory that a job takes along."""

    folder: Path
    files: dict[str, int]
    """Size in bytes by path, relative to `folder`, with `/` on every system."""

    @property
    def size(self) -> int:
        """Bytes of the archive: Ray stores, it does not compress."""
        return sum(self.files.values()) + _ZIP_BYTES_PER_FILE * len(self.files)

    def holds(self, path: str) -> bool:
        """Whether the file, or anything of the folder, is in it."""
        clean = PurePosixPath(path)
        return any(clean == file or clean in file.parents for file in map(PurePosixPath, self.files))

    def write(self, archive: Path) -> None:
        """Write it as a zip file; the same files give the same bytes, so that Ray uploads them once."""
        with ZipFile(archive, "w", strict_timestamps=False) as file:
            for path in sorted(self.files):
                file.write(self.folder / path, path)


def collect_package(folder: Path, *, leave_out: tuple[str, ...] = ()) -> Package:
    """List what Ray would package, by its own rules: `.gitignore` and `.rayignore` of every folder count.

    Args:
        leave_out: folders, relative to `folder`, that stay behind too.

    Raises:
        RequestError: more than Ray can take, with the size and the largest entries.
    """
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes

    ignore_git = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") == "1"
    files: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path.stat().st_size

    patterns = [*_NEVER, *(f"/{PurePosixPath(name)}/" for name in leave_out)]
    try:
        _dir_travel(
            folder,
            [_get_excludes(folder, patterns)],
            note,
            include_gitignore=not ignore_git,
            logger=logging.getLogger(__name__),
        )
    except OSError as error:
        raise RequestError(f"{error.filename}: cannot be packaged: {error.strerror or error}") from None
    package = Package(folder, files)
    if package.size >= GCS_STORAGE_MAX_SIZE:
        raise RequestError(
            f"the working directory {folder} is too large for Ray Jobs: {_mib(package.size)}, and the limit is "
            f"{_mib(GCS_STORAGE_MAX_SIZE)}. Largest: {_largest(files)}. "
            "Name in a .rayignore file what the job does not need, or keep data where the cluster can read it and "
            "give its absolute path"
        )
    return package


def _largest(files: dict[str, int], count: int = 5) -> str:
    """The largest entries, no deeper than two levels."""
    sizes: Counter[str] = Counter()
    for path, size in files.items():
        sizes["/".join(path.split("/")[:2])] += size
    return ", ".join(f"{path} ({_mib(size)})" for path, size in sizes.most_common(count))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
