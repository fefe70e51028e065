"""Writes `sums.jsonl`: every sum of two numbers from 1 to 20, as a question and its answer, in a fixed random order."""

from __future__ import annotations

import json
import random
from pathlib import Path

pairs = [(a, b) for a in range(1, 21) for b in range(1, 21)]
random.Random(0).shuffle(pairs)
rows = [{"instruction": f"What is {a} + {b}?", "output": str(a + b)} for a, b in pairs]
Path(__file__).with_name("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
