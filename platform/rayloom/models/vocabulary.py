"""Rows for tokens that the model does not know yet.

A new token begins as the mean of the known tokens and noise of standard deviation 1 / sqrt(width), which keeps new
tokens apart (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html), or as the mean of the embeddings of
a text that describes it. Input embeddings and output layer are treated alike, each from its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rayloom.errors import RequestError
from rayloom.models.config import ModelConfig


def added_token_ids(tokenizer: Any, model: ModelConfig) -> list[int]:
    """Ids of the tokens that the job adds, in the order of the job file: what a method must train beside its own."""
    return [int(i) for i in tokenizer.convert_tokens_to_ids([*model.add_tokens, *model.add_special_tokens])]


def described_ids(tokenizer: Any, model: ModelConfig) -> dict[int, list[int]]:
    """For each described token its id -> the ids of its description, in tokens that were there before.

    Raises:
        RequestError: a description that consists of added tokens only.
    """
    added = set(added_token_ids(tokenizer, model))
    found = {}
    for token, text in model.token_descriptions.items():
        ids = [i for i in tokenizer(text, add_special_tokens=False).input_ids if i not in added]
        if not ids:
            raise RequestError(f"model.token_descriptions: the description of {token!r} has no token but added ones")
        found[int(tokenizer.convert_tokens_to_ids(token))] = ids
    return found


def grow_vocabulary(model: Any, tokenizer: Any, settings: ModelConfig, *, seed: int) -> bool:
    """Give every token of the tokenizer a row, and the new ones a good beginning. Returns whether the model grew.

    The new size is a multiple of `vocab_multiple`; rows behind the last token are begun like those of tokens. Under
    ZeRO-3 the weights are gathered for it.

    Args:
        seed: of the noise; the same on every rank.
    """
    old_rows = _rows(model.get_input_embeddings())
    tokens = len(tokenizer)
    added = added_token_ids(tokenizer, settings)
    grows = tokens > old_rows
    if grows:
        model.resize_token_embeddings(tokens, pad_to_multiple_of=settings.vocab_multiple, mean_resizing=False)
    new_rows = _rows(model.get_input_embeddings())
    new = sorted({*added, *range(old_rows, new_rows)})
    if not new:
        return False
    described = described_ids(tokenizer, settings)
    known = min(old_rows, tokens - len(added))
    for weight in _vocabulary_weights(model):
        with _gathered(weight):
            if weight.numel():  # under ZeRO-3 the ranks but the first have it for reading only; all compute the same
                weight.data[new] = first_rows(weight.data[:known], new, described, seed=seed).to(weight)
    return grows


def first_rows(
    known: torch.Tensor, new: Sequence[int], described: Mapping[int, Sequence[int]], *, seed: int
) -> torch.Tensor:
    """Rows of new tokens.

    Args:
        known: (tokens, width) rows of the known tokens.
        new: ids of the new tokens.
        described: for some of them the ids of the known tokens that describe them.
        seed: of the noise of the others.

    Returns:
        (len(new), width) in float32.
    """
    known = known.float()
    generator = torch.Generator().manual_seed(seed)
    width = known.shape[1]
    noise = torch.randn(len(new), width, generator=generator).to(known) / width**0.5
    rows = known.mean(dim=0) + noise
    for place, token in enumerate(new):
        if token in described:
            rows[place] = known[list(described[token])].mean(dim=0)
    return rows


def vocabulary_modules(model: Any) -> list[str]:
    """Names of the modules whose rows are tokens: the input embeddings, and the output layer where it is not tied."""
    ends = [end for end in (model.get_output_embeddings(), model.get_input_embeddings()) if end is not None]
    ends = list({id(end.weight): end for end in ends}.values())  # of tied ones the input embeddings
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def _vocabulary_weights(model: Any) -> list[torch.nn.Parameter]:
    """The weights whose rows are tokens, each once."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return list({id(end.weight): end.weight for end in ends if end is not None}.values())


def _rows(embeddings: Any) -> int:
    """Rows of the whole weight, of which under ZeRO-3 only a shard is here."""
    weight = embeddings.weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


@contextmanager
def _gathered(weight: torch.nn.Parameter) -> Iterator[None]:
    if not hasattr(weight, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        yield
