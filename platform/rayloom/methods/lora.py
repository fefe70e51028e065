"""LoRA and what is built on it: rsLoRA, DoRA, PiSSA, OLoRA, LoftQ, several adapters."""

from __future__ import annotations

from typing import Any

import peft

from rayloom.methods.config import LoraConfig
from rayloom.methods.wrap import extra_modules, peft_target, wrap

_INIT: dict[str, bool | str] = {"default": True, "loftq": True}  # LoftQ replaces the usual start


def attach(model: Any, method: LoraConfig, empty: bool) -> Any:
    """Merge the adapters of before, then let the last of them go on or put a new one on the frozen weights.

    Raises:
        RequestError: a target that PEFT cannot adapt.
    """
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
    model = wrap(model, lora_config(model, method, empty), "method.target", empty)
    if method.init == "loftq" and not empty:
        from peft.utils.loftq_utils import replace_lora_weights_loftq

        replace_lora_weights_loftq(model)
    return model


def lora_config(model: Any, method: LoraConfig, empty: bool) -> peft.LoraConfig:
    """PEFT's configuration of a new adapter."""
    alpha: Any = 2 * method.rank if method.alpha is None else method.alpha
    init: Any = True if empty else _INIT.get(method.init, method.init)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    named = {name.rpartition(".")[2] for name, module in model.named_modules() if module in embeddings}
    tied = model.config.get_text_config().tie_word_embeddings and bool(named & set(method.extra_modules))
    return peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=method.rank,
        lora_alpha=alpha,
        lora_dropout=method.dropout,
        target_modules=peft_target(method.target),
        use_rslora=method.rslora,
        use_dora=method.dora,
        init_lora_weights=init,
        modules_to_save=extra_modules(model, method.extra_modules),
        ensure_weight_tying=tied,
    )
