"""`rayloom predict` from a file of prompts to a file of answers, and on from where it was ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.engine import reference
from transformers import AutoTokenizer


@pytest.mark.slow
def test_predict_writes_what_transformers_answers_and_goes_on_where_it_was(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"What is {number}?", "output": f"It is {number}."} for number in range(5)]
    del rows[3]["output"]  # a prompt needs no answer
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = tmp_path / "adapter"
    model = reference.adapted(tiny_model, 1)
    model.save_pretrained(adapter)
    job = tmp_path / "job.yaml"  # in bf16, a near tie of two tokens may fall either way
    job.write_text(
        f"name: tiny\nmodel: {{path: {tiny_model}}}\ndata: {{train: [{prompts}]}}\nstage: {{type: ppo}}\n"
        "rewards: {sources: [{type: unfinished}]}\nrollout: {precision: fp32}\n"
    )
    command = [
        sys.executable, "-m", "rayloom", "predict", str(job), "--prompts", str(prompts), "--output", str(output),
        "--adapter", str(adapter), "--max-tokens", "6",
    ]  # fmt: skip

    def run() -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)

    first = run()
    assert first.returncode == 0, first.stderr
    assert "finished: 5 rows" in first.stdout
    written = output.read_bytes()
    answers = [json.loads(line) for line in written.splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for number, answer in enumerate(answers):
        assert answer["row"] == number
        assert answer["reference"] == rows[number].get("output", "")
        assert answer["prompt"] == f"<|im_start|>user\nWhat is {number}?<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(answer["prompt"], add_special_tokens=False)["input_ids"]
        expected = reference.greedy(model, ids, 6, [tokenizer.eos_token_id])
        assert answer["answer"] == tokenizer.decode([t for t in expected if t != tokenizer.eos_token_id])
        assert answer["finish_reason"] in ("stop", "length")

    lines = written.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:7])  # as a run leaves it that was killed while it wrote
    second = run()
    assert second.returncode == 0, second.stderr
    assert "has 2 rows; going on behind them" in second.stdout
    assert output.read_bytes() == written
    refused = subprocess.run([*command, "--temperature", "1"], capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2
    assert "(sampling)" in refused.stderr
