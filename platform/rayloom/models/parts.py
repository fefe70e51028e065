"""The parts of a composite model: what speaks, what sees, what hears, and what stands between them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

Part = Literal["language", "projector", "vision", "audio"]
LANGUAGE: tuple[Part, ...] = ("language",)
_MODALITIES: tuple[tuple[str, Part], ...] = (("image", "vision"), ("video", "vision"), ("audio", "audio"))


def parts_of(model: Any) -> dict[str, Part]:
    """For every parameter, by its name, the part that it belongs to.

    The language model is what transformers calls the decoder, with the input embeddings and the output layer; vision
    and audio are its encoders; all that is in none of them leads from one to another: the projector.
    """
    owners: dict[int, Part] = {}

    def own(module: Any, part: Part) -> None:
        for parameter in module.parameters():
            owners.setdefault(id(parameter), part)

    for modality, part in _MODALITIES:
        encoder = model.get_encoder(modality=modality)
        if encoder is not None and encoder is not model and encoder is not model.base_model:
            own(encoder, part)
    for module in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            own(module, "language")
    return {name: owners.get(id(parameter), "projector") for name, parameter in model.named_parameters()}


def freeze_parts(model: Any, train: Collection[Part] = LANGUAGE) -> None:
    """Let only the parts of `train` train: the examples are texts, so the others would get no gradient."""
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        if parts[name] not in train:
            parameter.requires_grad_(False)


def frozen_modules(model: Any, train: Collection[Part] = LANGUAGE) -> list[str]:
    """Names of the largest modules that hold nothing to train: where a method must not put adapters."""
    if model.config.get_text_config(decoder=True) is model.config:
        return []  # it is a language model and nothing else, whatever stands between its decoder and its output layer
    parts = parts_of(model)
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name == one or name.startswith(f"{one}.") for one in found):
            continue
        own = [parts[f"{name}.{inner}"] for inner, _ in module.named_parameters() if f"{name}.{inner}" in parts]
        if own and not any(part in train for part in own):
            found.append(name)
    return found
