"""Every method: attach, train two steps, save, load where nothing of Rayloom is, merge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM

from rayloom.methods.attach import attach_method
from rayloom.methods.config import MethodConfig
from rayloom.methods.save import finish_saved, keep_start

IDS = torch.tensor([[5, 9, 17, 33, 65, 129, 200, 7], [8, 8, 90, 41, 12, 300, 3, 250]])

# What trains: a part of each name. `merges`: whether the adapter can become part of the weights.
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...], bool]] = {
    "full": ({"type": "full"}, ("",), False),
    "freeze last": ({"type": "freeze", "last": 1}, ("layers.1.",), False),
    "freeze first": ({"type": "freeze", "first": 1}, ("layers.0.",), False),
    "freeze modules": ({"type": "freeze", "last": 2, "modules": ["mlp"]}, (".mlp.",), False),
    "freeze extra": ({"type": "freeze", "last": 1, "extra_modules": ["norm"]}, ("layers.1.", "model.norm."), False),
    "freeze expand": ({"type": "freeze", "expand": 1}, ("layers.2.",), False),
    "lora": ({"type": "lora", "rank": 4}, ("lora_A", "lora_B"), True),
    "lora list": ({"type": "lora", "target": ["q_proj", "v_proj"]}, ("_proj.lora_",), True),
    "lora regex": ({"type": "lora", "target": r".*layers\.1\..*down_proj"}, ("1.mlp.down_proj.lora_",), True),
    "rslora": ({"type": "lora", "rank": 4, "rslora": True}, ("lora_",), True),
    "dora": ({"type": "lora", "rank": 4, "dora": True}, ("lora_",), True),
    "gaussian": ({"type": "lora", "rank": 4, "init": "gaussian"}, ("lora_",), True),
    "orthogonal": ({"type": "lora", "rank": 4, "init": "orthogonal"}, ("lora_",), True),
    "pissa": ({"type": "lora", "rank": 4, "init": "pissa"}, ("lora_",), True),
    "pissa rslora": ({"type": "lora", "rank": 4, "init": "pissa_niter_4", "rslora": True}, ("lora_",), True),
    "olora": ({"type": "lora", "rank": 4, "init": "olora"}, ("lora_",), True),
    "lora extra": ({"type": "lora", "extra_modules": ["norm"]}, ("lora_", "modules_to_save"), True),
    "lora tied": ({"type": "lora", "extra_modules": ["embed_tokens"]}, ("lora_", "modules_to_save"), True),
    "oft": ({"type": "oft", "block_size": 16}, ("oft_",), True),
    "oft constrained": (
        {"type": "oft", "blocks": 4, "exact": True, "constrained": 1e-3, "shared": True},
        ("oft",),
        True,
    ),
    "adapter": ({"type": "adapter", "layers": 1}, ("1.self_attn.adaption_",), False),
    "prompt": ({"type": "prompt", "virtual_tokens": 4}, ("prompt_encoder",), False),
    "prompt text": ({"type": "prompt", "virtual_tokens": 4, "init_text": "Who are you?"}, ("prompt_encoder",), False),
    "p_tuning": ({"type": "p_tuning", "virtual_tokens": 4}, ("prompt_encoder",), False),
    "p_tuning lstm": ({"type": "p_tuning", "encoder": "lstm", "encoder_size": 16}, ("prompt_encoder",), False),
    "prefix": ({"type": "prefix", "virtual_tokens": 4}, ("prompt_encoder",), False),
    "prefix made": ({"type": "prefix", "virtual_tokens": 4, "projection_size": 16}, ("prompt_encoder",), False),
    "ia3": ({"type": "ia3"}, ("ia3_",), True),
    "ia3 list": ({"type": "ia3", "target": ["v_proj", "up_proj"], "feedforward": ["up_proj"]}, ("ia3_",), True),
    "vera": ({"type": "vera", "rank": 16}, ("vera_lambda",), True),
    "peft loha": ({"type": "peft", "peft_type": "LOHA", "fields": {"r": 4}}, ("hada_",), True),
    "peft norms": ({"type": "peft", "peft_type": "ln_tuning"}, ("ln_tuning",), True),
    "peft hra": ({"type": "peft", "peft_type": "HRA", "fields": {"target_modules": ["q_proj"]}}, ("hra_",), True),
}


def method_of(fields: dict[str, Any]) -> Any:
    return TypeAdapter(MethodConfig).validate_python(fields)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_cache=False)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(model: Any, steps: int = 2, rate: float = 1e-2) -> list[float]:
    """Losses before each step and after the last."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        model.train()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        return [*losses, model(input_ids=IDS, labels=IDS).loss.item()]


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each method, trained and saved once; what was seen on the way."""
    result = {}
    for name, (fields, _, _) in METHODS.items():
        method, folder = method_of(fields), tmp_path_factory.mktemp("method")
        torch.manual_seed(0)
        model = attach_method(load(tiny_model), method)
        keep_start(model, method, folder / "start")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        start = logits_of(model)
        losses = train(model)
        after = {key: value.clone() for key, value in model.state_dict().items()}
        end = logits_of(model)
        trains = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        model.save_pretrained(folder / "model")
        finish_saved(model, method, folder / "model", folder / "start")
        result[name] = {
            "folder": folder / "model",
            "start": start,
            "end": end,
            "losses": losses,
            "trains": trains,
            "moved": {key for key in before if not torch.equal(before[key], after[key])},
        }
    return result


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls_and_only_the_right_weights_move(name, trained):
    seen, (_, parts, _) = trained[name], METHODS[name]
    assert seen["losses"][2] < seen["losses"][0]
    assert seen["trains"]
    assert all(any(part in key for part in parts) for key in seen["trains"]), seen["trains"]
    tied = {"full": {"lm_head.weight"}, "lora tied": {"base_model.model.lm_head.modules_to_save.default.weight"}}
    assert seen["moved"] <= seen["trains"] | tied.get(name, set())
    assert len(seen["moved"]) >= len(seen["trains"]) / 2


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith(("prompt", "p_tuning", "prefix"))])
def test_training_begins_at_the_model_itself(name, trained, tiny_model):
    torch.testing.assert_close(trained[name]["start"], logits_of(load(tiny_model)), rtol=1e-4, atol=1e-4)


_LOADER = """
import json, sys, torch, transformers
from peft import AutoPeftModelForCausalLM
from pathlib import Path
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in map(Path, sys.argv[2:]):
    kind = AutoPeftModelForCausalLM if (folder / "adapter_config.json").exists() else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, folder / "logits.pt")
        if hasattr(model, "merge_and_unload"):
            try:
                torch.save(model.merge_and_unload()(input_ids=ids).logits, folder / "merged.pt")
            except AttributeError:
                pass  # virtual tokens are no part of the weights
assert not [name for name in sys.modules if name.startswith("rayloom")]
"""


@pytest.fixture(scope="module")
def loaded(trained) -> None:
    """All that was saved, loaded in a process that knows nothing of Rayloom."""
    folders = [str(seen["folder"]) for seen in trained.values()]
    command = [sys.executable, "-c", _LOADER, json.dumps(IDS.tolist()), *folders]
    subprocess.run(command, check=True, capture_output=True, timeout=200)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("loaded")
def test_what_is_saved_loads_with_equal_logits(name, trained):
    seen, merges = trained[name], METHODS[name][2]
    exact = 1e-4 if name in ("pissa", "pissa rslora", "olora") else 1e-6  # turned back into LoRA
    torch.testing.assert_close(torch.load(seen["folder"] / "logits.pt"), seen["end"], rtol=0, atol=exact)
    assert (seen["folder"] / "merged.pt").exists() == merges
    if merges:
        torch.testing.assert_close(torch.load(seen["folder"] / "merged.pt"), seen["end"], rtol=0, atol=1e-4)
