"""`rayloom schema`: the JSON Schema and the list of keys say what `JobConfig` accepts."""

from __future__ import annotations

import io
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from rayloom.config.job import JobConfig
from rayloom.config.reference import markdown, show_keys
from rayloom.config.schema import find_keys, job_reference, job_schema
from rayloom.data.config import DatasetConfig
from rayloom.errors import RequestError


def job(**parts: Any) -> dict[str, Any]:
    return {"name": "a", "model": {"path": "m"}, "data": {"train": ["a.jsonl"]}, **parts}


@pytest.mark.parametrize(
    ("document", "is_right"),
    [
        (job(), True),
        (job(data={"train": ["a.jsonl", {"path": "b.json", "weight": 0.5}], "mix": "interleave_over"}), True),
        (job(method={}), True),
        (job(method={"rank": 4}), True),
        (job(method={"type": "lora", "target": ["q_proj"]}), True),
        (job(method={"type": "full"}), True),
        (job(train={"learning_rate": 1e-4, "max_steps": None}), True),
        (job(optimizer={"beta2": 0.95}), True),
        (job(optimizer={"type": "adamw_8bit"}), True),
        (job(method={"type": "full"}, optimizer={"type": "galore_adamw_8bit", "rank": 4}), True),
        (job(optimizer={"rank": 4}), False),
        (job(optimizer={"type": "adamw_torch", "rank": 4}), False),
        (job(optimizer={"type": "adam"}), False),
        (job(method={"type": "full", "rank": 4}), False),
        (job(method={"type": "bitfit"}), False),
        (job(model={"path": "m", "quantization": "nf4"}), True),
        (job(model={"path": "m", "quantization": {"type": "hqq", "bits": 2}}), True),
        (job(model={"path": "m", "quantization": None}), True),
        (job(model={"path": "m", "quantization": "nf5"}), False),
        (job(model={"path": "m", "quantization": {"bits": 2}}), False),
        (job(train={"epochs": 0}), False),
        (job(train={"deepspeed": "zero4"}), False),
        (job(trian={}), False),
        (job(data={"train": []}), False),
        (job(data={"train": [{"weight": 1.0}]}), False),
        ({"name": "a", "model": {"path": "m"}}, False),
    ],
)
def test_schema_and_models_agree(document: dict[str, Any], is_right: bool) -> None:
    schema = job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert jsonschema.Draft202012Validator(schema).is_valid(document) == is_right
    if is_right:
        JobConfig.model_validate(document)
    else:
        with pytest.raises(ValueError, match="validation error"):
            JobConfig.model_validate(document)


def test_schema_names_its_dialect_and_explains_every_key() -> None:
    schema = job_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    assert schema["title"] == "Rayloom job"
    for key in (key for section in job_reference() for key in section.keys):
        assert key.meaning.strip().endswith("."), f"{key.name} has no docstring, or half a sentence"
        assert "\n" not in key.meaning


def test_every_key_of_the_models_is_listed() -> None:
    names = {key.name for section in job_reference() for key in section.keys}
    assert {"name", "model.path", "method.rank", "data.train", "data.train[].weight", "train.deepspeed"} <= names
    assert {"model.quantization.type", "model.quantization.bits"} <= names
    assert {f"train.{name}" for name in JobConfig.model_fields["train"].annotation.model_fields} <= names


def test_a_key_has_type_default_and_meaning() -> None:
    (key,) = find_keys("train.epochs")
    assert (key.type, key.default) == ("whole number ≥ 1", "`1`")
    (key,) = find_keys("train.deepspeed")
    assert key.type == "`none`, `zero1`, `zero2` or `zero3`"
    (key,) = find_keys("model.path")
    assert (key.type, key.default) == ("text", "")
    (key,) = find_keys("train.learning_rate")
    assert key.default == "`0.0001`"
    (key,) = find_keys("train.max_steps")
    assert (key.type, key.default) == ("whole number ≥ 1 or `null`", "`null`")


def test_list_indices_may_be_left_out() -> None:
    assert find_keys("data.train.weight") == find_keys("data.train[0].weight") == find_keys("data.train[].weight")


def test_the_name_of_a_mapping_finds_the_keys_in_it() -> None:
    assert [key.name for key in find_keys("data.train")] == [
        f"data.train[].{name}" for name in DatasetConfig.model_fields
    ]
    assert {key.name for key in find_keys("method")} >= {"method.type", "method.rank"}


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("train.deepsped", "did you mean 'train.deepspeed'"),
        ("weight", "did you mean 'data.train.weight'"),
        ("qqqq", "rayloom schema --markdown"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(wrong: str, hint: str) -> None:
    with pytest.raises(RequestError, match="there is no key") as caught:
        find_keys(wrong)
    assert hint in str(caught.value)


def test_markdown_is_a_table_for_each_section() -> None:
    sections = job_reference()
    text = markdown(sections)
    assert text.count("\n## ") + text.startswith("## ") == len(sections)
    assert "| `train.workers` | whole number ≥ 1 | `1` | Ray Train workers" in text
    assert "## `method`, type `full`" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count(" | ") == 3, line


def test_shown_keys_are_coloured_on_a_terminal_and_plain_elsewhere() -> None:
    plain, terminal = io.StringIO(), io.StringIO()
    show_keys(find_keys("train.precision"), Console(file=plain, width=40))
    show_keys(
        find_keys("train.precision"), Console(file=terminal, width=80, force_terminal=True, color_system="standard")
    )
    assert "`auto`, `bf16`, `fp16`, `fp32` or `pure_bf16`; default `auto`" in plain.getvalue()
    assert "`" not in terminal.getvalue()
    assert "\x1b[36mauto\x1b[0m" in terminal.getvalue()
