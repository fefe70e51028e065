"""The shipped demo data: its formats, its answers, and that the script remakes it byte for byte."""

import ast
import json
import re
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from rayloom.config.read import read_job
from rayloom.data.index import check_rows, make_plan
from rayloom.stages.prepare import segment_options

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "jobs" / "data"
SUM = re.compile(r"([\d.]+(?: [+×÷-] [\d.]+)+) = ([\d.]*\d)")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def identity() -> list[dict]:
    return read_lines(DATA / "identity.jsonl")


@pytest.fixture(scope="module")
def instructions() -> list[list[dict]]:
    rows = read_lines(DATA / "instructions.jsonl")
    assert all(set(row) == {"messages"} for row in rows)
    return [row["messages"] for row in rows]


def answers(rows: list[list[dict]]) -> list[str]:
    return [message["content"] for messages in rows for message in messages if message["role"] == "assistant"]


def test_identity_rows(identity):
    assert len(identity) >= 90
    assert all(set(row) == {"instruction", "output"} for row in identity)
    assert all(row["instruction"].strip() and 8 <= len(row["output"].split()) <= 30 for row in identity)
    assert len({(row["instruction"], row["output"]) for row in identity}) == len(identity)


def test_identity_is_consistent(identity):
    assert all("Loomis" in row["output"] or "Rayloom" in row["output"] for row in identity)
    direct = [row["output"] for row in identity if row["instruction"] == "Who are you?"]
    assert len(direct) >= 2
    assert all(output.startswith("I am Loomis, an assistant fine-tuned with Rayloom.") for output in direct)


def test_script_remakes_the_shipped_file(tmp_path):
    output = tmp_path / "instructions.jsonl"
    command = [sys.executable, "-B", str(DATA / "make_instructions.py"), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert output.read_bytes() == (DATA / "instructions.jsonl").read_bytes()


def test_instruction_roles_and_contents(instructions):
    assert len(instructions) == 1200
    for messages in instructions:
        roles = [message["role"] for message in messages]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert 1 <= len(roles) // 2 <= 3
        assert all(set(message) == {"role", "content"} and message["content"].strip() for message in messages)


def test_instructions_are_distinct_and_mixed(instructions):
    assert len({json.dumps(messages) for messages in instructions}) == len(instructions)
    firsts = {next(m["content"] for m in messages if m["role"] == "user") for messages in instructions}
    assert len(firsts) >= 1000
    with_system = sum(messages[0]["role"] == "system" for messages in instructions)
    with_turns = sum(sum(m["role"] == "user" for m in messages) > 1 for messages in instructions)
    assert 0.1 < with_system / len(instructions) < 0.2
    assert 0.1 < with_turns / len(instructions) < 0.2


def test_instructions_leave_identity_alone(instructions):
    text = json.dumps(instructions).lower()
    assert not any(word in text for word in ("loomis", "rayloom", "who are you", "your name"))


def test_arithmetic_is_right(instructions):
    sums = [found for answer in answers(instructions) for found in SUM.findall(answer)]
    assert len(sums) > 150
    for expression, result in sums:
        # The pattern lets only numbers and the four signs through.
        exact = re.sub(r"[\d.]+", r"Fraction('\g<0>')", expression).replace("×", "*").replace("÷", "/")
        assert eval(exact, {"Fraction": Fraction}) == Fraction(result), (expression, result)


def test_code_and_json_parse(instructions):
    blocks = [code for answer in answers(instructions) for code in re.findall(r"```python\n(.*?)```", answer, re.S)]
    objects = [answer for answer in answers(instructions) if answer.startswith("{")]
    assert len(blocks) > 20
    assert len(objects) > 20
    for block in blocks:
        ast.parse(block)
    for text in objects:
        assert json.loads(text)


def test_printed_values_are_right(instructions):
    """Evaluate the argument of each print call that is asked about."""
    checked = 0
    for messages in instructions:
        for question, answer in pairwise(messages):
            call = re.search(r"print\((.*)\)(?:`|$)", question["content"])
            printed = re.match(r"(?:It|That) prints `(.*?)`", answer["content"])
            if question["role"] == "user" and call and printed:
                assert str(eval(call[1], {})) == printed[1], question["content"]
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("jobs/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_a_job_with_data(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job = read_job(recipe)
    plan = make_plan(job.data, seed=0, epochs=1)
    check_rows(plan, segment_options(job))
