"""`rayloom models`: the families, and what is known of one model without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from rayloom.errors import RequestError
from rayloom.models.config import ModelConfig
from rayloom.models.families import Family, families, family_of
from rayloom.models.source import check_model_path, model_folder
from rayloom.models.wheel import SCHEME


def family_rows() -> Iterator[tuple[str, str, str, str]]:
    """For each family its name, the patterns of its models' names, its template, and what is particular."""
    for family in families().values():
        yield family.name, ", ".join(family.models), family.template or "-", "; ".join(_remarks(family))


def model_facts(name: str) -> list[tuple[str, str]]:
    """What is known of a model or family: of a name what its family says, of a folder also what its files say.

    Raises:
        RequestError: neither a family, nor a name that belongs to one, nor a model folder.
    """
    is_here = name.startswith(SCHEME) or Path(name).expanduser().is_dir()
    facts = _file_facts(name) if is_here else []
    model_type = dict(facts).get("type")
    by_name = {family.name.lower(): family for family in families().values()}
    family = by_name.get(name.lower()) or family_of(name, model_type)
    if family is None and not is_here:
        raise RequestError(
            f"no family is known for {name!r}; `rayloom models` lists them, and a model folder tells more"
        )
    return [*_family_facts(family), *facts]


def _family_facts(family: Family | None) -> Iterator[tuple[str, str]]:
    if family is None:
        yield "family", "none that Rayloom knows; it trains all the same"
        return
    yield "family", family.name
    yield "names", ", ".join(family.models)
    yield "model types", ", ".join(family.types)
    yield "template", family.template or "each model brings its own"
    for remark in _remarks(family):
        yield "note", remark


def _remarks(family: Family) -> list[str]:
    code = ["needs model.trust_remote_code: true"] if family.code else []
    return [*code, *([family.note] if family.note else [])]


def _file_facts(path: str) -> list[tuple[str, str]]:
    from rayloom.models.architecture import read_architecture
    from rayloom.models.checkpoint import tensor_shapes

    model = ModelConfig(path=path, allow_pickle=True)
    check_model_path(model)
    folder = Path(model_folder(path))
    architecture = read_architecture(model)
    text = architecture.text
    facts = [
        ("type", architecture.model_type),
        ("class", f"{(architecture.config.architectures or ['not said'])[0]}, loaded by {architecture.auto_class}"),
        ("layers", f"{_or_dash(text, 'num_hidden_layers')}, width {_or_dash(text, 'hidden_size')}"),
        ("vocabulary", _or_dash(text, "vocab_size")),
        ("length", f"{architecture.length:,} tokens" if architecture.length else "not limited"),
        ("positions", "rotary; rope_scaling works" if architecture.has_rope else "not rotary; no rope_scaling"),
    ]
    if architecture.experts:
        facts.append(("experts", str(architecture.experts)))
    if architecture.is_composite:
        facts.append(("parts", "more than text; only the language model trains"))
    if architecture.quantization:
        facts.append(("quantized", str(architecture.quantization.get("quant_method", "bitsandbytes"))))
    elif any(folder.glob("model*.safetensors")):
        facts.append(("parameters", f"{sum(prod(shape) for shape in tensor_shapes(folder).values()):,}"))
    return facts


def _or_dash(config: Any, name: str) -> str:
    value = getattr(config, name, None)
    return f"{value:,}" if isinstance(value, int) else str(value or "-")
