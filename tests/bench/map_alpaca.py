"""What one would write with `datasets.map`: chat template, mask of the answer, packing within the batch."""

from __future__ import annotations

from functools import cache
from typing import Any

from rayloom.data.pack import pack


@cache
def tokenizer_of(model: str) -> Any:
    """One tokenizer a process."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def encode_batch(rows: dict[str, list[str]], model: str, cutoff: int) -> dict[str, list[Any]]:
    """Alpaca rows -> packed input_ids, labels and position_ids. The answer is what follows the rendered prompt."""
    tokenizer = tokenizer_of(model)
    prompts, wholes = [], []
    for question, answer in zip(rows["instruction"], rows["output"], strict=True):
        user = [{"role": "user", "content": question}]
        prompts.append(tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True))
        wholes.append(tokenizer.apply_chat_template([*user, {"role": "assistant", "content": answer}], tokenize=False))
    ids = tokenizer(wholes, add_special_tokens=False)["input_ids"]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    ids = [one[:cutoff] for one in ids]
    labels = [[-100] * len(p) + one[len(p) :] for one, p in zip(ids, prompt_ids, strict=True)]
    groups = pack([len(one) for one in ids], cutoff)
    return {
        "input_ids": [[t for i in group for t in ids[i]] for group in groups],
        "labels": [[t for i in group for t in labels[i]] for group in groups],
        "position_ids": [[n for i in group for n in range(len(ids[i]))] for group in groups],
    }
