"""`model.path` -> a folder, a tokenizer, weights."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from rayloom.errors import RequestError
from rayloom.models.wheel import SCHEME, check_wheel_path, wheel_folder

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def check_model_path(path: str) -> None:
    """Refuse what cannot be a model, without loading anything.

    Raises:
        RequestError: a folder that is missing or has no config, tokenizer or weights; an unknown package.
    """
    if path.startswith(SCHEME):
        check_wheel_path(path)
        return
    folder = Path(path).expanduser()
    if folder.is_dir():
        missing = [
            what
            for what, patterns in (
                ("config.json", ("config.json",)),
                ("weights (*.safetensors)", _WEIGHTS),
                ("tokenizer (tokenizer_config.json)", ("tokenizer_config.json", "tokenizer.json")),
            )
            if not any(any(folder.glob(pattern)) for pattern in patterns)
        ]
        if missing:
            raise RequestError(f"model.path: the folder {path} has no {', no '.join(missing)}")
        return
    looks_like_path = path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists()
    if looks_like_path or not _HUB_NAME.match(path):
        raise RequestError(f"model.path: no such model folder: {path}")


def model_folder(path: str) -> str:
    """What `from_pretrained` takes for `model.path`: a folder, or the hub name as it is."""
    if path.startswith(SCHEME):
        return str(wheel_folder(path))
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.is_dir() else path


@lru_cache(maxsize=4)
def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model, shared within the process: nobody changes it.

    Raises:
        RequestError: none can be loaded, or it is not a fast one (whose character offsets the loss mask needs).
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_folder(path))
    except (OSError, ValueError) as error:
        raise RequestError(f"model.path: no tokenizer can be loaded from {path}: {_first_line(error)}") from None
    if not tokenizer.is_fast:
        raise RequestError(f"model.path: {path} has only a slow tokenizer; Rayloom needs a tokenizer.json")
    return tokenizer


def pad_token(tokenizer: Any) -> int:
    """A token for the padding, which nothing attends to: the tokenizer's own, else its end of sequence, else 0."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def load_causal_lm(path: str, dtype: Any) -> Any:
    """A causal language model in `dtype`, without a KV cache (packed rows are kept apart only without one).

    Raises:
        RequestError: no such model, or not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(model_folder(path), dtype=dtype)
    except (OSError, ValueError) as error:
        raise RequestError(f"model.path: no model can be loaded from {path}: {_first_line(error)}") from None
    model.config.use_cache = False
    return model


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
