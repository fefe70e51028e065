"""Virtual tokens: prompt tuning, P-tuning, prefix tuning.

They stand before a row, so a row must hold one example (`data.packing: false`): PEFT gives the virtual tokens to the
row as a whole, and only its first example would see them.
"""

from __future__ import annotations

from typing import Any

import peft
import torch

from rayloom.methods.config import PrefixConfig, PromptConfig, PTuningConfig
from rayloom.methods.wrap import wrap


def attach_prompt(model: Any, method: PromptConfig, empty: bool) -> Any:
    """Virtual tokens before the input, each an embedding that trains."""
    config = peft.PromptTuningConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        num_virtual_tokens=method.virtual_tokens,
        prompt_tuning_init="TEXT" if method.init_text and not empty else "RANDOM",
        prompt_tuning_init_text=method.init_text if not empty else None,
        tokenizer_name_or_path=model.name_or_path if method.init_text and not empty else None,
    )
    return _follow_batches(wrap(model, config, "method", empty))


def attach_p_tuning(model: Any, method: PTuningConfig, empty: bool) -> Any:
    """Virtual tokens before the input, made by a network that trains."""
    size: Any = method.encoder_size
    config = peft.PromptEncoderConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        num_virtual_tokens=method.virtual_tokens,
        encoder_reparameterization_type=method.encoder.upper(),
        encoder_hidden_size=size,
        encoder_num_layers=method.encoder_layers,
        encoder_dropout=method.encoder_dropout,
    )
    return _follow_batches(wrap(model, config, "method", empty))


def attach_prefix(model: Any, method: PrefixConfig, empty: bool) -> Any:
    """Keys and values of virtual tokens in every layer, which train themselves or are made by a network that does."""
    size: Any = method.projection_size
    config = peft.PrefixTuningConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        num_virtual_tokens=method.virtual_tokens,
        prefix_projection=size is not None,
        encoder_hidden_size=size,
    )
    return wrap(model, config, "method", empty)


def stands_before_rows(model: Any) -> bool:
    """Whether the method puts something before a row, so that a row must hold one example."""
    config = getattr(model, "active_peft_config", None)
    return config is not None and bool(config.is_prompt_learning)


def virtual_tokens(model: Any) -> int:
    """How many hidden states stand before those of a row's own tokens. A prefix has none: it is in the cache."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or config.peft_type == peft.PeftType.PREFIX_TUNING:
        return 0
    return int(config.num_virtual_tokens)


def _follow_batches(model: Any) -> Any:
    """Let PEFT's forward take the batches of `rayloom.train.batch`.

    These have one row of labels, of the trained positions of all rows; PEFT puts the virtual tokens' labels before
    them, row by row. The loss reads `shift_labels`, so `labels` may have as many rows as it likes.
    """

    def spread(module: torch.nn.Module, arguments: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        inputs = {**inputs, "position_ids": None}  # PEFT would drop them too, with a warning: a row is one example
        if inputs.get("shift_labels") is not None and inputs.get("labels") is not None:
            inputs["labels"] = inputs["labels"].expand(len(inputs["input_ids"]), -1)
        return arguments, inputs

    model.register_forward_pre_hook(spread, with_kwargs=True)
    return model
