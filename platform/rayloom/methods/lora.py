"""LoRA and what is built on it: rsLoRA, DoRA, PiSSA, OLoRA, LoftQ, several adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from rayloom.methods.config import LoraConfig
from rayloom.methods.lora_product import use_lean_products
from rayloom.methods.targets import peft_targets
from rayloom.methods.wrap import extra_modules, wrap
from rayloom.models.vocabulary import vocabulary_modules

_INIT: dict[str, bool | str] = {"default": True, "loftq": True}  # LoftQ replaces the usual start


def attach(model: Any, method: LoraConfig, new_tokens: Sequence[int], empty: bool) -> Any:
    """Merge the adapters of before, then let the last of them go on or put a new one on the frozen weights.

    Raises:
        RequestError: a target that PEFT cannot adapt.
    """
    model = _attach(model, method, new_tokens, empty)
    use_lean_products(model)
    return model


def _attach(model: Any, method: LoraConfig, new_tokens: Sequence[int], empty: bool) -> Any:
    if not empty:
        for folder in method.merged:
            model = peft.PeftModel.from_pretrained(model, folder, torch_device=str(model.device)).merge_and_unload()
    if method.continues:
        folder = method.adapters[-1]
        if not empty:
            device = str(model.device)
            return peft.PeftModel.from_pretrained(model, folder, is_trainable=True, torch_device=device)
        config = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        return wrap(model, config, "method.adapters", empty)
    model = wrap(model, lora_config(model, method, new_tokens, empty), "method.target", empty)
    if method.init == "loftq" and not empty:
        _make_up_for_quantization(model)
    return model


def lora_config(model: Any, method: LoraConfig, new_tokens: Sequence[int], empty: bool) -> peft.LoraConfig:
    """PEFT's configuration of a new adapter."""
    alpha: Any = 2 * method.rank if method.alpha is None else method.alpha
    init: Any = True if empty else _INIT.get(method.init, method.init)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    named = {name.rpartition(".")[2] for name, module in model.named_modules() if module in embeddings}
    ties = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    tied = ties and bool(named & set(method.extra_modules))
    modules, weights = peft_targets(model, method.target)
    return peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=method.rank,
        lora_alpha=alpha,
        lora_dropout=method.dropout,
        target_modules=modules,
        target_parameters=weights or None,
        trainable_token_indices={name: list(new_tokens) for name in vocabulary_modules(model)} if new_tokens else None,
        use_rslora=method.rslora,
        use_dora=method.dora,
        init_lora_weights=init,
        modules_to_save=extra_modules(model, method.extra_modules),
        ensure_weight_tying=tied,
    )


def _make_up_for_quantization(model: Any) -> None:
    """LoftQ's start (https://arxiv.org/abs/2310.08659) with the quantized weights as they are: the adapter begins as
    the best approximation, of its rank, of what quantization has taken from each weight.

    PEFT's own `replace_lora_weights_loftq` computes on CUDA only, and forgets that the product is scaled.
    """
    import bitsandbytes
    from peft.tuners.lora.bnb import Linear4bit
    from peft.utils.loftq_utils import _SafetensorLoader

    source = model.get_base_model().name_or_path
    original = _SafetensorLoader(model, source if Path(source).is_dir() else None)
    prefix = "base_model.model."
    layers: list[tuple[str, Any]] = [item for item in model.named_modules() if isinstance(item[1], Linear4bit)]
    for name, layer in layers:
        packed = layer.get_base_layer().weight
        kept = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state).float()
        lost = original.get_tensor(f"{name.removeprefix(prefix)}.weight").to(kept) - kept
        u, s, v = torch.linalg.svd(lost / layer.scaling["default"], full_matrices=False)
        rank, root = layer.r["default"], s.sqrt()
        with torch.no_grad():
            layer.lora_B["default"].weight.copy_(u[:, :rank] * root[:rank])
            layer.lora_A["default"].weight.copy_(root[:rank, None] * v[:rank])
