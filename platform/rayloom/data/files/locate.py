"""From what the user names to data files: a file, a folder, a glob, a saved data set, an address, a hub name."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

from rayloom.data.files.access import (
    RETRIES,
    Source,
    file_system,
    find_source,
    is_remote,
    read_range,
    reason,
    remote_info,
    remote_source,
)
from rayloom.data.files.data_file import CHUNK_BYTES, MAX_CHUNKS, DataFile, Kind, Part
from rayloom.data.files.lines import BYTE_ORDER_MARK
from rayloom.data.files.unpack import unpacked
from rayloom.errors import RequestError

_ENDINGS: dict[str, tuple[Kind, str | None]] = {
    "jsonl": ("jsonl", None),
    "ndjson": ("jsonl", None),
    "txt": ("txt", None),
    "parquet": ("parquet", None),
    "arrow": ("arrow", None),
    "json": ("jsonl", "json"),
    "csv": ("jsonl", "csv"),
    "tsv": ("jsonl", "tsv"),
}
"""For each ending how the file is read, and how it is unpacked before that."""
_COMPRESSED = ("jsonl", "ndjson", "txt", "json", "csv", "tsv")
_KNOWN = "known are .jsonl, .ndjson, .json, .csv, .tsv, .txt (each also with .gz or .zst), .parquet and .arrow"

# JSON files that lie beside the data and say something about it.
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_AT_ONCE = 16  # files that are looked into at the same time: most of that is waiting
_SMALL_BYTES = 1 << 20


def locate(
    path: str,
    *,
    subset: str | None = None,
    split: str = "train",
    folder: str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    retries: tuple[float, ...] = RETRIES,
) -> tuple[DataFile, ...]:
    """The files of a data set, cut into chunks, without reading their rows (but see `rayloom.data.files.unpack`).

    Args:
        path: A file, a folder (all data files in it and below, sorted by path), a glob, a folder that `datasets`
            saved, an address with a scheme, or (where nothing of that name is here) a data set `org/name` on the
            Hugging Face hub. A folder whose README.md names `configs` is read like a data set on the hub.
        subset: Configuration of a hub data set.
        split: Split of a hub data set or a saved one; other folders and files have none.
        folder: Folder within `path` to read.
        chunk_bytes: Bytes of a chunk in files of lines.
        retries: Seconds to wait before each new try when a read of these files fails.

    Raises:
        RequestError: nothing is there, it is of an unknown kind, it cannot be read, or it has no row.
    """
    sources = _find(path, subset, split, folder, retries)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        files = [file for file in pool.map(lambda source: describe(source, chunk_bytes), sources) if file.chunks]
    if all(_is_blank(file) for file in files):
        raise RequestError(f"{path}: is empty; a data set needs at least one row")
    return tuple(files)


def describe(source: Source, chunk_bytes: int = CHUNK_BYTES) -> DataFile:
    """A file cut into chunks.

    Raises:
        RequestError: an unknown ending, or a file that cannot be unpacked or whose index cannot be read.
    """
    kind, how = _read_as(source.address)
    if kind == "parquet" or kind == "arrow":
        return _describe_table(source, kind)
    lines = unpacked(source, how) if how else source
    chunk_bytes = max(chunk_bytes, -(-lines.size // MAX_CHUNKS))
    return DataFile(
        address=source.address,
        kind=kind,
        path=lines.address,
        size=lines.size,
        chunks=-(-lines.size // chunk_bytes),
        chunk_rows=None,
        fingerprint=source.fingerprint,
        source=source,
        chunk_bytes=chunk_bytes,
        unpack=how,
    )


def _describe_table(source: Source, kind: Kind) -> DataFile:
    from rayloom.data.files.tables import arrow_parts, parquet_parts

    parts: tuple[Part, ...] = ()
    headers: tuple[Part, ...] = ()
    rows: tuple[int, ...] = ()
    if kind == "parquet" and source.size:
        parts = parquet_parts(source)
        rows = tuple(part.length for part in parts)
    elif source.size:
        parts, rows, headers = arrow_parts(source)
    return DataFile(
        address=source.address,
        kind=kind,
        path=source.address,
        size=source.size,
        chunks=len(parts),
        chunk_rows=rows,
        fingerprint=source.fingerprint,
        source=source,
        parts=parts,
        headers=headers,
    )


def _read_as(address: str) -> tuple[Kind, str | None]:
    """The kind of a file by its ending, and how it is unpacked.

    Raises:
        RequestError: an unknown ending.
    """
    name = PurePath(address.partition("?")[0] if is_remote(address) else address).name
    *_, before, last = ["", "", *name.lower().split(".")[1:]]
    if last in _ENDINGS:
        return _ENDINGS[last]
    if last in ("gz", "zst") and before in _COMPRESSED:
        kind, how = _ENDINGS[before]
        return kind, f"{how or kind}.{last}"
    ending = PurePath(address).suffix or "a file without an ending"
    raise RequestError(f"{address}: cannot read {ending}; {_KNOWN}")


def _is_data(address: str) -> bool:
    if PurePath(address).name in _NO_DATA:
        return False
    try:
        _read_as(address)
    except RequestError:
        return False
    return True


def _is_blank(file: DataFile) -> bool:
    """Whether a file surely has no row. A large one is taken to have some."""
    if file.chunk_rows is not None or file.size > _SMALL_BYTES:
        return False
    source = lines_source(file)
    return not read_range(source, 0, file.size).removeprefix(BYTE_ORDER_MARK).strip()


def lines_source(file: DataFile) -> Source:
    """The lines of a file on this machine: itself, or what is unpacked from it.

    Raises:
        RequestError: what is unpacked here is not what was unpacked where the file was located.
    """
    if file.unpack is None:
        return file.source
    source = unpacked(file.source, file.unpack)
    if source.size != file.size:
        raise RequestError(f"{file.address}: changed while the job was reading it; start the job again")
    return source


# --- what a name means ------------------------------------------------------------------------------------------------


def _find(path: str, subset: str | None, split: str, folder: str | None, retries: tuple[float, ...]) -> list[Source]:
    path = path.removeprefix("file://")
    if is_remote(path):
        return _find_remote(path, split, folder, retries)
    local = Path(path).expanduser()
    if not local.exists():
        if glob.has_magic(path):
            found = sorted(name for name in glob.glob(str(local), recursive=True) if os.path.isfile(name))
            return _sources([name for name in found if _is_data(name)], path, "no data file matches", retries)
        if _HUB_NAME.fullmatch(path) and not _is_data(path):
            from rayloom.data.files.hub import hub_addresses

            return _sources(hub_addresses(path, subset, split, folder), path, "no data file in", retries)
        raise RequestError(f"{path}: no such data file")
    if not local.is_dir():
        return [find_source(str(local), retries)]
    if subset is not None or _names_configs(local):
        from rayloom.data.files.hub import hub_addresses

        return _sources(hub_addresses(str(local), subset, split, folder), path, "no data file in", retries)
    local = local / folder if folder else local
    names = _saved_shards(str(local), split)
    if names is None:
        names = sorted(
            str(file)
            for file in local.rglob("*")
            if file.is_file() and _is_data(str(file)) and not _is_hidden(file.relative_to(local))
        )
    return _sources(names, str(local), "no data file in", retries)


def _find_remote(path: str, split: str, folder: str | None, retries: tuple[float, ...]) -> list[Source]:
    files, inside = file_system(path)
    try:
        if glob.has_magic(path) and not path.startswith("http"):  # in a web address `?` is no wildcard
            found = files.glob(inside, detail=True)
        else:
            info = {"type": "file"} if path.startswith("http") else remote_info(path)
            if info.get("type") != "directory":
                return [find_source(path, retries)]
            path = path.rstrip("/") + (f"/{folder}" if folder else "")
            names = _saved_shards(path, split)
            if names is not None:
                return _sources(names, path, "no data file in", retries)
            inside = file_system(path)[1]
            found = files.find(inside, detail=True)
    except RequestError:
        raise
    except Exception as error:  # each file system raises what its library does
        raise RequestError(f"{path}: cannot be listed: {reason(error)}") from None
    chosen = [
        (files.unstrip_protocol(name), info)
        for name, info in sorted(found.items())
        if info.get("type") == "file" and _is_data(name) and not _is_hidden(PurePath(name[len(inside.split("*")[0]) :]))
    ]
    if not chosen:
        raise RequestError(f"{path}: no data file in it; {_KNOWN}")
    return [remote_source(address, info, retries) for address, info in chosen]


def _sources(addresses: Sequence[str], path: str, nothing: str, retries: tuple[float, ...]) -> list[Source]:
    if not addresses:
        raise RequestError(f"{path}: {nothing} it; {_KNOWN}")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda address: find_source(address, retries), addresses))


def _is_hidden(inside: PurePath) -> bool:
    return any(part.startswith(".") for part in inside.parts)


def _names_configs(folder: Path) -> bool:
    """Whether a folder is laid out as a data set repository: its README.md begins with YAML that names `configs`."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    head = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return head is not None and re.search(r"^configs:", head[1], re.MULTILINE) is not None


def _saved_shards(folder: str, split: str) -> list[str] | None:
    """The Arrow files of a folder that `datasets.save_to_disk` wrote; None: it is no such folder.

    Raises:
        RequestError: it has other splits than `split`.
    """
    splits = _read_json(f"{folder}/dataset_dict.json")
    if splits is not None:
        if split not in splits["splits"]:
            raise RequestError(f"{folder}: has no split {split!r}; its splits are {', '.join(splits['splits'])}")
        folder = f"{folder}/{split}"
    state = _read_json(f"{folder}/state.json")
    if state is None or "_data_files" not in state:
        return None
    return [f"{folder}/{entry['filename']}" for entry in state["_data_files"]]


def _read_json(address: str) -> dict[str, Any] | None:
    """A small JSON file; None: there is none that can be read."""
    try:
        source = find_source(address, retries=())
        return json.loads(read_range(source, 0, source.size))
    except (RequestError, ValueError):
        return None
