"""`model` of the job file -> weights, in memory, as the job asks for them.

    config.json -> class, positions -> tensors checked -> weights -> vocabulary -> what may train -> kernels

What `rayloom.models.check` can refuse it has refused before; what needs the model's class or the files' headers is
refused here, before the weights are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayloom.errors import RequestError, first_line
from rayloom.models.architecture import Architecture, read_architecture
from rayloom.models.attention import attention_implementation, check_shifted_attention, group_size
from rayloom.models.checkpoint import Differences, check_differences, compare, tensor_shapes
from rayloom.models.config import ModelConfig
from rayloom.models.experts import mark_expert_blocks, use_router_loss
from rayloom.models.kernels import apply_liger, load_unsloth
from rayloom.models.lean_layers import use_lean_layers
from rayloom.models.packed_attention import use_packed_attention
from rayloom.models.parts import freeze_parts
from rayloom.models.quantization import Quantized, loading_options, quantized_as, settle
from rayloom.models.rope import scale_rope
from rayloom.models.shifted_attention import use_shifted_attention
from rayloom.models.source import as_model, model_folder
from rayloom.models.vocabulary import grow_vocabulary
from rayloom.models.wide_products import use_wide_products


def load_causal_lm(
    model: ModelConfig | str,
    dtype: Any,
    *,
    tokenizer: Any = None,
    cutoff: int | None = None,
    seed: int = 0,
    batches_per_step: int = 1,
) -> Any:
    """A causal language model in `dtype`, without a KV cache (packed rows are kept apart only without one).

    Args:
        model: the job's `model`; a path alone loads that model as it is.
        dtype: `torch.dtype` of the weights; quantized ones compute in it.
        tokenizer: with the added tokens; None: the vocabulary stays as it is.
        cutoff: longest row, in tokens, for `rope_scaling` and `shifted_attention`; None: neither.
        seed: of new tokens' rows.
        batches_per_step: of all workers in one optimizer step, for the router's loss.

    Raises:
        RequestError: no such model, not a causal language model, or a checkpoint that is not the model's.
    """
    model = as_model(model)
    architecture = read_architecture(model)
    quantized = quantized_as(model, architecture)
    if model.rope_scaling and cutoff:
        scale_rope(architecture, model.rope_scaling, cutoff)
    try:
        loaded = _weights(model, architecture, quantized, dtype, cutoff)
    except (OSError, ValueError, ImportError) as error:
        raise RequestError(f"model.path: no model can be loaded from {model.path}: {first_line(error)}") from None
    if quantized is not None:
        settle(loaded, model, quantized, dtype)
    if tokenizer is not None:
        grow_vocabulary(loaded, tokenizer, model, seed=seed)
    if architecture.is_composite:
        freeze_parts(loaded)
    if model.moe_aux_loss is not None:
        use_router_loss(loaded, model.moe_aux_loss, batches_per_step=batches_per_step)
    if _is_zero3():
        mark_expert_blocks(loaded)
    if model.kernels == "liger":
        apply_liger(loaded)
    elif model.kernels == "none":
        use_lean_layers(loaded)
        use_wide_products(loaded)
    if model.shifted_attention and cutoff:
        use_shifted_attention(loaded, group_size(cutoff))
    elif model.attention == "auto":
        use_packed_attention(loaded)
    for config in (loaded.config, loaded.config.get_text_config(decoder=True)):
        config.use_cache = False
    return loaded


def _weights(
    model: ModelConfig, architecture: Architecture, quantized: Quantized | None, dtype: Any, cutoff: int | None
) -> Any:
    import transformers

    source = model_folder(model.path)
    if model.kernels == "unsloth":
        return load_unsloth(
            source,
            length=cutoff,
            dtype=dtype,
            four_bits=quantized is not None and quantized.method in ("nf4", "fp4"),
            trust_remote_code=model.trust_remote_code,
        )
    auto = getattr(transformers, architecture.auto_class)
    known = auto._model_mapping.get(type(architecture.config), None)  # None: it comes with the model
    if known is not None and not isinstance(known, tuple):
        # Of a composite model transformers may know a class for the language model alone, and then builds that one.
        of_text = isinstance(architecture.text, known.config_class)
        config = architecture.text if of_text else architecture.config
        if model.shifted_attention:
            check_shifted_attention(known, config)
        if Path(source).is_dir() and not model.train_from_scratch and not (quantized and quantized.in_checkpoint):
            _check_tensors(model, known, config, Path(source))
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": attention_implementation(model),
    }
    if model.train_from_scratch:
        if hasattr(architecture.config, "quantization_config"):
            del architecture.config.quantization_config
        return auto.from_config(architecture.config, **options)
    loaded, info = auto.from_pretrained(
        source,
        config=architecture.config,
        revision=model.revision or "main",
        use_safetensors=None if model.allow_pickle else True,
        output_loading_info=True,
        **options,
        **loading_options(model, quantized, dtype),
    )
    mismatched = (str(key[0]) for key in info["mismatched_keys"])
    check_differences(
        model,
        Differences(
            tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"])), tuple(sorted(mismatched))
        ),
    )
    return loaded


def _check_tensors(model: ModelConfig, model_class: Any, config: Any, folder: Path) -> None:
    """Compare the checkpoint's headers with the model on no device, where they are safetensors."""
    import torch
    from transformers import initialization

    if not any(folder.glob("model*.safetensors")):
        return
    with torch.device("meta"), initialization.meta_device_safe_creation_ops():
        empty = model_class(config)
    check_differences(model, compare(empty, tensor_shapes(folder)))


def _is_zero3() -> bool:
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())
