"""Data files as chunks: whatever the size of the chunks, every row once, with its line and number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloom.data.files import Chunk, index_file, read_rows
from rayloom.errors import RequestError

TEXT = st.text(max_size=6) | st.sampled_from(["]", "[{", '",', "\\", "\r\n", "\u2028\x85\x0b", "日本", "👩‍🚀"])
VALUES = TEXT | st.sampled_from([None, True, -1.5e-9, [], {}, [[], ["]"], {"a": [{"b": ","}]}], {"[": {"]": [1, 2]}}])
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), min_size=1, max_size=6)
SIZES = st.integers(1, 80) | st.just(1 << 20)


def read_all(chunks: list[Chunk]) -> list[tuple[str, dict[str, Any]]]:
    return [row for chunk in chunks for row in read_rows(chunk, range(chunk.rows))]


def index_text(path: Path, text: str | bytes, chunk_bytes: int = 1 << 20) -> list[Chunk]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return index_file(str(path), chunk_bytes)


def check_chunks(chunks: list[Chunk], content: bytes) -> None:
    """Chunks lie in order, apart, and say truly which row and line they begin with."""
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        assert chunk.rows > 0
        assert chunk.first_line == content.count(b"\n", 0, chunk.start) + 1
        if following:
            assert chunk.stop <= following.start
            assert following.first_row == chunk.first_row + chunk.rows
    assert chunks[0].first_row == 0
    assert chunks[-1].stop <= len(content)


@given(rows=ROWS, size=SIZES, data=st.data())
def test_json_lines_in_any_chunks(rows, size, data, tmp_path_factory):
    blank = st.lists(st.sampled_from(["", " ", "\t "]), max_size=3)
    lines: list[str] = []
    expected = []
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    ascii_only = data.draw(st.booleans())
    for number, row in enumerate(rows, 1):
        lines += [*data.draw(blank), json.dumps(row, ensure_ascii=ascii_only)]
        expected.append((f"{path}:{len(lines)}: row {number}", row))
    lines += data.draw(blank)
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    content = (end.join(lines) + data.draw(st.sampled_from(["", end]))).encode()
    chunks = index_text(path, content, size)
    assert read_all(chunks) == expected
    check_chunks(chunks, content)
    # A cut comes at the first newline behind `size` bytes.
    assert all(content[chunk.start : chunk.stop - 1].find(b"\n", size) == -1 for chunk in chunks)


@given(rows=ROWS, size=SIZES, data=st.data())
def test_a_json_list_in_any_chunks(rows, size, data, tmp_path_factory):
    space = st.text("  \t\r\n", max_size=4)
    path = tmp_path_factory.getbasetemp() / "rows.json"
    indent = data.draw(st.sampled_from([None, 1]))
    texts = [json.dumps(row, ensure_ascii=data.draw(st.booleans()), indent=indent) for row in rows]
    elements = ",".join(data.draw(space) + text + data.draw(space) for text in texts)
    content = (
        data.draw(st.sampled_from(["", "\ufeff"])) + data.draw(space) + "[" + elements + "]" + data.draw(space)
    ).encode()
    chunks = index_text(path, content, size)
    assert read_all(chunks) == [(f"{path}: row {number}", row) for number, row in enumerate(rows, 1)]
    check_chunks(chunks, content)
    assert all(chunk.stop - chunk.start < size or chunk.rows == 1 or chunk is chunks[-1]
               or chunk.stop - chunk.start < size + max(len(text.encode()) for text in texts) + 9
               for chunk in chunks)  # fmt: skip


@given(rows=ROWS, size=SIZES, data=st.data())
def test_rows_are_read_in_the_order_that_is_asked_for(rows, size, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / data.draw(st.sampled_from(["some.jsonl", "some.json"]))
    content = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    for chunk in index_text(path, content, size):
        wanted = data.draw(st.lists(st.integers(0, chunk.rows - 1), max_size=6))
        assert [row for _, row in read_rows(chunk, wanted)] == [rows[chunk.first_row + number] for number in wanted]


def test_golden_chunks(tmp_path):
    path = tmp_path / "a.jsonl"
    chunks = index_text(path, '{"a": 1}\n\n{"b": 2}\n{"c": 3}', 10)
    assert chunks == [
        Chunk(str(path), 0, 19, 2, 0, 1),  # byte 10 is the second line break's; up to the next one
        Chunk(str(path), 19, 27, 1, 2, 4),
    ]
    path = tmp_path / "a.json"
    chunks = index_text(path, '[{"a": 1},\n{"ü": 2},\n {"c": 3}]', 10)
    assert chunks == [
        Chunk(str(path), 1, 9, 1, 0, 1),
        Chunk(str(path), 11, 20, 1, 1, 2),
        Chunk(str(path), 23, 31, 1, 2, 3),
    ]


def test_only_a_newline_ends_a_line(tmp_path):
    """A carriage return is white space to JSON, and other line breaks may stand in texts."""
    path = tmp_path / "a.jsonl"
    assert read_all(index_text(path, '{"a":\r1}\n{"b": "\u2028\x85"}\n')) == [
        (f"{path}:1: row 1", {"a": 1}),
        (f"{path}:2: row 2", {"b": "\u2028\x85"}),
    ]


def test_large_chunks_hold_whole_small_files(tmp_path):
    assert len(index_text(tmp_path / "a.jsonl", '{"a": 1}\n' * 100)) == 1
    assert len(index_text(tmp_path / "a.json", "[" + ",".join(['{"a": 1}'] * 100) + "]")) == 1


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    assert read_all(index_file("~/x.jsonl")) == [(f"{tmp_path}/x.jsonl:1: row 1", {"a": 1})]


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(folder: Path, name: str, content: str | bytes | None = None) -> str:
    path = folder / name
    with pytest.raises(RequestError) as refused:
        read_all(index_file(str(path)) if content is None else index_text(path, content))
    (message,) = refused.value.messages
    return message.replace(str(path), name)


def test_what_is_no_data_file(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    assert refusal(tmp_path, "folder.jsonl") == "folder.jsonl: is a folder; name a .jsonl or .json file"
    assert refusal(tmp_path, "nope.jsonl") == "nope.jsonl: no such data file"
    assert refusal(tmp_path, "a.csv", "x") == "a.csv: cannot read .csv; give .jsonl or .json"
    assert refusal(tmp_path, "a", "x") == "a: cannot read a file without an ending; give .jsonl or .json"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n \r\n\t\n"),
        ("a.json", ""),
        ("a.json", " \n"),
        ("a.json", "[]"),
        ("a.json", "[ ]\n"),
    ],
)
def test_empty_files(tmp_path, name, content):
    assert refusal(tmp_path, name, content) == f"{name}: is empty; a data set needs at least one row"


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
            '{"a": ' + "[" * 100_000,
            "a.jsonl:1: row 1: cannot be read as JSON: maximum recursion depth exceeded while decoding a JSON array "
            "from a unicode string",
        ),
    ],
)
def test_lines_that_are_no_rows(tmp_path, content, message):
    assert refusal(tmp_path, "a.jsonl", content) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', "a.json: a .json data file holds one list of objects; name it .jsonl if one a line"),
        ('[{"a": 1},\n{"b" 2}]', "a.json:2: not JSON: Expecting ':' delimiter at column 6"),
        ('[{"a": 1}\n{"b": 2}]', "a.json:2: not JSON: expected ',' or ']' at column 1"),
        ('[{"a": 1},', "a.json:1: not JSON: Expecting value at column 11"),
        ('[{"a": 1}', "a.json:1: not JSON: expected ',' or ']' at column 10"),
        ('[{"a": 1}]\n[{"b": 2}]', "a.json:2: not JSON: something stands behind the list at column 1"),
        ('[{"a": 1}, 3]', "a.json: row 2: is a int, not a JSON object with named columns"),
        (b'[{"a": 1},\n{"a": "\xe4"}]', "a.json:2: not UTF-8 text (invalid continuation byte)"),
        (
            "[" * 100_000,
            "a.json: cannot be read as JSON: maximum recursion depth exceeded while decoding a JSON array "
            "from a unicode string",
        ),
    ],
)
def test_lists_that_hold_no_rows(tmp_path, content, message):
    assert refusal(tmp_path, "a.json", content) == message


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_numbers_of_thousands_of_digits(tmp_path, name):
    """Python refuses them with an error that is no JSONDecodeError."""
    message = refusal(tmp_path, name, f'[{{"a": {"1" * 5000}}}]' if name == "a.json" else f'{{"a": {"1" * 5000}}}')
    assert "cannot be read as JSON: Exceeds the limit (4300 digits)" in message


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.jsonl", '{"a": 1}\n{"b": 2}\n', '{"a": 1, "b": 2}\n'),
        ("a.jsonl", '{"a": 1}\n', ""),
        ("a.json", '[{"a": 1}, {"b": 2}]', '[{"a": 1, "b": "2"}]'),
        ("a.json", '[{"a": 1}, {"b": 2}]', '[{"a": 1  , {"b": 2}]'),
    ],
)
def test_a_file_that_changes_meanwhile(tmp_path, name, before, after):
    path = tmp_path / name
    (chunk,) = index_text(path, before)
    path.write_text(after)
    with pytest.raises(RequestError, match="changed while the job was reading it; start the job again"):
        read_rows(chunk, [0])


def test_a_file_that_vanishes_meanwhile(tmp_path):
    path = tmp_path / "a.jsonl"
    (chunk,) = index_text(path, '{"a": 1}\n')
    path.unlink()
    with pytest.raises(RequestError, match=r"a\.jsonl: cannot be read any more: No such file or directory"):
        read_rows(chunk, [0])
