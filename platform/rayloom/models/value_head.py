"""A head that gives every position a value: for reward models and the critic of PPO.

One format: `value_head.safetensors` with `v_head.summary.weight` (1, width) and `v_head.summary.bias` (1,) in float32,
the names that TRL and LlamaFactory gave it, so that their heads load here and ours load there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from rayloom.errors import RequestError

FILE = "value_head.safetensors"
_MODEL = "model.safetensors"
_PREFIX = "v_head.summary."


class ValueHead(torch.nn.Module):
    """(batch, length, width) hidden states -> (batch, length) values, in float32 whatever the model computes in."""

    def __init__(self, width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(dropout)
        self.summary = torch.nn.Linear(width, 1, dtype=torch.float32)
        torch.nn.init.normal_(self.summary.weight, std=1 / (width + 1) ** 0.5)  # InstructGPT's reward heads
        torch.nn.init.zeros_(self.summary.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            states = self.dropout(hidden_states.to(self.summary.weight.dtype))
            return self.summary(states).squeeze(-1).float()


def value_head_for(model: Any) -> ValueHead:
    """A new head for a language model, whose hidden states' width it takes."""
    return ValueHead(int(model.config.get_text_config(decoder=True).hidden_size))


def attach_value_head(model: Any) -> ValueHead:
    """Put a new head on a model, PEFT's or its own: what it returns as `logits` are values now, (batch, kept, 1).

    The head is a part of the model, `model.v_head`, and what it computes is a part of the model's output, so DDP and
    DeepSpeed treat it as they treat the rest. The output layer still runs: its hook is where every model has its last
    hidden states, after which each may do something else with the logits.
    """
    head = value_head_for(model)
    output_layer = model.get_output_embeddings()
    device = output_layer.weight.device
    model.v_head = head if device.type == "meta" else head.to(device)
    if not _is_tied(model):
        output_layer.requires_grad_(False)  # nothing comes back through it
    found: list[torch.Tensor] = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found[:] = [head(inputs[0])]

    def answer(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        output.logits = found.pop().unsqueeze(-1)
        return output

    output_layer.register_forward_hook(look)
    model.register_forward_hook(answer)
    return head


@dataclass
class CriticOutput(ModelOutput):
    """A type of its own, because DDP takes outputs apart and puts them together again."""

    logits: torch.Tensor | None = None
    """(batch, kept, vocabulary)"""
    state_values: torch.Tensor | None = None
    """(batch, kept) in float32"""


def attach_critic(model: Any) -> ValueHead:
    """Put a new head beside the output layer of a model, PEFT's or its own, which returns a `CriticOutput` then, both
    from the same hidden states. It begins at 0: nothing is known of any state.

    Part of the model and its output as in `attach_value_head`.
    """
    head = value_head_for(model)
    torch.nn.init.zeros_(head.summary.weight)
    output_layer = model.get_output_embeddings()
    model.v_head = head.to(output_layer.weight.device)
    found: list[torch.Tensor] = []

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found[:] = [head(inputs[0])]

    def answer(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        return CriticOutput(logits=output.logits, state_values=found.pop())

    output_layer.register_forward_hook(look)
    model.register_forward_hook(answer)
    return head


def without_value_head(model: Any, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
    """The weights that are to be saved as the model's own: all but the head's, which has its own file.

    Args:
        state_dict: what is to be saved; None: all of the model, of which PEFT takes its own part by itself.
    """
    if state_dict is None:
        if hasattr(model, "peft_config"):
            return None
        state_dict = model.state_dict()
    return {name: tensor for name, tensor in state_dict.items() if "v_head." not in name}


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def save_value_head(head: ValueHead, folder: Path, *, is_writer: bool = True) -> None:
    """Write the head into `folder`. Every rank must call it where ZeRO-3 shards the head; the writer writes.

    Beside a whole model in one file goes an index that names that file alone: vLLM would take the head
    for a part of it.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with _gathered(head, modify=False):
        tensors = {
            f"{_PREFIX}{name}": tensor.detach().to("cpu", torch.float32, copy=True)
            for name, tensor in head.summary.named_parameters()
        }
    if is_writer:
        save_file(tensors, folder / FILE, metadata={"format": "pt"})
        if (folder / _MODEL).is_file():
            with safe_open(folder / _MODEL, "pt") as weights:
                index = {"metadata": {}, "weight_map": dict.fromkeys(weights.keys(), _MODEL)}
            (folder / f"{_MODEL}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def load_value_head(head: ValueHead, folder: Path) -> None:
    """Read into `head` what `save_value_head` wrote, also where ZeRO-3 shards it.

    Raises:
        RequestError: no such file, it holds something else, or it is for a model of another width.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / FILE
    try:
        tensors = load_file(file)
    except (FileNotFoundError, SafetensorError) as error:
        raise RequestError(f"{file}: no value head can be read: {error}") from None
    with _gathered(head, modify=True):
        for name, parameter in head.summary.named_parameters():
            tensor = tensors.pop(f"{_PREFIX}{name}", None)
            if tensor is None:
                raise RequestError(f"{file}: holds no {_PREFIX}{name}")
            whole = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if tuple(tensor.shape) != whole:
                raise RequestError(
                    f"{file}: {_PREFIX}{name} has the shape {tuple(tensor.shape)}, the model needs {whole}"
                )
            if parameter.shape == tensor.shape:
                parameter.data.copy_(tensor)
    if tensors:
        raise RequestError(f"{file}: holds {sorted(tensors)[0]}, which is no part of a value head")


def _gathered(head: ValueHead, *, modify: bool) -> Any:
    """The head's whole weights, where ZeRO-3 has given every rank a shard."""
    from contextlib import nullcontext

    parameters = list(head.summary.parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None)
