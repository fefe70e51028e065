"""Means of what is measured: over ranks, since they were last read, and none of nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from rayloom.train.means import Means


def of(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_the_mean_of_every_element_since_the_last_time() -> None:
    means = Means()
    means.add({"a": of(1.0, 2.0), "b": of(5.0)})
    means.add({"a": of(9.0)})
    assert means.read("cpu") == {"a": 4.0, "b": 5.0}
    assert means.read("cpu") == {"a": 4.0, "b": 5.0}  # nothing came: those of the last time
    means.add({"a": of(-1.0)})
    assert means.read("cpu") == {"a": -1.0}


def test_of_nothing_there_is_no_mean() -> None:
    """A set without an answer: 0 would pass for its reward, and for the best one where others are below it."""
    means = Means()
    means.add({"reward": of(), "answer_tokens": of()})
    assert means.read("cpu") == {}
    means.add({"reward": of(), "answer_tokens": of(0.0)})
    assert means.read("cpu") == {"answer_tokens": 0.0}


def test_what_is_no_number_stays_none() -> None:
    means = Means()
    means.add({"reward": of(1.0, math.nan)})
    assert math.isnan(means.read("cpu")["reward"])


def _rank(rank: int, file: str, answers: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        means = Means()
        if rank == 0:
            means.add({"everywhere": of(1.0, 2.0), "first": of(7.0), "nowhere": of()})
        else:
            means.add({"everywhere": of(9.0), "first": of(), "nowhere": of(), "never": of()})
        answers.put((rank, means.read("cpu"), means.read("cpu")))
    finally:
        torch.distributed.destroy_process_group()


def test_all_ranks_have_the_same_names(tmp_path: Path) -> None:
    """Also of what one of them has nothing of, or has never heard of."""
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path / "ranks"), answers), nprocs=2)
    found = {"everywhere": 4.0, "first": 7.0}
    assert sorted(answers.get() for _ in range(2)) == [(0, found, found), (1, found, found)]
