"""An adapter that was trained before: whether a folder holds one, and whether it is one of this model's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePath
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from rayloom.errors import RequestError, first_line
from rayloom.methods.names import short_list
from rayloom.methods.wrap import wrap
from rayloom.models.source import model_folder

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_HEAD_BYTES = 2**20
Shapes = dict[str, tuple[int, ...]]


def read_adapter_config(folder: str, key: str) -> Any:
    """The configuration of an adapter folder.

    Raises:
        RequestError: no such folder, no adapter in it, or only a pickle.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise RequestError(f"{key}: no such adapter folder: {folder}")
    if not (path / CONFIG).is_file():
        raise RequestError(f"{key}: the folder {folder} has no {CONFIG}; it holds no adapter")
    if not (path / WEIGHTS).is_file():
        if (path / PICKLE).is_file():
            raise RequestError(
                f"{key}: {folder} has its weights in {PICKLE}, a pickle, which can run code when it is loaded; "
                f"save it anew as {WEIGHTS}"
            )
        raise RequestError(f"{key}: the folder {folder} has no {WEIGHTS}")
    try:
        raw = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if raw["peft_type"] not in kinds:
            raise RequestError(f"{key}: {folder}: PEFT has no {raw['peft_type']!r}")
        return kinds[raw["peft_type"]].from_pretrained(str(path))
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{key}: {path / CONFIG} cannot be understood: {first_line(error)}") from None


def check_adapter(folder: str, key: str, model: Any, base: str) -> None:
    """Compare an adapter folder with the model that it is to be put on.

    Args:
        model: a skeleton of the model, without any adapter; it has one afterwards.
        base: `model.path` of the job.

    Raises:
        RequestError: it was trained on another base; tensors are missing, left over, or of another shape.
    """
    config = read_adapter_config(folder, key)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise RequestError(f"{key}: {folder} is {config.peft_type.value}, which is no part of the weights")
    trained_on = config.base_model_name_or_path
    config.inference_mode = False
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # values are of no interest here
    wrapped = wrap(model, config, key, empty=True)
    expected = _shapes(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    found = _stored_shapes(Path(folder).expanduser() / WEIGHTS, key)
    differing = [name for name in expected if name in found and found[name] != expected[name]]
    if differing:
        name = differing[0]
        raise RequestError(
            f"{key}: {folder} was trained on another base ({trained_on}): {name} is "
            f"{_size(found[name])}, and {base} needs {_size(expected[name])}"
        )
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    faults = [f"lacks {short_list(missing)}"] if missing else []
    faults += [f"has also {short_list(extra)}"] if extra else []
    if faults:
        raise RequestError(f"{key}: {folder} does not fit {base}: it {', and '.join(faults)}")
    if trained_on and not _same_base(trained_on, base):
        raise RequestError(
            f"{key}: {folder} was trained on {trained_on}, and model.path is {base}; if both are the same model, "
            f"write {base} as base_model_name_or_path into its {CONFIG}"
        )


def _same_base(trained_on: str, base: str) -> bool:
    """Whether two names can be the same model: the same last name, or folders that hold the same weights."""
    ours = model_folder(base)
    if PurePath(trained_on).name == PurePath(ours).name or trained_on == base:
        return True
    one, other = Path(trained_on).expanduser(), Path(ours)
    return one.is_dir() and other.is_dir() and _fingerprint(one) == _fingerprint(other)


def _fingerprint(folder: Path) -> list[tuple[str, int, str]]:
    """Name, size and a digest of the beginning and the end of each weight file; enough to tell two models apart."""
    result = []
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as handle:
            head = handle.read(_HEAD_BYTES)
            handle.seek(max(0, size - _HEAD_BYTES))
            result.append((file.name, size, hashlib.sha256(head + handle.read()).hexdigest()))
    return result


def _shapes(state: dict[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _stored_shapes(file: Path, key: str) -> Shapes:
    """Shapes from a file's header; no tensor is read."""
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{key}: {file} cannot be read: {first_line(error)}") from None


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
