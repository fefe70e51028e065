"""What trains: how many parameters, in which kinds of modules, and how much memory they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

_MIB = 2**20


@dataclass(frozen=True)
class ParameterReport:
    """Counts of a model with its method attached."""

    trained: int
    """Parameters that train."""
    all: int
    """Parameters in all, the method's own among them. A quantized weight counts as what it stands for."""
    trained_bytes: int
    """Memory of the trained parameters themselves: gradients and the optimizer's state come on top."""
    trained_in: Mapping[str, int]
    """Trained parameters by the kind of module that holds them, such as `q_proj`; the most first."""

    @property
    def share(self) -> float:
        """Trained parameters as a share of all, 0 to 1."""
        return self.trained / self.all if self.all else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For `result.json`."""
        return {**asdict(self), "share": self.share}

    def lines(self) -> list[str]:
        """For the log of a job."""
        share = f"{100 * self.share:.2g} %" if self.share < 1 else "all"
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.trained_in.items())
        return [
            f"trains {self.trained:,} of {self.all:,} parameters ({share}), {self.trained_bytes / _MIB:,.1f} MiB",
            f"trained by kind of module: {kinds}",
        ]


_IDLE = ("expert", "encoder_attn", "crossattention", "cross_attn")


def has_idle_parts(model: torch.nn.Module) -> bool:
    """Whether weights may have no gradient of a batch, by their names: those of experts that no token comes to, and of
    the attention to an encoder, in a decoder that stands alone (Bart's)."""
    return any(part in name for name, _ in model.named_parameters() for part in _IDLE)


def count_parameters(model: torch.nn.Module) -> ParameterReport:
    """Count a model's parameters; also under ZeRO-3, where only shards of them are here, and without memory."""
    trained, everything, size = 0, 0, 0
    kinds: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        count = size_of(parameter)
        everything += count
        if parameter.requires_grad:
            trained += count
            size += count * parameter.element_size()
            kind = _kind(model, name)
            kinds[kind] = kinds.get(kind, 0) + count
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]))
    return ParameterReport(trained, everything, size, ordered)


def size_of(parameter: torch.nn.Parameter) -> int:
    """Elements of a parameter: `ds_numel` where ZeRO-3 has cut it up; the packed 4-bit weights of bitsandbytes hold
    two values or more in each element, and `quant_state` knows their real shape."""
    if hasattr(parameter, "ds_numel"):
        return int(parameter.ds_numel)
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def _kind(model: torch.nn.Module, name: str) -> str:
    """The last name on the way to a parameter that the model's own makers gave: PEFT wraps modules in others."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    parts = name.split(".")
    module: Any = model
    owner = parts[0]
    for part in parts[:-1]:
        module = getattr(module, part)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return part
        if not part.isdecimal() and part != "default":
            owner = part
    return owner
