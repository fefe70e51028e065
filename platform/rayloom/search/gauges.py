"""What Prometheus reads of a search, under its name: gauges of Ray, whose texts are in `rayloom.train.gauges`."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

from rayloom.search.results import FAILED, FINISHED, STOPPED, Ledger

STATUSES = ("waiting", "running", FINISHED, STOPPED, FAILED)
"""What a trial can be; `waiting`: it has not begun."""


class Book(Protocol):
    """Takes the value of a measure: `rayloom.train.gauges.Gauges`."""

    def set(self, measure: str, value: float, of: str = "") -> Any: ...


def show_search(book: Book, ledger: Ledger, trials: int) -> None:
    """How a search stands.

    Args:
        trials: how many there will be.
    """
    counts = Counter(trial["status"] for trial in ledger["trials"])
    counts["waiting"] = trials - len(ledger["trials"])
    for status in STATUSES:
        book.set("search_trials", counts[status], status)
    values = [trial["value"] for trial in ledger["trials"] if trial["value"] is not None]
    if values:
        best = min(values) if ledger["mode"] == "min" else max(values)
        book.set("search_best", best, ledger["metric"])
    if "exploits" in ledger:
        book.set("search_exploits", len(ledger["exploits"]))
