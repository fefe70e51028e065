"""The matrix as a page."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

_HEAD = """# Every causal language model of transformers, trained

Made by `make matrix` on {date} with {versions}, on CPU in fp32. Do not edit.

**{passes} of {all} model types pass**, {refused} are refused with a reason, {fails} {fail}.
{packs} of those that pass keep packed examples exactly apart; the others are refused with `data.packing: true`.

Each type: a tiny random model of it is saved, loaded as a job loads it, and gets LoRA adapters on every linear layer
(`method: {{type: lora}}`). Two AdamW steps at 0.01 on two rows of tokens: the loss falls, and nothing but adapters
moves. The adapter is saved; another process loads base and adapter: the same logits; merges them: the same logits.

Encoders (BERT and its kin) are told to decode, `is_decoder: true` in their config.json; without it a job is refused.
Of encoder-decoders (BART and its kin) it is the decoder alone that trains here; a checkpoint of the whole is refused.

- *adapted*: share of the weights that a token is multiplied with which have an adapter. It is low where experts stand
  in one parameter of three dimensions, which is no linear layer. *idle*: adapters that did not move, as no text
  reaches them (cross-attention of decoders, parts that see) or none of their tokens went there (experts).
- *loaded*, *merged*: largest difference of a logit; the limit is 1e-4.
- *packing*: two examples in one row with positions that begin again, against rows of their own: "exact" if the loss and
  every logit agree within 1e-4.

| type | class | kind | heads | tied | size | layers | adapted | idle | loss | loaded | merged | packing | result |
|---|---|---|---|---|--:|--:|--:|--:|---|--:|--:|---|---|
"""


def write_page(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows as `run_matrix.run` yields them, in their order."""
    counts = Counter(row["result"] for row in rows)
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
    head = _HEAD.format(
        date=datetime.date.today().isoformat(),
        versions=versions,
        all=len(rows),
        fail="fails" if counts["fails"] == 1 else "fail",
        packs=sum(row["result"] == "passes" and row["packing"] for row in rows),
        **{result: counts[result] for result in ("passes", "refused", "fails")},
    )
    lines = ("| " + " | ".join(_cells(row)) + " |\n" for row in rows)
    path.write_text(head + "".join(lines), encoding="utf-8")


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield from (row["type"], row["class"])
    if row["result"] != "passes":
        yield from ("",) * 11
        yield f"**{row['result']}**: {row['reason'].replace('|', '/')}"
        return
    yield from (row["kind"], row["heads"], "yes" if row["tied"] else "no", f"{row['parameters'] / 1000:.0f}k")
    yield from (str(row["modules"]), f"{row['share']:.0%}", str(row["idle"] or ""))
    yield f"{row['loss_before']:.3f} → {row['loss_after']:.3f}"
    yield from (f"{row['loaded']:.1g}", f"{row['merged']:.1g}")
    yield from ("exact" if row["packing"] else "no: it " + row["why_not_packed"], "passes")
