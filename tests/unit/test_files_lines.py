"""Files of lines: whatever the size of the chunks, every line in one of them, and each row with its line and number."""

from __future__ import annotations

import json
import pickle
import time
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloom.data.files import DataFile, RawRow, count_rows, estimate_rows, lines, locate, place, read_rows
from rayloom.data.files.data_file import CHUNK_BYTES, MAX_CHUNKS
from rayloom.errors import RequestError

TEXT = st.text(max_size=6) | st.sampled_from(["]", "[{", '",', "\\", "\r\n", "\u2028\x85\x0b", "日本", "👩‍🚀"])
VALUES = TEXT | st.sampled_from([None, True, -1.5e-9, [], {}, [[], ["]"], {"a": [{"b": ","}]}], {"[": {"]": [1, 2]}}])
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), min_size=1, max_size=6)
SIZES = st.integers(1, 80) | st.just(1 << 20)
NUMBERS = count()  # a path of its own for each example: a file system's clock may not tell two of them apart


def locate_text(folder: Path, name: str, text: str | bytes, chunk_bytes: int = CHUNK_BYTES) -> DataFile:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (file,) = locate(str(path), chunk_bytes=chunk_bytes)
    return file


def read_all(file: DataFile) -> list[tuple[str, RawRow]]:
    found = []
    for chunk in range(file.chunks):
        numbers = range(count_rows(file, chunk))
        rows = read_rows(file, chunk, numbers)
        assert len(rows) == len(numbers)
        found += [(place(file, chunk, number), row) for number, row in zip(numbers, rows, strict=True)]
    return found


def refusal(folder: Path, name: str, content: str | bytes | None = None) -> str:
    """Why a file cannot be located, or what is wrong with its first bad row, with its place."""
    path = folder / name
    try:
        file = locate(str(path))[0] if content is None else locate_text(folder, name, content)
        message = next(f"{where}: {row.fault}" for where, row in read_all(file) if row.fault)
    except RequestError as refused:
        (message,) = refused.messages
    return message.replace(str(path), name)


@given(rows=ROWS, size=SIZES, data=st.data())
def test_json_lines_in_any_chunks(rows, size, data, tmp_path_factory):
    blank = st.lists(st.sampled_from(["", " ", "\t "]), max_size=3)
    path = tmp_path_factory.getbasetemp() / f"rows{next(NUMBERS)}.jsonl"
    written: list[str] = []
    expected = []
    ascii_only = data.draw(st.booleans())
    for number, row in enumerate(rows, 1):
        written += [*data.draw(blank), json.dumps(row, ensure_ascii=ascii_only)]
        expected.append((f"{path}:{len(written)}: row {number}", RawRow(row, None)))
    written += data.draw(blank)
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    mark = data.draw(st.sampled_from(["", "\ufeff"]))
    text = mark + end.join(written) + data.draw(st.sampled_from(["", end]))
    assert read_all(locate_text(path.parent, path.name, text, size)) == expected


@given(content=st.binary(max_size=60) | st.text("a \n\r\ufeffü", max_size=60).map(str.encode), size=SIZES)
def test_any_bytes_are_the_lines_that_a_plain_reading_finds(content, size, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"bytes{next(NUMBERS)}.txt"
    path.write_bytes(content)
    plain = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    if not plain:
        with pytest.raises(RequestError, match="is empty; a data set needs at least one row"):
            locate(str(path), chunk_bytes=size)
        return
    (file,) = locate(str(path), chunk_bytes=size)
    source = file.source
    found = [line for chunk in range(file.chunks) for line in lines._rows(file, source, chunk)]
    assert found == plain
    # A chunk holds the lines that start in it.
    starts = [0, *(at + 1 for at, byte in enumerate(content) if byte == 10 and at + 1 < len(content))]
    for chunk in range(file.chunks):
        inside = [start for start in starts if start // file.chunk_bytes == chunk]
        assert len(lines.lines_between(source, chunk * file.chunk_bytes, (chunk + 1) * file.chunk_bytes)) == len(inside)


@given(rows=ROWS, size=SIZES, data=st.data())
def test_rows_are_read_in_the_order_that_is_asked_for(rows, size, data, tmp_path_factory):
    ending = data.draw(st.sampled_from(["jsonl", "json"]))
    path = tmp_path_factory.getbasetemp() / f"some{next(NUMBERS)}.{ending}"
    content = json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows))
    file = locate_text(path.parent, path.name, content, size)
    first = 0
    for chunk in range(file.chunks):
        number = count_rows(file, chunk)
        wanted = data.draw(st.lists(st.integers(0, number - 1), max_size=6)) if number else []
        assert [row.columns for row in read_rows(file, chunk, wanted)] == [rows[first + row] for row in wanted]
        first += number


def test_golden_chunks(tmp_path):
    file = locate_text(tmp_path, "a.jsonl", '{"a": 1}\n\n{"b": 2}\n{"c": 3}', 10)
    assert (file.size, file.chunks, file.kind, file.chunk_rows) == (27, 3, "jsonl", None)
    assert [count_rows(file, chunk) for chunk in range(3)] == [1, 2, 0]  # lines start at the bytes 0, 9, 10 and 19
    assert read_rows(file, 1, [1, 0]) == [RawRow({"c": 3}, None), RawRow({"b": 2}, None)]
    assert place(file, 1, 1) == f"{tmp_path}/a.jsonl:4: row 3"
    assert pickle.loads(pickle.dumps(file)) == file


def test_only_a_newline_ends_a_line(tmp_path):
    """A carriage return is white space to JSON, and other line breaks may stand in texts."""
    path = tmp_path / "a.jsonl"
    assert read_all(locate_text(tmp_path, "a.jsonl", '{"a":\r1}\n{"b": "\u2028\x85"}\n')) == [
        (f"{path}:1: row 1", RawRow({"a": 1}, None)),
        (f"{path}:2: row 2", RawRow({"b": "\u2028\x85"}, None)),
    ]


def test_a_text_file_holds_a_document_a_line(tmp_path):
    assert read_all(locate_text(tmp_path, "a.txt", " one\r\n \r\n\ntwo ")) == [
        (f"{tmp_path}/a.txt:1: row 1", RawRow({"text": " one"}, None)),
        (f"{tmp_path}/a.txt:4: row 2", RawRow({"text": "two "}, None)),
    ]


def test_a_long_line_is_one_row(tmp_path):
    text = "x" * (50 << 20)
    file = locate_text(tmp_path, "a.jsonl", f'{{"a": 1}}\n{{"a": "{text}"}}\n{{"a": 2}}')
    counts = [count_rows(file, chunk) for chunk in range(file.chunks)]
    assert (counts[0], sum(counts), counts[-1]) == (2, 3, 1)
    assert read_rows(file, 0, [1]) == [RawRow({"a": text}, None)]
    assert place(file, file.chunks - 1, 0) == f"{tmp_path}/a.jsonl:3: row 3"


def test_a_line_may_be_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 1 << 20)
    file = locate_text(tmp_path, "a.txt", "a\n" + "x" * (3 << 20) + "\nb")
    assert read_all(file) == [
        (f"{tmp_path}/a.txt:1: row 1", RawRow({"text": "a"}, None)),
        (
            f"{tmp_path}/a.txt:2: row 2",
            RawRow(None, "the line is longer than 1 MiB, the most that is read as one row"),
        ),
        (f"{tmp_path}/a.txt:3: row 3", RawRow({"text": "b"}, None)),
    ]


def test_a_huge_file_is_located_at_once_and_read_in_its_middle(tmp_path):
    path = tmp_path / "huge.jsonl"
    line = b'{"a": 1}\n'
    middle = 5 << 30
    with path.open("wb") as handle:
        handle.write(line)
        for at in (middle, 100 << 30):
            handle.seek(at - 1)
            handle.write(b"\n" + line)
    started = time.perf_counter()
    (file,) = locate(str(path))
    assert file.size == (100 << 30) + len(line)
    assert file.chunks <= MAX_CHUNKS
    chunk = middle // file.chunk_bytes
    found = read_rows(file, chunk, range(count_rows(file, chunk)))
    assert time.perf_counter() - started < 2
    assert RawRow({"a": 1}, None) in found


# --- rows that cannot be read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"a": 1}\n\n{"b" 2}\n',
            "a.jsonl:3: row 2: not JSON: Expecting ':' delimiter at column 6; "
            "a .jsonl file holds one JSON object a line",
        ),
        (
            '{"a": 1} {"b": 2}\n',
            "a.jsonl:1: row 1: not JSON: Extra data at column 10; a .jsonl file holds one JSON object a line",
        ),
        (
            '{"a": 1}\n{"b": ',
            "a.jsonl:2: row 2: not JSON: Expecting value at column 7; a .jsonl file holds one JSON object a line",
        ),
        ("[1]\n", "a.jsonl:1: row 1: is a list, not a JSON object with named columns"),
        ("3\n", "a.jsonl:1: row 1: is a int, not a JSON object with named columns"),
        (b'{"a": "\xe4"}\n', "a.jsonl:1: row 1: not UTF-8 text (invalid continuation byte at byte 8)"),
        (
            '{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}\n',
            "a.jsonl:2: row 2: holds half a character: an escape \\ud800 to \\udfff without its other half",
        ),
        (
            '{"a": ' + "[" * 100_000,
            "a.jsonl:1: row 1: cannot be read as JSON: maximum recursion depth exceeded while decoding a JSON array "
            "from a unicode string",
        ),
    ],
)
def test_lines_that_are_no_rows(tmp_path, content, message):
    assert refusal(tmp_path, "a.jsonl", content) == message


def test_a_bad_row_does_not_spoil_its_neighbours(tmp_path):
    file = locate_text(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": "\xff"}\nno\n{"a": 2}\n')
    rows = read_rows(file, 0, range(4))
    assert [row.columns for row in rows] == [{"a": 1}, None, None, {"a": 2}]
    assert [row.fault is None for row in rows] == [True, False, False, True]
    bad = locate_text(tmp_path, "a.txt", b"a\n\xff\n")
    assert read_rows(bad, 0, [1]) == [RawRow(None, "not UTF-8 text (invalid start byte at byte 1)")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_numbers_of_thousands_of_digits(tmp_path, name):
    """Python refuses them with an error that is no JSONDecodeError."""
    message = refusal(tmp_path, name, f'[{{"a": {"1" * 5000}}}]' if name == "a.json" else f'{{"a": {"1" * 5000}}}')
    assert "cannot be read as JSON: Exceeds the limit (4300 digits)" in message


# --- estimates --------------------------------------------------------------------------------------------------------


def test_an_estimate_is_exact_for_small_sets_and_close_for_even_ones(tmp_path):
    small = locate_text(tmp_path, "a.jsonl", '\n{"a": 1}\n' * 100)
    assert estimate_rows([small]) == 100
    many = locate_text(tmp_path, "b.jsonl", '{"a": 1}\n' * 10_000, 1000)
    assert many.chunks > 8
    assert estimate_rows([many]) == 10_000
    uneven = "".join(json.dumps({"a": "x" * (number % 50)}) + "\n" for number in range(10_000))
    assert estimate_rows([locate_text(tmp_path, "c.jsonl", uneven, 10_000)]) == pytest.approx(10_000, rel=0.05)
    assert estimate_rows([small, many]) == pytest.approx(10_100, rel=0.1)


def test_an_estimate_is_at_least_one(tmp_path):
    file = locate_text(tmp_path, "a.jsonl", "\n" * 500 + '{"a": 1}\n', 10)
    assert estimate_rows([file]) == 1
    assert len(read_all(file)) == 1
