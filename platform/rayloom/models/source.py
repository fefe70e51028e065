"""`model.path` -> what `from_pretrained` takes, and what can be refused about it without loading anything."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rayloom.errors import RequestError, first_line
from rayloom.models.config import ModelConfig
from rayloom.models.wheel import SCHEME, check_wheel_path, wheel_folder

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def as_model(model: ModelConfig | str) -> ModelConfig:
    """A path alone is a model with nothing else said about it."""
    return ModelConfig(path=model) if isinstance(model, str) else model


def model_folder(path: str) -> str:
    """What `from_pretrained` takes for `model.path`: a folder, or the hub name as it is."""
    if path.startswith(SCHEME):
        return str(wheel_folder(path))
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.is_dir() else path


def check_model_path(model: ModelConfig | str) -> None:
    """Refuse what cannot be a model, without loading anything.

    Raises:
        RequestError: a folder that is missing or lacks its config, tokenizer or weights, or whose weights lack a shard
            or are pickles; an unknown package; a name that is no hub name.
    """
    model = as_model(model)
    path = model.path
    if path.startswith(SCHEME):
        check_wheel_path(path)
        return
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_folder(model, folder)
        return
    looks_like_path = path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists()
    if looks_like_path or not _HUB_NAME.match(path):
        raise RequestError(f"model.path: no such model folder: {path}")


def _check_folder(model: ModelConfig, folder: Path) -> None:
    needed = {
        "config.json": ("config.json",),
        "weights (*.safetensors)": ("*.safetensors", "pytorch_model*.bin"),
        "tokenizer (tokenizer_config.json)": ("tokenizer_config.json", "tokenizer.json"),
    }
    if model.train_from_scratch:
        del needed["weights (*.safetensors)"]
    missing = [what for what, patterns in needed.items() if not any(any(folder.glob(one)) for one in patterns)]
    if missing:
        raise RequestError(f"model.path: the folder {model.path} has {_adapter_of(folder)}no {', no '.join(missing)}")
    _read_config(folder)
    if model.train_from_scratch:
        return
    if not any(folder.glob("*.safetensors")) and not model.allow_pickle:
        (name, *_) = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
        raise RequestError(
            f"model.path: the weights of {model.path} are a pickle ({name}), which can run code when it is read; "
            "convert them to safetensors, or say model.allow_pickle: true if you trust their source"
        )
    for index in _INDEXES:
        if (folder / index).is_file():
            _check_shards(model.path, folder / index)
            return


def _adapter_of(folder: Path) -> str:
    return "an adapter (adapter_config.json), but " if (folder / "adapter_config.json").is_file() else ""


def _check_shards(path: str, index: Path) -> None:
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"model.path: {path}: {index.name} is no index of weights: {error}") from None
    absent = sorted(file for file in files if not (index.parent / file).is_file())
    if absent:
        raise RequestError(
            f"model.path: {path} lacks {len(absent)} of its {len(files)} weight files: {some_names(absent)}"
        )


def raw_config(model: ModelConfig) -> dict[str, Any]:
    """A model's `config.json` as it is written; of a hub model it is fetched, and nothing else.

    Raises:
        RequestError: there is none that can be read.
    """
    source = model_folder(model.path)
    if Path(source).is_dir():
        return _read_config(Path(source))
    from transformers import PreTrainedConfig

    try:
        return dict(PreTrainedConfig.get_config_dict(source, revision=model.revision or "main")[0])
    except (OSError, ValueError) as error:
        raise RequestError(f"model.path: {model.path} has no usable config.json: {first_line(error)}") from None


def _read_config(folder: Path) -> dict[str, Any]:
    """Raises:
    RequestError: it is no JSON object.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"model.path: {file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise RequestError(f"model.path: {file} holds no JSON object")
    return config


def some_names(names: list[str], most: int = 3) -> str:
    """The first few of many names."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
