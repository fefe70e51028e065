"""From `config.json` alone: the model's class, and what it can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayloom.errors import RequestError, first_line
from rayloom.models.causal import why_not_causal
from rayloom.models.config import ModelConfig
from rayloom.models.source import model_folder, raw_config


@dataclass(frozen=True)
class Architecture:
    """What a model is, before any of its weights are read."""

    config: Any
    """Its `PreTrainedConfig`."""
    auto_class: str
    """Name of the auto class of transformers that builds it: AutoModelForCausalLM, AutoModelForImageTextToText, ..."""
    quantization: dict[str, Any] | None
    """`quantization_config` of a checkpoint whose weights are quantized already."""

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def text(self) -> Any:
        """The configuration of the language model; the whole one where the model is nothing else."""
        return self.config.get_text_config(decoder=True)

    @property
    def is_composite(self) -> bool:
        """Whether there are parts beside the language model, such as a vision tower."""
        return self.text is not self.config

    @property
    def length(self) -> int | None:
        """Tokens that the model was made for; None where it has no limit."""
        length = getattr(self.text, "max_position_embeddings", None)
        return int(length) if length else None

    @property
    def has_rope(self) -> bool:
        """Whether its positions are rotary and can be scaled."""
        return bool(getattr(self.text, "rope_parameters", None))

    @property
    def experts(self) -> int:
        """Experts of a layer; 0 where there are none."""
        names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
        return next((int(n) for name in names if (n := getattr(self.text, name, None))), 0)

    @property
    def has_router_loss(self) -> bool:
        """Whether the model computes a loss of its router."""
        return hasattr(self.text, "router_aux_loss_coef") and hasattr(self.text, "output_router_logits")


def read_architecture(model: ModelConfig) -> Architecture:
    """Read `config.json`, of a hub model after fetching that one file.

    Raises:
        RequestError: there is none, its model type is unknown or needs code of its own that is not allowed, or the
            model is no causal language model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    source = model_folder(model.path)
    options = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}
    try:
        raw = raw_config(model)
        model_type, remote = raw.get("model_type"), raw.get("auto_map") or {}
        if model_type not in CONFIG_MAPPING_NAMES:
            _check_remote_code(model, model_type, remote)
        config = AutoConfig.from_pretrained(source, **options)
    except RequestError:
        raise
    except Exception as error:  # a config may hold anything, and its own code may do anything
        raise RequestError(f"model.path: {model.path} has no usable config.json: {first_line(error)}") from None
    return Architecture(config, _auto_class(model, config, remote), raw.get("quantization_config"))


def _check_remote_code(model: ModelConfig, model_type: Any, remote: dict[str, Any]) -> None:
    """Raise for a model type that transformers does not know, unless the model's own code may run."""
    import transformers

    if not remote:
        kind = f"model type {model_type!r}" if model_type else "model without a model_type in its config.json"
        raise RequestError(f"model.path: {model.path}: transformers {transformers.__version__} knows no {kind}")
    if not model.trust_remote_code:
        raise RequestError(
            f"model.path: {model.path} (type {model_type}) needs Python code that comes with the model; "
            "say model.trust_remote_code: true if you trust its authors"
        )


def _auto_class(model: ModelConfig, config: Any, remote: dict[str, Any]) -> str:
    """Which auto class builds the model: the one that knows the checkpoint's own class, else the model type."""
    from transformers.models.auto import modeling_auto

    classes = {
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    refusal = why_not_causal({**config.to_dict(), "model_type": config.model_type})
    if refusal is not None:
        raise RequestError(f"model.path: {model.path} {refusal}")
    mapped = {name: mapping[config.model_type] for name, mapping in classes.items() if config.model_type in mapping}
    own = (getattr(config, "architectures", None) or [None])[0]
    for name, class_name in mapped.items():
        if own in (class_name if isinstance(class_name, tuple) else (class_name,)):
            return name
    if model.trust_remote_code:
        for name in classes:
            if name in remote:
                return name
    for name in mapped:
        return name
    raise RequestError(
        f"model.path: {model.path} (type {config.model_type}) is no causal language model; Rayloom cannot train it"
    )
