"""What has been trained on so far: counted from the rows themselves, the same on every rank."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayloom.data.plan import Position
from rayloom.data.rows import COUNTERS, CURSOR_NUMBERS, position_from, second_start

STREAM_FILE = "stream.json"


@dataclass
class StreamMeter:
    """Counts over all ranks since the job began, resumes included. Saved in every checkpoint."""

    position: Position
    examples: list[int]
    """Examples trained on, per data set."""
    counts: list[int]
    """`rayloom.data.rows.COUNTERS` of each data set, sets first."""
    tokens: int = 0
    """Tokens that are not padding."""
    trained_tokens: int = 0
    """Tokens that a loss was computed on."""
    epochs_done: float = 0.0
    """Epochs of the stream that are done; 1.25 is a quarter into the second."""
    skipped_steps: int = 0
    """Steps whose loss or gradients were bad and that were not made."""
    first_loss: float | None = None
    """The mean loss of the first step, from which it follows what is far too large."""

    @classmethod
    def start(cls, sets: int) -> StreamMeter:
        """At the beginning of a stream of `sets` data sets."""
        return cls(Position(), [0] * sets, [0] * (sets * len(COUNTERS)))

    def save(self, folder: Path, step: int) -> None:
        state = {**self.__dict__, "position": self.position.as_dict(), "step": step}
        (folder / STREAM_FILE).write_text(json.dumps(state), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> tuple[StreamMeter, int]:
        """The meter in a checkpoint folder, and the step after which it was saved."""
        state = json.loads((folder / STREAM_FILE).read_text(encoding="utf-8"))
        step = state.pop("step")
        return cls(**{**state, "position": Position.from_dict(state["position"])}), step


_COUNTS = 4  # before the counts per set: tokens, trained tokens, wishes to stop, batches


@dataclass
class BatchCount:
    """One rank's share of one optimizer step."""

    sets: int
    numbers: list[int] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    """The position behind the last row: epoch, segment, row, and `rayloom.data.rows.flatten_cursors`."""
    epochs_done: float = 0.0
    names: list[tuple[int, int]] = field(default_factory=list)
    """(set, row) of each example."""

    def __post_init__(self) -> None:
        self.numbers = [0] * (_COUNTS + self.sets + self.sets * len(COUNTERS))
        self.behind = [0] * (3 + CURSOR_NUMBERS * self.sets)

    def add(self, table: pa.Table) -> None:
        """Count a batch of token rows."""
        self.numbers[3] += 1
        for row in table.drop_columns(["input_ids", "position_ids", "labels"]).to_pylist():
            self.behind = [row["epoch"], row["segment"], row["row"] + 1, *row["cursors"]]
            self.epochs_done = row["epochs_done"]
            self.names += zip(row["sets"], row["rows"], strict=True)
            for set_index, is_continued in zip(row["sets"], row["continued"], strict=True):
                self.numbers[_COUNTS + set_index] += not is_continued
            for index, count in enumerate(row["counts"]):
                self.numbers[_COUNTS + self.sets + index] += count
        self.numbers[0] += sum(len(ids) for ids in table["input_ids"])
        # The first token of a row is predicted by nothing, so it is not trained even where it has a label.
        for row in range(table.num_rows):
            labels = table["labels"][row].values.to_numpy()
            if table["desirable"][row].as_py() >= 0:  # what stands behind a judged answer is only compared with it
                labels = labels[: second_start(table["position_ids"][row].values.to_numpy()) or None]
            self.numbers[1] += int((labels[1:] >= 0).sum())

    def share(self, device: Any, stop: bool) -> StepCount:
        """Sum over all ranks: one collective call. `stop` counts where any rank says it."""
        import torch  # not needed by the driver, which reads meters from checkpoints

        self.numbers[2] = int(stop)
        mine = torch.tensor([self.epochs_done, *self.behind, *self.numbers], dtype=torch.float64, device=device)
        everyone = [mine]
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(everyone, mine)
        rows = torch.stack(everyone).cpu()
        start = 1 + len(self.behind)
        behind = max(rows[:, 1:start].long().tolist())  # epoch, segment and row come first
        totals = [int(total) for total in rows[:, start:].sum(dim=0)]
        return StepCount(position_from(behind), float(rows[:, 0].max()), totals, self.sets)


@dataclass(frozen=True)
class StepCount:
    """All ranks' share of one optimizer step."""

    position: Position
    epochs_done: float
    numbers: list[int]
    sets: int

    @property
    def tokens(self) -> int:
        return self.numbers[0]

    @property
    def trained_tokens(self) -> int:
        return self.numbers[1]

    @property
    def examples(self) -> int:
        return sum(self.numbers[_COUNTS : _COUNTS + self.sets])

    @property
    def batches(self) -> int:
        return self.numbers[3]

    @property
    def stop(self) -> bool:
        return self.numbers[2] > 0

    def add_to(self, meter: StreamMeter, *, tokens: bool = True) -> None:
        """Count the step as trained on; without `tokens`, all but these."""
        meter.position = self.position
        meter.epochs_done = self.epochs_done
        if tokens:
            meter.tokens += self.tokens
            meter.trained_tokens += self.trained_tokens
        counts = self.numbers[_COUNTS:]
        meter.examples = [a + b for a, b in zip(meter.examples, counts[: self.sets], strict=True)]
        meter.counts = [a + b for a, b in zip(meter.counts, counts[self.sets :], strict=True)]
