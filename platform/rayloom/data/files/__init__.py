"""Data files, read by range and never whole: files as chunks, and the rows of a chunk."""

from rayloom.data.files.data_file import DataFile, RawRow
from rayloom.data.files.locate import locate
from rayloom.data.files.read import count_rows, estimate_rows, place, read_rows

__all__ = ["DataFile", "RawRow", "count_rows", "estimate_rows", "locate", "place", "read_rows"]
