"""What the matrix does with one model type, step by step; each step is a function that a test can call.

`train_and_save` and `load_and_compare` are meant for two processes: they share a folder and nothing else.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import torch
import transformers
from tests.matrix.tiny_configs import TOKENS, tiny_config

from rayloom.data.encoding import IGNORED
from rayloom.data.rows import SCHEMA
from rayloom.methods.attach import attach_method
from rayloom.methods.config import LoraConfig
from rayloom.methods.targets import linear_layers
from rayloom.models.load import load_causal_lm
from rayloom.train.batch import TrainedPositions, make_batch

LOGITS_TOLERANCE = 1e-4
"""Largest difference between two logits that still counts as equal: fp32, logits of size 1 to 10."""
LOSS_TOLERANCE = 1e-4
"""The same for a loss in nats per token."""

_LEARNING_RATE = 1e-2
_RECURRENT = ("mamba", "deltanet", "linearattention", "rwkv", "recurrent", "lstm", "shortconv", "lightning", "mixer")
_EXPERTS = ("expert", "moe", "router")


class CheckError(Exception):
    """The type cannot pass, and why: one line."""


# --- texts ------------------------------------------------------------------------------------------------------------


def example(length: int, seed: int) -> list[int]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TOKENS.start, TOKENS.stop, (length,), generator=generator).tolist()


def table(*rows: list[list[int]]) -> pa.Table:
    """Token rows as the stream makes them; each is one example or several that were packed."""
    return pa.Table.from_pylist(
        [
            {
                "input_ids": [token for ids in row for token in ids],
                "labels": [label for ids in row for label in [IGNORED, *ids[1:]]],
                "position_ids": [position for ids in row for position in range(len(ids))],
            }
            for row in rows
        ],
        schema=SCHEMA,
    )


# --- the model --------------------------------------------------------------------------------------------------------


def make_base(model_type: str, folder: Path) -> None:
    """Write a tiny random model of the type, in fp32, as a folder that `model.path` may name."""
    config = tiny_config(model_type)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = transformers.GenerationConfig()  # the default one may name tokens that there are not
    model.save_pretrained(folder)
    if model.config.model_type != config.model_type:  # the language model alone, which is loaded from the whole
        config.save_pretrained(folder)


def load(folder: Path) -> Any:
    """The base model as the product loads it."""
    return load_causal_lm(str(folder), torch.float32)


def describe(model: Any, model_type: str) -> dict[str, Any]:
    """What sort of model it is, read off its modules and its configuration."""
    text = model.config.get_text_config(decoder=True)
    names = {type(module).__name__.lower() for module in (model.get_decoder() or model).modules()}
    has = {
        "recurrent": any(word in name for name in names for word in _RECURRENT),
        "attention": any(
            ("attention" in name and "linearattention" not in name) or name.endswith("mla") for name in names
        ),
        "experts": any(word in name for name in names for word in _EXPERTS),
    }
    words = ["hybrid" if has["attention"] else "recurrent"] if has["recurrent"] else []
    words += ["MoE"] if has["experts"] else []
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return {
        "class": type(model).__name__,
        "kind": " ".join(words) or "dense",
        "heads": _heads(text) if has["attention"] else "none",
        "tied": head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", 0),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _heads(text: Any) -> str:
    heads, shared = getattr(text, "num_attention_heads", None), getattr(text, "num_key_value_heads", None)
    if getattr(text, "kv_lora_rank", None):
        return "MLA"
    if getattr(text, "multi_query", False) or shared == 1:
        return "MQA"
    return "GQA" if shared and heads and shared < heads else "MHA"


def matrix_weights(model: Any) -> dict[int, int]:
    """Elements of every weight that a token is multiplied with, but for embeddings, convolutions and the output head.

    Linear layers, experts in one parameter of three dimensions, and two-dimensional parameters of other modules.
    """
    head = model.get_output_embeddings()
    other = (torch.nn.Embedding, torch.nn.modules.conv._ConvNd)
    found: dict[int, int] = {}
    for module in model.modules():
        if module is head or isinstance(module, other):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2 and (head is None or parameter is not getattr(head, "weight", None)):
                found[id(parameter)] = parameter.numel()
    return found


# --- the checks -------------------------------------------------------------------------------------------------------


def is_causal(model: Any) -> bool:
    """Whether what a token says is the same whatever comes after it."""
    ids = torch.tensor([example(20, seed=3)])
    other = ids.clone()
    other[0, -1] = TOKENS.start if ids[0, -1] != TOKENS.start else TOKENS.start + 1
    with torch.no_grad():
        first, second = model(input_ids=ids).logits, model(input_ids=other).logits
    return bool((first[0, :-1] - second[0, :-1]).abs().max() <= LOGITS_TOLERANCE)


def packing_leak(model: Any) -> tuple[float, float]:
    """How far packing moves the loss (nats per token) and, at most, a logit.

    One batch holds a row of two examples and a row of one; another holds the three in rows of their own.

    Raises:
        CheckError: the model ignores what came before a token, so nothing could leak and nothing is shown.
    """
    first, second, third = example(20, seed=1), example(13, seed=2), example(9, seed=4)
    head = TrainedPositions(model)
    packed, alone = (
        _loss_and_logits(model, head, [first, second], [third]),
        _loss_and_logits(model, head, [first], [second], [third]),
    )
    joined = _loss_and_logits(model, head, [first + second])[1]
    head.choose(None)
    if (joined[len(first) :] - alone[1][len(first) - 1 : len(first) + len(second) - 2]).abs().max() < 1e-3:
        raise CheckError("a token's logits do not depend on what came before it")
    return abs(packed[0] - alone[0]), float((packed[1] - alone[1]).abs().max())


def why_packing_leaks(model: Any) -> str:
    """The likeliest reason, as the rest of "this model ..."."""
    decoder, text = model.get_decoder() or model, model.config.get_text_config(decoder=True)
    ids = torch.tensor([example(20, seed=3)])
    with torch.no_grad():
        own = model(input_ids=ids).logits
        told = model(input_ids=ids, position_ids=torch.arange(20)[None]).logits
    names = {type(module).__name__.lower() for module in decoder.modules()}
    if (own - told).abs().max() > LOGITS_TOLERANCE:
        return "counts positions in its own way, not from 0"
    if any(word in name for name in names for word in _RECURRENT):
        return "has layers whose state runs on from one example into the next"
    if any(isinstance(module, torch.nn.Conv1d) for module in decoder.modules()):
        return "has convolutions that reach back into the example before"
    if any(getattr(text, name, None) for name in ("index_topk", "compress_rates", "indexer_budget")):
        return "has sparse attention that picks from the tokens of the whole row"
    if "chunked_attention" in (getattr(text, "layer_types", None) or []):
        return "has attention in chunks that are counted from the start of the row"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "takes no position_ids, by which it could tell the examples apart"
    return "does not look at position_ids in its attention mask"


def is_causal_as_it_comes(model_type: str) -> bool:
    """Whether the type is causal unless its configuration says `is_decoder` or `causal`, as encoders' do not."""
    fields = {name for name in ("is_decoder", "causal") if hasattr(tiny_config(model_type), name)}
    torch.manual_seed(0)
    config = tiny_config(model_type, **dict.fromkeys(fields, False))
    return is_causal(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


def _loss_and_logits(model: Any, head: TrainedPositions, *rows: list[list[int]]) -> tuple[float, torch.Tensor]:
    batch = make_batch(table(*rows), pad_token=0)
    head.choose(batch.pop("positions"))
    with torch.no_grad():
        output = model(**batch)
    return float(output.loss), output.logits.flatten(0, 1)


def train_two_steps(model: Any) -> dict[str, float]:
    """Two AdamW steps on one batch; the loss before and after, and how many adapters did not move.

    Raises:
        CheckError: the loss does not fall, or anything but adapters changes.
    """
    head = TrainedPositions(model)
    batch = make_batch(table([example(20, seed=1)], [example(13, seed=2)]), pad_token=0)
    head.choose(batch.pop("positions"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_LEARNING_RATE)
    model.train()
    losses = []
    for _ in range(2):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        losses.append(float(model(**batch).loss))
    model.eval()
    head.choose(None)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    others = sorted(name for name in moved if "lora_" not in name)
    if others:
        raise CheckError(f"weights moved that are no adapter's: {others[0]}")
    if not losses[-1] < losses[0]:
        raise CheckError(f"the loss does not fall: {losses[0]:.4f} -> {losses[-1]:.4f}")
    ups = [name for name, _ in model.named_parameters() if "lora_B" in name]
    return {
        "loss_before": losses[0],
        "loss_after": losses[-1],
        "idle": len([name for name in ups if name not in moved]),
    }


def logits_of(model: Any) -> torch.Tensor:
    """Logits (2, 20, vocabulary) of two fixed texts."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([example(20, seed=5), example(20, seed=6)])).logits


def train_and_save(model_type: str, folder: Path) -> dict[str, Any]:
    """Make a tiny model, measure it, train adapters for two steps, and save them as the worker does.

    Leaves `base` (the model), `adapter` and `logits.pt` in `folder`.

    Raises:
        CheckError: a check fails.
    """
    make_base(model_type, folder / "base")
    model = load(folder / "base")
    facts = describe(model, model_type)
    if not is_causal(model):
        raise CheckError("not causal: a token sees what comes after it")
    loss_leak, logits_leak = packing_leak(model)
    facts |= {"packing_loss": loss_leak, "packing_logits": logits_leak}
    facts["packing"] = loss_leak <= LOSS_TOLERANCE and logits_leak <= LOGITS_TOLERANCE
    if not facts["packing"]:
        facts["why_not_packed"] = why_packing_leaks(model)

    weights, expected = matrix_weights(model), {id(model.get_submodule(name).weight) for name in linear_layers(model)}
    torch.manual_seed(1)
    model = attach_method(model, LoraConfig())
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    adapted = {id(_weight(layer)) for layer in layers}
    if adapted != expected:
        raise CheckError(f"adapters on {len(adapted)} layers, not on the {len(expected)} linear ones")
    facts |= {"modules": len(layers), "share": sum(weights[one] for one in adapted) / sum(weights.values())}
    facts |= train_two_steps(model)
    model.save_pretrained(folder / "adapter")
    torch.save(logits_of(model), folder / "logits.pt")
    return facts


def _weight(layer: Any) -> torch.nn.Parameter:
    """The weight that an adapter belongs to: of a linear layer, or a parameter of experts or a router."""
    return layer.get_param() if hasattr(layer, "parameter_name") else layer.get_base_layer().weight


def load_and_compare(folder: Path) -> dict[str, float]:
    """Load base and adapter as they were saved, compare logits, merge, compare again.

    Raises:
        CheckError: the logits differ.
    """
    expected = torch.load(folder / "logits.pt")
    base = load(folder / "base")
    trained = float((logits_of(base) - expected).abs().max())
    if trained <= LOGITS_TOLERANCE:
        raise CheckError("the adapter changes nothing, so nothing is shown by loading it")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    loaded = float((logits_of(model) - expected).abs().max())
    merged = float((logits_of(model.merge_and_unload()) - expected).abs().max())
    for what, difference in (("loading", loaded), ("merging", merged)):
        if not difference <= LOGITS_TOLERANCE:
            raise CheckError(f"other logits after {what}: they differ by {difference:.2g}")
    return {"loaded": loaded, "merged": merged, "trained": trained}
