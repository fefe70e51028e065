"""Parquet and Arrow files: the rows that were written, chunk by chunk, and nothing decoded twice."""

from __future__ import annotations

import datetime
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.unit.test_files_lines import read_all

from rayloom.data.files import count_rows, estimate_rows, locate, place, read_rows, tables
from rayloom.data.files.cache import RecentlyRead
from rayloom.errors import RequestError

ROWS = [
    {
        "number": number,
        "text": None if number % 7 == 0 else f"Zeile ü{number}",
        "messages": [{"role": "user", "content": str(number)}] * (number % 3),
        "when": datetime.datetime(2026, 1, 1) + datetime.timedelta(days=number),
        "word": ["red", "green", "blue"][number % 3],
    }
    for number in range(50)
]


def make_table():
    table = pa.Table.from_pylist(ROWS)
    return table.set_column(4, "word", table["word"].dictionary_encode())


def check(file, chunk_rows):
    assert file.chunk_rows == chunk_rows
    assert [count_rows(file, chunk) for chunk in range(file.chunks)] == list(chunk_rows)
    assert estimate_rows([file]) == sum(chunk_rows)
    assert [row.columns for _, row in read_all(file)] == ROWS
    first = 0
    for chunk, number in enumerate(chunk_rows):
        assert [row.columns for row in read_rows(file, chunk, [number - 1, 0])] == [
            ROWS[first + number - 1],
            ROWS[first],
        ]
        assert place(file, chunk, 1) == f"{file.address}: row {first + 2}"
        first += number
    assert pickle.loads(pickle.dumps(file)) == file


@pytest.mark.parametrize("whole", [True, False])
def test_parquet_row_groups_are_divided(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(tables, "CHUNK_ROWS", 8)
    monkeypatch.setattr(tables, "WHOLE_GROUP_BYTES", tables.WHOLE_GROUP_BYTES if whole else 0)
    monkeypatch.setattr(tables, "RECENTLY_READ", RecentlyRead())
    pq.write_table(make_table(), tmp_path / "a.parquet", row_group_size=20)
    (file,) = locate(str(tmp_path / "a.parquet"))
    check(file, (8, 8, 4, 8, 8, 4, 8, 2))


def test_a_row_group_is_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK_ROWS", 8)
    decoded = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, group, **more: decoded.append(group) or read(self, group, **more)
    )
    pq.write_table(make_table(), tmp_path / "a.parquet", row_group_size=20)
    (file,) = locate(str(tmp_path / "a.parquet"))
    for chunk in (4, 3, 5, 3):
        read_rows(file, chunk, [0])
    assert decoded == [1]


@pytest.mark.parametrize("write", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_arrow_record_batches(tmp_path, write, compression):
    table = make_table()
    path = str(tmp_path / "a.arrow")
    with write(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table.slice(0, 40), max_chunksize=15)
        writer.write_table(table.slice(0, 0))
        writer.write_table(table.slice(40))
    (file,) = locate(path)
    check(file, (15, 15, 10, 10))


def test_dictionaries_that_grow(tmp_path):
    """A stream may send another dictionary before each batch."""
    field = pa.dictionary(pa.int32(), pa.string())
    path = str(tmp_path / "a.arrow")
    batches = [
        pa.record_batch([pa.array(words).dictionary_encode().cast(field)], names=["word"])
        for words in (["a", "b"], ["b", "c", "b"])
    ]
    with pa.ipc.new_stream(path, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    (file,) = locate(path)
    assert [row.columns["word"] for _, row in read_all(file)] == ["a", "b", "b", "c", "b"]


def test_wide_schemas(tmp_path):
    """The metadata of a message may be longer than what is read of it at first."""
    table = pa.table({f"column {number}": [number] for number in range(500)})
    path = str(tmp_path / "a.arrow")
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    (file,) = locate(path)
    assert read_rows(file, 0, [0])[0].columns == table.to_pylist()[0]


def test_text_that_is_no_utf_8_is_a_fault_of_its_row(tmp_path):
    words = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"word": words}), tmp_path / "a.parquet")
    (file,) = locate(str(tmp_path / "a.parquet"))
    good, bad = read_rows(file, 0, [0, 1])
    assert good.columns == {"word": "a"}
    assert bad.columns is None
    assert bad.fault.startswith("cannot be read: 'utf-8' codec can't decode byte 0xff")


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(path) -> str:
    with pytest.raises(RequestError) as refused:
        [read_all(file) for file in locate(str(path))]
    (message,) = refused.value.messages
    return message.replace(str(path), path.name)


@pytest.mark.parametrize("content", [b"", b"PAR1"])
def test_what_is_no_table(tmp_path, content):
    for name in ("a.parquet", "a.arrow"):
        path = tmp_path / name
        path.write_bytes(content)
        if not content:
            assert refusal(path) == f"{name}: is empty; a data set needs at least one row"
        else:
            kind = "a Parquet" if name == "a.parquet" else "an Arrow"
            assert refusal(path).startswith(f"{name}: not {kind} file: ")


def test_tables_without_rows(tmp_path):
    empty = make_table().slice(0, 0)
    pq.write_table(empty, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), empty.schema) as writer:
        writer.write_table(empty)
    for name in ("a.parquet", "a.arrow"):
        assert refusal(tmp_path / name) == f"{name}: is empty; a data set needs at least one row"


def test_a_corrupt_row_group_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(make_table(), path, row_group_size=20)
    start = pq.read_metadata(path).row_group(1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(data)
    assert refusal(path).startswith("a.parquet: row group 2 of 3 cannot be read: ")


def test_an_arrow_file_that_ends_early(tmp_path):
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(str(path), make_table().schema) as writer:
        writer.write_table(make_table())
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(path).startswith("a.arrow: not an Arrow file: the file ends within a message (at byte ")


def test_a_corrupt_record_batch_is_named(tmp_path):
    path = tmp_path / "a.arrow"
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(str(path), make_table().schema, options=options) as writer:
        writer.write_table(make_table())
    (file,) = locate(str(path))
    data = bytearray(path.read_bytes())
    middle = file.parts[0].start + file.parts[0].length // 2
    data[middle:-8] = b"\xff" * (len(data) - 8 - middle)
    path.write_bytes(data)
    assert refusal(path).startswith("a.arrow: record batch 1 of 1 cannot be read: ")
