"""The tokenizer of a model, with the tokens that the job adds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rayloom.errors import RequestError, first_line
from rayloom.models.config import ModelConfig
from rayloom.models.source import model_folder


@dataclass(frozen=True)
class TokenizerSource:
    """All that a tokenizer follows from."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    add_tokens: tuple[str, ...] = ()
    add_special_tokens: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: ModelConfig) -> TokenizerSource:
        return cls(
            model.path,
            model.revision,
            model.trust_remote_code,
            tuple(model.add_tokens),
            tuple(model.add_special_tokens),
        )


def load_tokenizer(source: TokenizerSource | str) -> Any:
    """The tokenizer of a model (of a path: with nothing added), shared within the process: nobody changes it.

    Raises:
        RequestError: none can be loaded, it is not a fast one (whose character offsets the loss mask needs), or it has
            a token already that is to be added.
    """
    return _load(TokenizerSource(source) if isinstance(source, str) else source)


@lru_cache(maxsize=4)
def _load(source: TokenizerSource) -> Any:
    from transformers import AutoTokenizer

    path = source.path
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            model_folder(path), revision=source.revision or "main", trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RequestError(f"model.path: no tokenizer can be loaded from {path}: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise RequestError(f"model.path: {path} has only a slow tokenizer; Rayloom needs a tokenizer.json")
    known = tokenizer.get_vocab()
    for key, tokens in (("add_tokens", source.add_tokens), ("add_special_tokens", source.add_special_tokens)):
        there = [token for token in tokens if token in known]
        if there:
            raise RequestError(f"model.{key}: the tokenizer of {path} has the token {there[0]!r} already; leave it out")
        tokenizer.add_tokens(list(tokens), special_tokens=key == "add_special_tokens")
    return tokenizer


def pad_token(tokenizer: Any) -> int:
    """A token for the padding, which nothing attends to: the tokenizer's own, else its end of sequence, else 0."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0
