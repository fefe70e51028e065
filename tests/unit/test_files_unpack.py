"""Files that are unpacked before they can be read by range: the same rows, in bounded memory, made once."""

from __future__ import annotations

import csv
import gzip
import io
import json
import threading
from itertools import count
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_files_lines import ROWS, locate_text, read_all, refusal

from rayloom.data.files import RawRow, json_list, locate, read_rows, unpack
from rayloom.errors import RequestError

CELLS = st.text(max_size=6) | st.sampled_from(["", " ", 'a"b', "a,b", "a\nb", "a\tb", "日本", "0", "null"])
NUMBERS = count()


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Not the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "rayloom" / "data"


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd").to_pybytes()


def blocks(content: bytes, size: int) -> list[bytes]:
    return [content[start : start + size] for start in range(0, len(content), size)]


@given(rows=ROWS, size=st.integers(1, 40), data=st.data())
def test_a_json_list_in_any_blocks(rows, size, data):
    space = st.text("  \t\r\n", max_size=4)
    indent = data.draw(st.sampled_from([None, 1]))
    texts = [json.dumps(row, ensure_ascii=data.draw(st.booleans()), indent=indent) for row in rows]
    elements = ",".join(data.draw(space) + text + data.draw(space) for text in texts)
    mark = data.draw(st.sampled_from(["", "\ufeff"]))
    content = (mark + data.draw(space) + "[" + elements + "]" + data.draw(space)).encode()
    found = list(json_list.list_elements("a.json", blocks(content, size)))
    assert [json.loads(line) for line in found] == rows
    assert all(line.count(b"\n") == 1 for line in found)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_characters_that_blocks_divide(mark):
    content = (mark + '[{"a": "𐀀𐀀"}]').encode()
    assert list(json_list.list_elements("a.json", blocks(content, 1))) == ['{"a": "𐀀𐀀"}\n'.encode()]


@given(table=st.lists(st.lists(CELLS, min_size=2, max_size=2), max_size=6), size=st.integers(1, 40))
def test_a_table_in_any_blocks(table, size):
    table = [[cell.replace("\r", " ").replace("\0", " ") for cell in row] for row in table]
    text = io.StringIO()
    csv.writer(text).writerows([["a", "b,"], *table])
    found = list(unpack.table_lines("a.csv", blocks(text.getvalue().encode("utf-8-sig"), size), ","))
    assert [json.loads(line) for line in found] == [{"a": row[0], "b,": row[1]} for row in table]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'[{"a": "1"},\n {"a":\n""}]'),
        ("a.csv", b'a\n1\n\n""\n'),
        ("a.tsv", b'\xef\xbb\xbfa\r\n1\r\n""'),
        ("a.jsonl.gz", gzip.compress(b'{"a": "1"}\n', mtime=0) + gzip.compress(b'{"a": ""}\n', mtime=0)),
        ("a.jsonl.zst", zstd(b'{"a": "1"}\n{"a": ""}\n')),
        ("a.ndjson", b'{"a": "1"}\n{"a": ""}\n'),
        ("A.JSON.GZ", gzip.compress(b'[{"a": "1"}, {"a": ""}]', mtime=0)),
        ("a.csv.zst", zstd(b'a\n1\n""\n')),
        ("a.tsv.gz", gzip.compress(b'a\n1\n""\n', mtime=0)),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, content):
    file = locate_text(tmp_path, name, content)
    assert file.address == str(tmp_path / name)
    assert [row for _, row in read_all(file)] == [RawRow({"a": "1"}, None), RawRow({"a": ""}, None)]


def test_compressed_text(tmp_path):
    file = locate_text(tmp_path, "a.txt.gz", gzip.compress(b"one\n\ntwo", mtime=0))
    assert read_all(file) == [
        (f"{tmp_path}/a.txt.gz:1: row 1", RawRow({"text": "one"}, None)),
        (f"{tmp_path}/a.txt.gz:3: row 2", RawRow({"text": "two"}, None)),
    ]


def test_places_are_those_of_the_users_file(tmp_path):
    """A row of a list has no line of its own, and a table's lines are not those of the file."""
    rows = read_all(locate_text(tmp_path, "a.json", '[{"a": 1},\n3]'))
    assert [where for where, _ in rows] == [f"{tmp_path}/a.json: row 1", f"{tmp_path}/a.json: row 2"]
    rows = read_all(locate_text(tmp_path, "a.csv", 'a,b\n"x\ny",2\n3,4'))
    assert rows[1] == (f"{tmp_path}/a.csv: row 2", RawRow({"a": "3", "b": "4"}, None))


def test_a_long_list_is_unpacked_in_bounded_memory(tmp_path):
    """The text that is kept never grows beyond a few blocks."""
    element = json.dumps({"a": "x" * 500}).encode()
    text = json_list._Text("a.json", [b"[", *[element + b","] * 5000, element + b"]"])
    assert text.peek() == "["
    text.position += 1
    for _ in range(5001):
        text.peek()
        text.element()
        assert len(text._text) < 4 * len(element)
        text.peek()
        text.position += 1


def test_a_long_element(tmp_path):
    value = "x" * (9 << 20)
    file = locate_text(tmp_path, "a.json", json.dumps([{"a": value}, {"a": 1}]))
    assert read_rows(file, 0, [0]) == [RawRow({"a": value}, None)]


def test_an_element_that_is_too_long(monkeypatch):
    monkeypatch.setattr(json_list, "MAX_ROW_BYTES", 1 << 20)
    content = b'[{"a": 1},\n{"a": "' + b"x" * (3 << 20)
    with pytest.raises(RequestError, match=r"a\.json:2: not JSON: an element longer than 1 MiB begins at column 1"):
        list(json_list.list_elements("a.json", blocks(content, 1 << 16)))


# --- the cache folder -------------------------------------------------------------------------------------------------


def test_a_file_is_unpacked_once(tmp_path, cache, monkeypatch):
    made = []
    convert = unpack._convert
    monkeypatch.setattr(unpack, "_convert", lambda source, how: made.append(how) or convert(source, how))
    path = tmp_path / "a.json"
    file = locate_text(tmp_path, "a.json", '[{"a": 1}]')
    assert Path(file.path).parent == cache
    threads = [threading.Thread(target=locate, args=(str(path),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["json"]
    path.write_text('[{"a": 2}, {}]')
    (changed,) = locate(str(path))
    assert changed.path != file.path
    assert changed.fingerprint != file.fingerprint
    assert len(made) == 2
    assert not list(cache.glob(".partial-*"))


def test_another_machine_unpacks_it_again(tmp_path, monkeypatch):
    file = locate_text(tmp_path, "a.csv", "a\n1\n2\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert read_rows(file, 0, [1]) == [RawRow({"a": "2"}, None)]
    assert list((tmp_path / "other" / "rayloom" / "data").glob("*.jsonl"))


def test_another_machine_with_another_file(tmp_path, monkeypatch):
    file = locate_text(tmp_path, "a.csv", "a\n1\n2\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    (tmp_path / "a.csv").write_text("a\n1\n3\n")
    with pytest.raises(RequestError, match=r"a\.csv: changed while the job was reading it; start the job again"):
        read_rows(file, 0, [1])


def test_a_fault_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert "not JSON" in refusal(tmp_path, "a.json", '[{"a": 1}')
    assert [path.suffix for path in (tmp_path / "other" / "rayloom" / "data").iterdir()] == [".lock"]


def test_a_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    message = refusal(tmp_path, "a.json", '[{"a": 1}]')
    assert message.startswith("a.json: cannot be unpacked into /proc/none/rayloom/data: ")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ""),
        ("a.json", " \n"),
        ("a.json", "[]"),
        ("a.json", "[ ]\n"),
        ("a.csv", "a,b\n"),
        ("a.csv", ""),
        ("a.jsonl.gz", gzip.compress(b"\n", mtime=0)),
        ("a.jsonl.gz", b""),
    ],
)
def test_files_without_a_row(tmp_path, name, content):
    assert refusal(tmp_path, name, content) == f"{name}: is empty; a data set needs at least one row"


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
        ('[{"a": "x', "a.json:1: not JSON: Unterminated string starting at column 8"),
        (
            "[" * 100_000,
            "a.json: cannot be read as JSON: maximum recursion depth exceeded while decoding a JSON array "
            "from a unicode string",
        ),
    ],
)
def test_lists_that_hold_no_rows(tmp_path, content, message):
    assert refusal(tmp_path, "a.json", content) == message


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_fault_far_into_a_list_has_its_line(size):
    content = b"[\n" + b'{"a": 1},\n' * 5000 + b'{"b" 2}]'
    with pytest.raises(RequestError, match=r"a\.json:5002: not JSON: Expecting ':' delimiter at column 6"):
        list(json_list.list_elements("a.json", blocks(content, size)))
    with pytest.raises(RequestError, match=r"a\.json:5002: not UTF-8 text \(invalid start byte\)"):
        list(json_list.list_elements("a.json", blocks(content[:-3] + b"\xff", size)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", "a.csv:3: row 2: has 3 values where the header names 2 columns"),
        ('a,b\n"1\n\n2",2\n1\n', "a.csv:5: row 2: has 1 values where the header names 2 columns"),
        ('a,b\n1,2\n1,"2\n', "a.csv:3: row 2: not CSV: unexpected end of data"),
        ('a,b\n1,"2"x\n', "a.csv:2: row 1: not CSV: ',' expected after '\"'"),
        ("a,\n1,2\n", "a.csv: the header has a column without a name; the first line names the columns"),
        ("a,a\n1,2\n", "a.csv: the header names the column 'a' twice"),
        (b"a,b\n1,2\n\xff,2\n", "a.csv:3: not UTF-8 text (invalid start byte)"),
    ],
)
def test_tables_that_hold_no_rows(tmp_path, content, message):
    assert refusal(tmp_path, "a.csv", content) == message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-9],
            "not a whole gzip file: Truncated compressed stream",
        ),
        ("a.jsonl.gz", b'{"a": 1}\n', "not a whole gzip file: zlib inflate failed: incorrect header check"),
        ("a.csv.zst", zstd(b"a\n1\n")[:-2], "not a whole zstd file: Truncated compressed stream"),
    ],
)
def test_compressed_files_that_are_broken(tmp_path, name, content, message):
    assert refusal(tmp_path, name, content) == f"{name}: {message}"
