"""Data sets of the Hugging Face hub: which files a subset and split have. The files are then read like any others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayloom.data.files.access import reason
from rayloom.errors import RequestError

_ASK_SECONDS = 10.0


def hub_addresses(name: str, subset: str | None, split: str, folder: str | None) -> list[str]:
    """The addresses of a data set's files, fixed to one revision, in the order that the data set gives them.

    Args:
        name: `org/name`, or a local folder that is laid out as a repository on the hub.

    Raises:
        RequestError: the hub cannot be reached (within seconds), or there is no such data set, subset or split.
    """
    revision = None if Path(name).is_dir() else _revision(name)
    from datasets import DownloadConfig, load_dataset_builder

    try:
        builder = load_dataset_builder(
            name, subset, data_dir=folder, revision=revision, download_config=DownloadConfig(max_retries=1)
        )
    except Exception as error:  # whatever makes the library give up is something about this data set
        raise RequestError(f"{name}: {' '.join(str(error).split()) or type(error).__name__}") from None
    splits: dict[str, Any] = {str(key): files for key, files in (builder.config.data_files or {}).items()}
    if not splits:
        raise RequestError(f"{name}: has no data files that can be read without running its script")
    if split not in splits:
        raise RequestError(f"{name}: has no split {split!r}; its splits are {', '.join(splits)}")
    return [str(address) for address in splits[split]]


def _revision(name: str) -> str | None:
    """The data set's present commit. This asks once, where the libraries would try for a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return HfApi().dataset_info(name, timeout=_ASK_SECONDS).sha
    except GatedRepoError:
        raise RequestError(
            f"{name}: is for registered users only; log in with `hf auth login` and ask on its page"
        ) from None
    except RepositoryNotFoundError:
        raise RequestError(
            f"{name}: no such data file, and no data set that you may read has that name on the Hugging Face hub"
        ) from None
    except Exception as error:  # of the network library's many kinds
        raise RequestError(
            f"{name}: no such data file here, and the Hugging Face hub cannot be reached: {reason(error)}"
        ) from None
