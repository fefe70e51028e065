"""What can be refused about `model` from the job file, `config.json` and the the packages, before weights load."""

from __future__ import annotations

from rayloom.errors import RequestError
from rayloom.models.architecture import Architecture, read_architecture
from rayloom.models.attention import check_attention, group_size
from rayloom.models.config import ModelConfig
from rayloom.models.experts import check_router_loss
from rayloom.models.kernels import check_kernels
from rayloom.models.quantization import Quantized, check_quantization, quantized_as
from rayloom.models.rope import needed_factor
from rayloom.models.source import check_model_path


def check_model(
    model: ModelConfig, *, cutoff: int, device: str | None = None, zero3: bool = False
) -> tuple[Architecture, Quantized | None]:
    """Refuse a model that cannot be loaded as the job asks. Returns what it is, and how its weights are quantized.

    Args:
        cutoff: longest row, in tokens.
        device: "cpu" or "gpu"; None: not known yet, so that what depends on it is not told.
        zero3: whether DeepSpeed shards the weights.

    Raises:
        RequestError: one of the checks of this room; none of them reads weights.
    """
    check_model_path(model)
    architecture = read_architecture(model)
    quantized = quantized_as(model, architecture)
    if quantized is not None:
        check_quantization(quantized, device=device, zero3=zero3)
    check_kernels(model, device=device, zero3=zero3)
    if model.rope_scaling:
        needed_factor(architecture, model.rope_scaling, cutoff)
    if model.shifted_attention:
        group_size(cutoff)
        if architecture.is_composite:
            raise RequestError(
                f"model.shifted_attention: {architecture.model_type} has parts beside its language model; "
                "it is for text models"
            )
    if model.moe_aux_loss is not None:
        check_router_loss(architecture)
    check_attention(model, device)
    return architecture, quantized
