"""Chat templates: an `Example` -> token ids, and which of them are trained.

One mechanism: Jinja, rendered as the tokenizer's own `apply_chat_template` does it. Where an answer lies comes from the
template's `{% generation %}` blocks where it has them; else from rendering prefixes: the text up to the answer (with
the generation prompt) and the text up to the answer's end must both be prefixes of the whole, and what lies between
them is the answer. The whole text is tokenized once, so the ids are exactly `apply_chat_template(tokenize=True)`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from rayloom.data.chat_jinja import Span, compile_template
from rayloom.data.example import Example, Message
from rayloom.data.spans import FixedTokens, begins_inside_character, token_range, tokens_between
from rayloom.models.text_tokenizer import TextTokenizer

_T = TypeVar("_T")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What begins the part of a template that an answer makes."""
_STAND_IN = re.compile("\ue000(\\d+)\ue001")
"""What stands in for a message's text to find where the template puts it: characters that no template knows."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation, and for each whether it is trained."""

    input_ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Cuttable:
    """What may be cut from a rendered conversation."""

    rendered: Rendered
    parts: list[list[int]]
    """Positions of the tokens of each message's text, rising."""
    inner: frozenset[int]
    """Those of them that go on with a character which the token before began."""


class Renderer:
    """Renders examples with one tokenizer and one template. Changes neither.

    Trained are the assistant's words and the end-of-turn behind them; with `train_on_prompt` everything, with
    `mask_history` the last answer only. A message's own `train` has the last word.

    A row that cannot be rendered gives a `ValueError` in its place: one bad row of a batch leaves the others alone.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: str,
        *,
        train_on_prompt: bool = False,
        mask_history: bool = False,
        enable_thinking: bool | None = None,
    ) -> None:
        if train_on_prompt and mask_history:
            raise ValueError("`train_on_prompt` trains everything and `mask_history` the last answer only; choose one")
        self._tokenizer = tokenizer
        self._template = template
        self._train_on_prompt = train_on_prompt
        self._mask_history = mask_history
        self._variables = dict(tokenizer.special_tokens)
        if enable_thinking is not None:
            self._variables["enable_thinking"] = enable_thinking
        self._marks_answers = bool(GENERATION.search(template))
        self._end_of_turn = tuple(tokenizer.added)
        self._fixed = FixedTokens.of(tokenizer)

    # --- whole batches ----------------------------------------------------------------------------------------------

    def render(self, examples: Sequence[Example]) -> list[Rendered | ValueError]:
        """Render a batch of conversations; one tokenizer call for all of them.

        A `ValueError` stands for a conversation that the template refuses or renders to nothing, or where it cannot
        say where an answer begins and ends.
        """
        found = [_or_error(self._find, example) for example in examples]
        good = [one for one in found if not isinstance(one, ValueError)]
        rendered = [
            self._by_borders(text, ids, marked)
            for (text, marked), ids in zip(good, self._tokenizer.ids([text for text, _ in good]), strict=True)
        ]
        # Where the borders of the tokens do not tell, the tokenizer must be asked for every token's characters.
        unclear = [number for number, one in enumerate(rendered) if one is None]
        encodings = self._tokenizer.encodings([good[number][0] for number in unclear])
        for number, encoding in zip(unclear, encodings, strict=True):
            rendered[number] = _rendered(encoding, good[number][1], self._train_on_prompt)
        in_order = iter(rendered)
        return [one if isinstance(one, ValueError) else next(in_order) for one in found]  # type: ignore[misc]

    def render_prompts(self, examples: Sequence[Example]) -> list[list[int] | ValueError]:
        """Token ids of the messages with the generation prompt behind them, from where an answer goes on."""
        texts = [_or_error(self._prompt_text, example) for example in examples]
        ids = iter(self._tokenizer.ids([text for text in texts if isinstance(text, str)]))
        return [one if isinstance(one, ValueError) else next(ids) for one in texts]

    def _by_borders(self, text: str, ids: list[int], marked: Sequence[tuple[Span, bool]]) -> Rendered | None:
        """Ids and mask, if each span that is trained otherwise than the rest begins and ends where a token does."""
        rest = self._train_on_prompt
        trained = [rest] * len(ids)
        borders = None
        for span, flag in marked:
            if flag == rest:
                continue
            if borders is None:
                borders = self._tokenizer.borders(text, ids)
            tokens = None if borders is None else tokens_between(borders, text, span)
            if tokens is None:
                return None
            trained[tokens[0] : tokens[1]] = [flag] * (tokens[1] - tokens[0])
        return Rendered(ids, trained)

    def _prompt_text(self, example: Example) -> str:
        return _some_text(self._text(example.as_dicts(), example, add_generation_prompt=True))

    # --- what is trained --------------------------------------------------------------------------------------------

    def _find(self, example: Example) -> tuple[str, list[tuple[Span, bool]]]:
        """The text, and which of its characters are trained otherwise than the rest: that is, than the prompt."""
        text, answers = self._answer_spans(example)
        flags = self._flags(example.messages)
        of_answers = [flag for flag, message in zip(flags, example.messages, strict=True) if _is_answer(message)]
        marked = [
            (span, of_answers[owner])
            for span, owner in zip(answers, self._owners(example, answers, of_answers), strict=True)
        ]
        odd = [
            index
            for index, message in enumerate(example.messages)
            if not _is_answer(message) and flags[index] != self._train_on_prompt
        ]
        if odd:
            places = self._places(example, text)
            if any(index not in places for index in odd):
                raise ValueError(
                    "a message that is no answer says whether it is trained, "
                    "but the chat template does not render its text as it is"
                )
            marked += [(places[index], flags[index]) for index in odd]
        return text, marked

    def _flags(self, messages: Sequence[Message]) -> list[bool]:
        """Whether each message is trained."""
        last = max((index for index, message in enumerate(messages) if _is_answer(message)), default=-1)
        return [
            self._train_on_prompt or (_is_answer(message) and (index == last or not self._mask_history))
            if message.train is None
            else message.train
            for index, message in enumerate(messages)
        ]

    def _owners(self, example: Example, spans: Sequence[Span], flags: Sequence[bool]) -> Sequence[int]:
        """For each marked span the number of the answer it belongs to."""
        if len(spans) == len(flags):
            return range(len(spans))
        if len(set(flags)) == 1:  # then it does not matter, and need not be rendered
            return [0] * len(spans)
        owners: list[int] = []
        answer = 0
        for index, message in enumerate(example.messages):
            if _is_answer(message):
                upto = len(self._marked(example, example.as_dicts()[: index + 1])[1])
                owners += [answer] * (upto - len(owners))
                answer += 1
        if len(owners) != len(spans):
            raise ValueError("the chat template's {% generation %} blocks cannot be told apart by answers")
        return owners

    # --- where the answers are --------------------------------------------------------------------------------------

    def _answer_spans(self, example: Example) -> tuple[str, list[Span]]:
        """The text, and the characters of the answers."""
        messages = example.as_dicts()
        text, spans = (
            self._marked(example, messages) if self._marks_answers else self._between_prefixes(example, messages)
        )
        return _some_text(text), spans

    def _marked(self, example: Example, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """The text, and the characters that `{% generation %}` blocks made.

        Not `apply_chat_template`'s own mask: where the last character of an answer takes several tokens, it has only
        the first of them.
        """
        return self._jinja(messages, example)

    def _between_prefixes(self, example: Example, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """The text, and the characters between the prefixes that end before and behind each answer."""
        whole = self._text(messages, example)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:index], example, add_generation_prompt=True)
            upto = whole if index == len(messages) - 1 else self._text(messages[: index + 1], example)
            if not (whole.startswith(upto) and upto.startswith(before)):
                raise ValueError(
                    "the chat template rewrites earlier turns, so the answers cannot be told from the prompts; "
                    "use a template with {% generation %} blocks"
                )
            spans.append((len(before), self._end_of_answer(upto)))
        return whole, spans

    def _end_of_answer(self, text: str) -> int:
        """Up to and with the end-of-turn token; the line break that templates write behind it is not an answer."""
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self._end_of_turn) else len(text)

    def _text(self, messages: list[dict[str, Any]], example: Example, **options: Any) -> str:
        return self._jinja(messages, example, **options)[0]

    def _jinja(self, messages: list[dict[str, Any]], example: Example, **options: Any) -> tuple[str, list[Span]]:
        """What `apply_chat_template` does before it tokenizes: the text, and what `{% generation %}` blocks made."""
        try:
            return compile_template(self._template).render(messages, example.tools, **self._variables, **options)
        except Exception as error:  # its own `raise_exception("no system message")`, or whatever else Python can
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise ValueError(f"the chat template refuses a conversation with the roles {roles}: {error}") from None

    # --- what may be cut --------------------------------------------------------------------------------------------

    def cuttable(self, example: Example) -> Cuttable:
        """An example that `render` renders, and what may be cut from it.

        In no part: the template's own tokens, the system message, tool calls, added tokens (an end-of-turn, an
        image's), and all that a media block holds. A message whose text the template changes has no part.
        """
        text, marked = self._find(example)
        (encoding,) = self._tokenizer.encodings([text])
        fixed = self._fixed.positions(encoding.ids)
        places = self._places(example, text) | self._places(example, text, answers=True)
        ranges = [
            token_range(encoding, places[index])
            for index, message in enumerate(example.messages)
            if index in places and message.role != "system"
        ]
        spans = self._answer_spans(example)[1]
        answers = [(index, message) for index, message in enumerate(example.messages) if _is_answer(message)]
        if len(spans) == len(answers):
            ranges += [
                _without_end(encoding, text, span, fixed)
                for span, (index, message) in zip(spans, answers, strict=True)
                if index not in places and not message.tool_calls
            ]
        parts = [[token for token in range(*one) if token not in fixed] for one in ranges]
        inner = frozenset(
            token for part in parts for token in part if token and begins_inside_character(encoding, token)
        )
        return Cuttable(_rendered(encoding, marked, self._train_on_prompt), [part for part in parts if part], inner)

    def _places(self, example: Example, text: str, *, answers: bool = False) -> dict[int, Span]:
        """Where in the text the words of the messages are, by the message's number; of answers only if asked.

        Told from rendering the conversation with stand-ins in their place; what lies between those must be found again.
        So an answer whose thoughts the template moves is not found, nor what follows it.
        """
        stand_ins = [
            message
            if _is_answer(message) and not (answers and message.content.strip())
            else replace(message, content=f"\ue000{index}\ue001")
            for index, message in enumerate(example.messages)
        ]
        shadow = replace(example, messages=tuple(stand_ins))
        try:
            pieces = _STAND_IN.split(self._text(shadow.as_dicts(), shadow))
        except ValueError:
            return {}
        places: dict[int, Span] = {}
        position = len(pieces[0])
        if not text.startswith(pieces[0]):
            return {}
        for number, behind in zip(pieces[1::2], pieces[2::2], strict=True):
            words = example.messages[int(number)].content
            forms = [form for form in (words, words.strip()) if text.startswith(form + behind, position)]
            if not forms:
                break
            places[int(number)] = (position, position + len(forms[0]))
            position += len(forms[0]) + len(behind)
        return places


def _is_answer(message: Message) -> bool:
    return message.role == "assistant"


def _some_text(text: str) -> str:
    """The text itself.

    Raises:
        ValueError: there is none, or none that can be tokenized.
    """
    if not text:
        raise ValueError("the chat template renders nothing for this conversation")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write
        raise ValueError(f"the conversation holds {text[error.start]!r}, which is no character") from None
    return text


def _or_error(find: Callable[[Example], _T], example: Example) -> _T | ValueError:
    try:
        return find(example)
    except ValueError as error:
        return error


def _rendered(encoding: Any, marked: Sequence[tuple[Span, bool]], rest: bool) -> Rendered:
    """Ids and mask: `rest` everywhere but in the marked spans of characters."""
    trained = [rest] * len(encoding)
    for span, flag in marked:
        if flag != rest:
            first, stop = token_range(encoding, span)
            trained[first:stop] = [flag] * (stop - first)
    return Rendered(encoding.ids, trained)


def _without_end(encoding: Any, text: str, span: Span, fixed: set[int]) -> Span:
    """The tokens of an answer without its end-of-turn."""
    first, behind = token_range(encoding, span)
    last = max((token for token in range(first, behind) if token in fixed), default=None)
    if last is not None and not text[encoding.token_to_chars(last)[1] : span[1]].strip():
        return (first, last)
    return (first, behind)
