"""Tools and calls of them, as data sets write them."""

from __future__ import annotations

import json
import re
from typing import Any

from rayloom.data.example import ToolCall

_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def read_tools(tools: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Schemas of functions, a list or JSON text of one, each as chat templates want it:
    `{"type": "function", "function": {"name": ..., ...}}`. Null or empty: none.

    Raises:
        ValueError: not such a list; begins with `where`.
    """
    if isinstance(tools, str):
        tools = _parse(tools, where) if tools.strip() else None
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where} must be a list of functions, each with its name and parameters, not {tools!r:.60}")
    return tuple(map(_wrapped, tools))


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    if "function" in tool or "name" not in tool:
        return tool
    return {"type": "function", "function": {key: part for key, part in tool.items() if key != "type"}}


def read_call_turn(content: str, where: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The text of a turn that calls functions: JSON, one call or a list of them, perhaps after a `<think>` block.

    Returns:
        The `<think>` block (else ""), and the calls.

    Raises:
        ValueError: not such JSON; begins with `where`.
    """
    thought = _THOUGHT.match(content)
    start = thought.end() if thought else 0
    calls = _parse(content[start:], f"{where}: the function call")
    return content[:start].strip(), read_calls(calls if isinstance(calls, list) else [calls], where)


def read_calls(calls: Any, where: str) -> tuple[ToolCall, ...]:
    """Calls as `{name, arguments}`, or OpenAI's `{function: {name, arguments}}`.

    Raises:
        ValueError: not such a list; begins with `where`.
    """
    if not isinstance(calls, list) or not calls:
        raise ValueError(f"{where}: the function calls must be a list of at least one, not {calls!r:.60}")
    return tuple(_read_call(call, where) for call in calls)


def _read_call(call: Any, where: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: a function call must have 'name' and 'arguments', not {call!r:.60}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _object_or_text(arguments)
    elif arguments is None:
        arguments = {}
    elif not isinstance(arguments, dict):
        raise ValueError(f"{where}: the arguments of {function['name']!r} must be an object, not {arguments!r:.60}")
    return ToolCall(function["name"], arguments)


def _object_or_text(text: str) -> Any:
    """OpenAI writes the arguments as JSON text, where chat templates want the object."""
    if not text.strip():
        return {}
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
