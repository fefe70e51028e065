"""`rayloom data stats` and `rayloom data prepare` on a real Ray."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tests.ray.small_jobs import job, write_rows

from rayloom.data.measure import SetStatistics
from rayloom.errors import RequestError
from rayloom.models.tokenizer import load_tokenizer
from rayloom.train.preparation import prepare
from rayloom.train.statistics import draw, measure, show

pytestmark = pytest.mark.usefixtures("connected")


def console() -> Console:
    return Console(file=io.StringIO(), width=160)


def test_statistics_of_every_row(tiny_model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 70)
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows, *rows[:5], "no json"]))
    other = write_rows(tmp_path / "other.jsonl", 10, seed=3)
    config = job(
        tiny_model, tmp_path, [{"path": str(path)}, {"path": str(other)}], data={"cutoff": 40, "on_bad_row": "skip"}
    )
    first, second = measure(config, console())
    tokenizer = load_tokenizer(str(tiny_model))
    lengths = sorted(
        len(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
            )["input_ids"]
        )
        for row in map(json.loads, [*rows, *rows[:5]])
    )
    assert first.lengths.tolist() == lengths
    assert (first.rows, first.duplicates, first.dropped["cannot be read"]) == (76, 5, 1)
    assert first.longer == sum(length > 40 for length in lengths) > 0
    assert first.tokens_over == sum(max(0, length - 40) for length in lengths)
    assert (second.rows, second.duplicates) == (10, 0)
    shown = console()
    show([first, second], 40, shown)
    text: str = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "1 left out: cannot be read" in text
    draw([first, second], 40, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(first, SetStatistics)


def test_a_bad_row_ends_the_preparation(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    long = {"instruction": "Q", "output": "x" * 3000}
    path.write_text("".join(json.dumps(long) + "\n" for _ in range(2500)) + '{"instruction": "Q"}\n')
    config = job(tiny_model, tmp_path, [{"path": str(path)}])
    with pytest.raises(RequestError, match=r"rows\.jsonl:2501: row 2501: has no column 'output'"):
        prepare(config, console())
    assert not list((tmp_path / "prepared").glob("*/complete.json"))
