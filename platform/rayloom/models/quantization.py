"""Quantized weights: made while loading, or there in the checkpoint.

What each way needs is one table; what is missing is said before anything is loaded. transformers does the work, and hqq
where transformers 5 has not got it back yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rayloom.errors import RequestError
from rayloom.models.architecture import Architecture
from rayloom.models.config import ModelConfig, QuantizationConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Way:
    packages: tuple[str, ...] = ()
    """Python packages, by the name that imports them, which must be installed."""
    gpu: bool = False
    """Whether it computes on a GPU only."""
    zero3: bool = False
    """Whether DeepSpeed can shard the weights."""
    dequantized: bool = False
    """Whether the weights are ordinary ones after loading."""


_ON_LOAD = {
    "nf4": _Way(("bitsandbytes",)),
    "fp4": _Way(("bitsandbytes",)),
    "int8": _Way(("bitsandbytes",)),
    "hqq": _Way(("hqq",)),
    "eetq": _Way(("kernels",), gpu=True),
    "torchao": _Way(("torchao",)),
}
_IN_CHECKPOINT = {
    "bitsandbytes": _Way(("bitsandbytes",)),
    "gptq": _Way(("optimum", "gptqmodel")),
    "awq": _Way(("gptqmodel",)),
    "aqlm": _Way(("aqlm",)),
    "eetq": _Way(("kernels",), gpu=True),
    "torchao": _Way(("torchao",)),
    "fp8": _Way(dequantized=True),
    "mxfp4": _Way(dequantized=True),
}


@dataclass(frozen=True)
class Quantized:
    """How a model's weights are quantized once it is loaded: what a method must know before it attaches itself."""

    method: str
    """`model.quantization.type`, or the checkpoint's `quant_method`."""
    in_checkpoint: bool
    """Whether the checkpoint's weights are quantized, and not only the loaded ones."""
    dequantized: bool
    """Whether loading makes ordinary weights of them, which any method can train."""

    @property
    def is_frozen(self) -> bool:
        """Whether the weights themselves cannot train; adapters beside them can."""
        return not self.dequantized


def quantized_as(model: ModelConfig, architecture: Architecture) -> Quantized | None:
    """How the loaded weights are quantized; None: they are not.

    Raises:
        RequestError: the checkpoint is quantized in a way that is not known, or is to be quantized again.
    """
    if architecture.quantization is None:
        return Quantized(model.quantization.type, False, False) if model.quantization else None
    if model.train_from_scratch:
        return None
    method = str(architecture.quantization.get("quant_method", "bitsandbytes"))
    if model.quantization is not None:
        raise RequestError(
            f"model.quantization: the weights of {model.path} are quantized already ({method}); leave it out"
        )
    if method not in _IN_CHECKPOINT:
        raise RequestError(
            f"model.path: the weights of {model.path} are quantized with {method}, which Rayloom cannot train on; "
            f"it knows {', '.join(_IN_CHECKPOINT)}"
        )
    return Quantized(method, True, _IN_CHECKPOINT[method].dequantized)


def check_quantization(quantized: Quantized, *, device: str | None, zero3: bool) -> None:
    """Refuse a quantization that cannot work here.

    Args:
        device: "cpu" or "gpu"; None: not known yet.

    Raises:
        RequestError: a package is not installed, the device is the wrong one, or DeepSpeed would have to shard it.
    """
    way = (_IN_CHECKPOINT if quantized.in_checkpoint else _ON_LOAD)[quantized.method]
    what = f"model.path: weights quantized with {quantized.method}"
    if not quantized.in_checkpoint:
        what = f"model.quantization: {quantized.method}"
    if way.gpu and device == "cpu":
        raise RequestError(f"{what}: needs a GPU, and the job runs on CPU")
    missing = [package for package in way.packages if find_spec(package) is None]
    if missing:
        raise RequestError(f"{what}: needs the Python package {' and '.join(missing)}, which is not installed")
    if zero3 and not (way.zero3 or way.dequantized):
        raise RequestError(
            f"{what}: train.deepspeed zero3 cannot shard quantized weights; take zero2, which shards the rest"
        )


def loading_options(model: ModelConfig, quantized: Quantized | None, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` gets for it.

    Args:
        dtype: what is computed in, after the weights have been de-quantized for a moment.
    """
    if quantized is None:
        return {}
    import torch
    from transformers import BitsAndBytesConfig, EetqConfig, FineGrainedFP8Config, TorchAoConfig
    from transformers.utils.quantization_config import Mxfp4Config

    options: dict[str, Any] = {}
    if quantized.method == "fp8":
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    elif quantized.method == "mxfp4":
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    elif quantized.in_checkpoint or model.quantization is None:
        pass  # the checkpoint says it all
    elif quantized.method in ("nf4", "fp4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantized.method,
            bnb_4bit_use_double_quant=model.quantization.double,
            bnb_4bit_compute_dtype=dtype,
        )
    elif quantized.method == "int8":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=model.quantization.threshold
        )
    elif quantized.method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        options["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    elif quantized.method == "eetq":
        options["quantization_config"] = EetqConfig("int8")
    if options and not quantized.dequantized and torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}  # they are quantized where they will compute
    return options


def settle(model: Any, settings: ModelConfig, quantized: Quantized, dtype: torch.dtype) -> None:
    """What is left to do once the weights are loaded.

    Args:
        dtype: what is computed in; de-quantized weights are brought to it.
    """
    if quantized.dequantized:
        model.to(dtype)
        # What undid the quantization would be undone again when the model is saved, with scales for all weights.
        del model._weight_conversions
    elif quantized.method == "hqq":
        assert settings.quantization is not None  # hqq's own checkpoints are not known
        _quantize_with_hqq(model, settings.quantization, dtype)
    else:
        # bitsandbytes 0.50 repacks 4-bit weights in evaluation, on CPUs with AVX512-BF16, and leaves them so when
        # training goes on, though its kernel for them has no backward pass: gradients would be lost without a word.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False


def leave_out_of_broadcast(model: Any) -> None:
    """DDP sends every weight of the first rank to the others when it wraps a model. Quantized weights of tensor classes
    of their own (torchao's) cannot be sent; every rank has read the same ones from the checkpoint."""
    import torch

    plain = (torch.Tensor, torch.nn.Parameter)
    own = [
        name for name, weight in model.named_parameters() if type(weight.data) not in plain and not weight.requires_grad
    ]
    if own:
        model._ddp_params_and_buffers_to_ignore = own  # where DDP looks


def _quantize_with_hqq(model: Any, settings: QuantizationConfig, dtype: torch.dtype) -> None:
    """Quantize every linear layer of a loaded model but the output head with hqq (https://mobiusml.github.io/hqq_blog/).

    transformers 5 knows an `HqqConfig` and refuses it ("not available yet"), so the layers are replaced here; PEFT puts
    adapters on them.
    """
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=settings.bits, group_size=settings.group_size, axis=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is torch.nn.Linear and layer is not head:
                setattr(parent, name, HQQLinear(layer, config, compute_dtype=dtype, device=device))
    model.quantization_method = "hqq"  # where transformers keeps it; its Trainer and PEFT look there
    model.is_quantized = True
    model.hqq_quantized = True
