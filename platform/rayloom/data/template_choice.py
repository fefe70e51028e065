"""Which chat template a job renders with: the model's own, a named one, or a file."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2

from rayloom.data.template import GENERATION
from rayloom.data.template_library import known_names, library_template, own_names
from rayloom.errors import RequestError
from rayloom.models.families import family_of


def check_template_name(template: str) -> None:
    """Refuse what can be no template, without a tokenizer.

    Raises:
        RequestError: a name that is not known, or a file that is not there.
    """
    file = Path(template).expanduser()
    known = template == "auto" or template in known_names()
    if not known and not (file.suffix == ".jinja" and file.is_file()):
        raise RequestError(_unknown(template))


def resolve_template(template: str, tokenizer: Any, model_path: str) -> str:
    """The Jinja text for the job's `data.template`: `auto`, a known name, or the path of a `.jinja` file.

    `auto` is the model's own template, or TRL's training version of it, where TRL is installed and has one: that marks
    the answers, and renders earlier turns as they were learnt. A model without a template has its family's.

    Raises:
        RequestError: a model without its own template, an unknown name, a file that is not there, or no template in it.
    """
    if template == "auto" or template in own_names():
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own and template == "auto":
            return _family_template(model_path)
        if not own:
            raise RequestError(
                f"data.template: {template} stands for the template that such models ship, and {model_path} has none; "
                "name one that `rayloom templates` lists, or a .jinja file"
            )
        return own if GENERATION.search(own) else _training_version(tokenizer, own) or own
    named = library_template(template)
    if named is not None:
        return named
    check_template_name(template)
    try:
        text = Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{template}: cannot be read as text: {error}") from None
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            chat_template=text,
            tokenize=False,
        )
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(f"{template}:{error.lineno}: not a template: {error.message}") from None
    except Exception as error:  # a template may do whatever Python can: divide by zero, add text to nothing
        raise RequestError(f"{template}: the template does not render a plain conversation: {error}") from None
    return text


def _family_template(model_path: str) -> str:
    """The library's template for the family that the model's name belongs to."""
    family = family_of(model_path)
    named = library_template(family.template) if family and family.template else None
    if named is None:
        raise RequestError(
            f"data.template: auto: {model_path} has no chat template; name one that `rayloom templates` lists, "
            "or a .jinja file"
        )
    return named


def _training_version(tokenizer: Any, own: str) -> str | None:
    """TRL's version of a model's own template, which it knows by its text; to import TRL takes seconds."""
    (folder,) = find_spec("trl").submodule_search_locations  # type: ignore[union-attr, misc]
    if not any(file.read_text(encoding="utf-8") == own for file in Path(folder, "chat_templates").glob("*.jinja")):
        return None
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer)
    except Exception:  # it has none (ValueError), or what it tries on the template fails there
        return None


def _unknown(template: str) -> str:
    near = difflib.get_close_matches(template, known_names(), n=1, cutoff=0.7)
    guess = f"did you mean {near[0]!r}? Give" if near else "give"
    return (
        f"data.template: unknown {template!r}; {guess} `auto`, a name that `rayloom templates` lists, "
        "or the path of a .jinja file that exists"
    )
