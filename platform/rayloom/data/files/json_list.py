"""A `.json` file, one list of objects, as JSON lines: read once from front to end, in bounded memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from typing import NoReturn

from rayloom.data.files.access import is_remote
from rayloom.data.files.data_file import MAX_ROW_BYTES
from rayloom.errors import RequestError

_SPACE = re.compile(r"[ \t\r\n]*")
_ESCAPE_LENGTH = 16  # an element that stops making sense so close to the end of what was read may just go on
_decoder = json.JSONDecoder()


def list_elements(address: str, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The elements of a JSON list, each on a line of its own, as they stand in the file.

    A remote file may also hold one object after the other, as many `.json` files on the hub do.

    Raises:
        RequestError: it is not one list, not UTF-8, or an element is longer than `MAX_ROW_BYTES`.
    """
    text = _Text(address, blocks)
    first = text.peek()
    if not first:
        return
    if first == "{" and is_remote(address):  # one object a line: nobody can rename what is not theirs
        while text.peek():
            yield text.element_line()
        return
    if first != "[":
        raise RequestError(f"{address}: a .json data file holds one list of objects; name it .jsonl if one a line")
    text.position += 1
    closed = text.peek() == "]"
    while not closed:
        yield text.element_line()
        separator = text.peek()
        closed = separator == "]"
        if separator == ",":
            text.position += 1
            text.peek()
        elif not closed:
            text.refuse("expected ',' or ']'", text.position)
    text.position += 1
    if text.peek():
        text.refuse("something stands behind the list", text.position)


class _Text:
    """The text of a file as far as it is needed: what lies before `position` is forgotten when more is read."""

    def __init__(self, address: str, blocks: Iterable[bytes]) -> None:
        self._address = address
        self._blocks = iter(blocks)
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text = ""
        self._line, self._column = 1, 1  # where the kept text begins
        self.position = 0

    def peek(self) -> str:
        """The next character that is no white space, to which it moves; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self.position)
            assert found is not None  # it matches nothing, too
            self.position = found.end()
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._read(1):
                return ""

    def element(self) -> str:
        """The value that begins at `position`, which moves behind it."""
        more = 1
        while True:
            try:
                _, end = _decoder.raw_decode(self._text, self.position)
                if end < len(self._text) or not self._read(1):  # a number may go on in what is read next
                    element = self._text[self.position : end]
                    self.position = end
                    return element
            except json.JSONDecodeError as error:
                goes_on = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _ESCAPE_LENGTH
                if len(self._text) - self.position > MAX_ROW_BYTES:
                    self.refuse(f"an element longer than {MAX_ROW_BYTES >> 20} MiB begins", self.position)
                # More each time: a long element must not be parsed from its beginning for every block.
                offset = error.pos - self.position
                if not goes_on or not self._read(more := 2 * more):
                    self.refuse(error.msg.removesuffix(" at"), self.position + offset)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{self._address}: cannot be read as JSON: {error}") from None

    def element_line(self) -> bytes:
        """The value that begins at `position`, on one line."""
        return self.element().replace("\n", " ").replace("\r", " ").encode() + b"\n"

    def refuse(self, what: str, position: int) -> NoReturn:
        """Raise what is wrong at `position`."""
        line, column = self._where(position)
        raise RequestError(f"{self._address}:{line}: not JSON: {what} at column {column}")

    def _where(self, position: int) -> tuple[int, int]:
        newlines = self._text.count("\n", 0, position)
        if not newlines:
            return self._line, self._column + position
        return self._line + newlines, position - self._text.rindex("\n", 0, position)

    def _read(self, blocks: int) -> bool:
        """Read more; False: there is no more."""
        self._line, self._column = self._where(self.position)
        pieces = [self._text[self.position :]]
        self.position = 0
        kept = len(pieces[0])
        for block in self._blocks:
            pieces.append(self._decoded(block, pieces))
            blocks -= 1
            if blocks <= 0 and any(pieces[1:]):  # a small block may hold a part of one character
                break
        else:
            pieces.append(self._decoded(b"", pieces))
        self._text = "".join(pieces)
        return len(self._text) > kept

    def _decoded(self, block: bytes, before: list[str]) -> str:
        try:
            return self._decode(block, final=not block)
        except UnicodeDecodeError as error:
            newlines = sum(piece.count("\n") for piece in before) + error.object.count(b"\n", 0, error.start)
            where = f"{self._address}:{self._line + newlines}"
            raise RequestError(f"{where}: not UTF-8 text ({error.reason})") from None
