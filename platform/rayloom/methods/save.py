"""What a method must do so that the saved folder is whole: it loads in transformers and PEFT by itself.

The trainer saves the model as PEFT or transformers do. Two things it does not know: a start that took a part out of the
model's own weights (PiSSA, OLoRA) must be turned back into plain LoRA, and where adapters of before were merged, the
weights under the new one are no longer those of the base that its configuration names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rayloom.methods.adapter_folder import CONFIG
from rayloom.methods.config import MERGED_BASE, LoraConfig, MethodConfig

_TRAINED = "trained.safetensors"


def keep_start(model: Any, method: MethodConfig, folder: Path) -> None:
    """Write the adapter as it is before training, where the end needs it. On rank 0, right after attaching."""
    if isinstance(method, LoraConfig) and method.changes_base:
        model.save_pretrained(folder)


def finish_saved(
    model: Any, method: MethodConfig, saved: Path, start: Path, *, tokenizer: Any = None, place: str | None = None
) -> None:
    """Make what the trainer saved whole. On rank 0, after training; the model is of no use afterwards.

    Args:
        saved: the folder that the trainer has saved the model to.
        start: where `keep_start` wrote.
        tokenizer: goes with the weights that merged adapters have become part of, so that a job can begin at them.
        place: the address that the folder will be copied to, if it will.
    """
    if not isinstance(method, LoraConfig):
        return
    if method.changes_base:
        model.save_pretrained(saved, path_initial_model_for_weight_conversion=str(start))
    if method.merged:
        base = saved / MERGED_BASE
        model.unload().save_pretrained(base)
        if tokenizer is not None:
            tokenizer.save_pretrained(base)
        config = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = f"{place or saved.absolute()}/{MERGED_BASE}"
        (saved / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_trained(model: Any, folder: Path) -> None:
    """Write what trains of virtual tokens; of other methods nothing. PEFT saves only what the network behind them
    makes, from which training could not go on."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return
    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / _TRAINED)


def load_trained(model: Any, folder: Path) -> bool:
    """Read what `save_trained` wrote, if it did; whether there was anything."""
    file = folder / _TRAINED
    if not file.is_file():
        return False
    stored = load_file(file)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(stored[name])
    return True
