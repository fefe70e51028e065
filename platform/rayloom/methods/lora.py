"""LoRA and what is built on it: rsLoRA, DoRA, PiSSA, OLoRA, LoftQ, several adapters, LoRA+."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import peft
import torch

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


def loraplus_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    learning_rate: float,
    ratio: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354): B learns `ratio` times as fast.

    Args:
        named_parameters: of the model; those that do not train are passed over.
        learning_rate: of the A factors, and of everything that is neither A nor B and no vector.
        ratio: of the B factors' learning rate to that.
        weight_decay: of all matrices; vectors (biases, magnitudes of DoRA) have none.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, as torch's optimizers take them; none is empty. As in PEFT's
        `create_loraplus_optimizer`, vectors learn as fast as B; unlike there, none of them decays.
    """
    slow, fast, vectors = [], [], []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if len(_shape(parameter)) == 1:
            vectors.append(parameter)
        elif "lora_B" in name or "lora_embedding_B" in name:
            fast.append(parameter)
        else:
            slow.append(parameter)
    groups = [
        {"params": slow, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": fast, "lr": learning_rate * ratio, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate * ratio, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The whole parameter's shape, also where ZeRO-3 keeps only a shard of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)
