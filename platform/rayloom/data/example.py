"""The one standard form that every row is brought into."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """The assistant's wish to have a tool called."""

    name: str
    arguments: Any
    """What the tool is called with: a dict of JSON values, or text where the row has text that is no JSON object."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. A `tool` message is what a tool answered."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    train: bool | None = None
    """Whether the turn is learnt: the row's own word; None: the job's rule decides."""

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates want it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True)
class Example:
    """One row of a data set, whatever its format was. Which fields are set says what kind of example it is:

    - a conversation: `messages`, an optional system message, user (or tool) and assistant in turn, the
      assistant last;
    - a prompt: a conversation without its last answer;
    - a preference: `messages` is the prompt (it ends before an assistant turn); `chosen` and `rejected` go on from it;
    - a judged answer (KTO): a conversation with `desirable`;
    - plain text: `text`.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that the assistant may call."""
    chosen: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    desirable: bool | None = None
    text: str | None = None
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()
    audios: tuple[Any, ...] = ()

    def without_answer(self) -> tuple[Example, str]:
        """What is asked, and the data's own answer to it: the last one, of a preference the chosen one, of a prompt "".

        Raises:
            ValueError: it is plain text, which asks nothing.
        """
        if self.text is not None:
            raise ValueError("the row is plain text, which asks nothing")
        if self.chosen:
            return Example(self.messages, self.tools), self.chosen[0].content
        if self.messages[-1].role != "assistant":
            return self, ""
        *messages, answer = self.messages
        return replace(self, messages=tuple(messages), desirable=None), answer.content

    def as_dicts(self) -> list[dict[str, Any]]:
        """The messages as chat templates want them."""
        return [message.as_dict() for message in self.messages]
