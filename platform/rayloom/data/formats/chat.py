"""Lists of turns: ShareGPT's `conversations` and OpenAI's `messages`, which differ in their names only."""

from __future__ import annotations

from functools import cache
from typing import Any

from rayloom.data.description import Columns, Description, Tags
from rayloom.data.example import Example, Message, Role, ToolCall
from rayloom.data.formats.calls import read_call_turn, read_calls
from rayloom.data.formats.fields import Row, finish, optional_text, value

_SHAREGPT = Tags(
    role_tag="from",
    content_tag="value",
    user_tag="human",
    assistant_tag="gpt",
    observation_tag="observation",
    function_tag="function_call",
    system_tag="system",
)
_OPENAI = Tags(
    role_tag="role",
    content_tag="content",
    user_tag="user",
    assistant_tag="assistant",
    observation_tag="tool",
    system_tag="system",
)
# What OpenAI's API says besides: newer models have a developer, older ones answered by functions.
_OPENAI_ALIASES: dict[str, Role] = {"developer": "system", "function": "tool"}


def from_sharegpt(row: Row, description: Description) -> Example:
    """`conversations`: a list of `{from: human|gpt|observation|function_call|system, value}`."""
    return _from_turns(row, description, _words(description.tags, _SHAREGPT), "conversations")


def from_openai(row: Row, description: Description) -> Example:
    """`messages`: a list of `{role: user|assistant|tool|system, content}`, `tool_calls` of the assistant.

    `content` may be a list of parts with text. `developer`, `function` and `function_call` are read as what has
    replaced them or what they replaced.
    """
    return _from_turns(row, description, _words(description.tags, _OPENAI), "messages")


class _Words:
    """`Tags` with nothing left out, ready for a look-up."""

    def __init__(self, tags: Tags) -> None:
        roles: dict[str | None, Role] = {
            tags.user_tag: "user",
            tags.assistant_tag: "assistant",
            tags.observation_tag: "tool",
            tags.function_tag: "assistant",
            tags.system_tag: "system",
        }
        named: dict[str, Role] = {word: role for word, role in roles.items() if word is not None}
        aliases = _OPENAI_ALIASES if tags.role_tag == _OPENAI.role_tag else {}
        self.roles = named | {word: role for word, role in aliases.items() if word not in named}
        self.function = tags.function_tag
        self.role_key, self.text_key = tags.role_tag or "", tags.content_tag or ""


@cache  # asked for every row
def _words(tags: Tags, usual: Tags) -> _Words:
    return _Words(usual.model_copy(update={tag: word for tag, word in tags if word is not None}))


def _from_turns(row: Row, description: Description, words: _Words, usual_column: str) -> Example:
    columns = description.columns
    column = columns.messages or usual_column
    system = optional_text(row, columns.system)
    head = [Message("system", system)] if system else []
    if not description.ranking:
        return finish(row, description, [*head, *_turns(row, column, words)])
    chosen, rejected = _answers(row, columns, words)
    if chosen[0].role != "assistant" and rejected[0].role != "assistant":
        prompt = _common_beginning(chosen, rejected)
        if not prompt:
            raise ValueError(
                f"columns {columns.chosen!r} and {columns.rejected!r} have no beginning in common that an answer "
                "could follow"
            )
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        prompt = _turns(row, column, words)
    return finish(row, description, [*head, *prompt], chosen=chosen, rejected=rejected)


def _turns(row: Row, column: str, words: _Words) -> list[Message]:
    turns = value(row, column)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column {column!r} must be a list of turns with at least one turn")
    return [_message(turn, f"column {column!r}: turn {number}", words) for number, turn in enumerate(turns, 1)]


def _message(turn: Any, where: str, words: _Words) -> Message:
    calls = _calls_of(turn)
    if not isinstance(turn, dict) or words.role_key not in turn or (words.text_key not in turn and not calls):
        raise ValueError(f"{where} must have {words.role_key!r} and {words.text_key!r}")
    name, content = turn[words.role_key], turn.get(words.text_key)
    if not isinstance(name, str) or name not in words.roles:
        raise ValueError(f"{where} has the role {name!r}; known are {', '.join(words.roles)}")
    role = words.roles[name]
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = _joined(content, f"{where}: {words.text_key!r}")
    if not isinstance(content, str):
        raise ValueError(f"{where}: {words.text_key!r} must be text")
    tool_calls: tuple[ToolCall, ...] = ()
    if name == words.function:
        content, tool_calls = read_call_turn(content, where)
    elif calls:
        if role != "assistant":
            raise ValueError(f"{where}: 'tool_calls' of the {role}; only the assistant calls tools")
        tool_calls = read_calls(calls, where)
    return Message(role, content, tool_calls, _train_flag(turn, where))


def _calls_of(turn: Any) -> Any:
    """The tools that a turn calls: a list, or the one function that OpenAI's first form had."""
    if not isinstance(turn, dict):
        return None
    function = turn.get("function_call")
    return turn.get("tool_calls") or ([function] if isinstance(function, dict) else None)


def _joined(parts: list[Any], what: str) -> str:
    """The text of a turn that is given in parts, `{type: text, text}` each."""
    texts = [part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in parts]
    for number, (part, found) in enumerate(zip(parts, texts, strict=True), 1):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(found, str):
            raise ValueError(
                f"{what}: part {number} is {part!s:.60}; parts must be {{type: text, text: ...}}, and images, "
                "videos and audios stand in columns of their own"
            )
    return "".join(found for found in texts if found is not None)


def _train_flag(turn: dict[str, Any], where: str) -> bool | None:
    """A turn's own word on whether it is learnt: `train` (true, false) or OpenAI's `weight` (0, 1)."""
    for key, right in (("train", "true or false"), ("weight", "0 or 1")):
        flag = turn.get(key)
        if flag is not None:
            if flag not in (0, 1):
                raise ValueError(f"{where}: {key!r} must be {right}, not {flag!r:.60}")
            return bool(flag)
    return None


def _answers(row: Row, columns: Columns, words: _Words) -> tuple[list[Message], list[Message]]:
    """The better and the worse answer, each with at least one turn."""
    return _answer(row, columns.chosen or "chosen", words), _answer(row, columns.rejected or "rejected", words)


def _answer(row: Row, column: str, words: _Words) -> list[Message]:
    """The last turn as text or as one turn, or a list of turns: what goes on from the prompt, or the whole."""
    found = value(row, column)
    if isinstance(found, str):
        return [Message("assistant", found)]
    if isinstance(found, dict):
        return [_message(found, f"column {column!r}: the turn", words)]
    if not isinstance(found, list):
        raise ValueError(f"column {column!r} must be text, a turn or a list of turns, not {found!r:.60}")
    return _turns(row, column, words)


def _common_beginning(one: list[Message], other: list[Message]) -> list[Message]:
    """The longest that both share and that an assistant's turn follows in both; empty: there is none."""
    length = 0
    while length < min(len(one), len(other)) - 1 and one[length] == other[length]:
        length += 1
    while length and not one[length].role == other[length].role == "assistant":
        length -= 1
    return one[:length]
