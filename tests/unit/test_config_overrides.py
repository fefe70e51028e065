"""Overrides: what `key=value` reaches, and what is refused in which words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rayloom.config.document import parse_value
from rayloom.config.read import read_job
from rayloom.errors import RequestError

TOP = "name, output_dir, resume, overwrite, model, method, data, stage, rewards, rollout, train, optimizer"


def refusal(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RequestError) as refused:
        read_job(path, overrides)
    return list(refused.value.messages)


def test_overrides_replace_create_and_reach_into_lists(job_file):
    job = read_job(
        job_file,
        [
            "name=b",
            "train.learning_rate=1e-4",
            "train.epochs=3",
            "method.type=full",
            "data.mix=interleave_over",
            "data.train[0].weight=0.25",
            "data.train[1].weight=2",  # written as a plain path
            "data.train.1.name=second",
            "data.template=null",
            "data.template=t.jinja",
        ],
    )
    assert (job.name, job.train.learning_rate, job.train.epochs, job.method.type) == ("b", 1e-4, 3, "full")
    assert [(item.path, item.name, item.weight) for item in job.data.train] == [
        ("x.jsonl", "x", 0.25),
        ("y.jsonl", "second", 2.0),
    ]
    assert job.data.template == "t.jinja"


def test_an_override_may_replace_an_entry_or_all_of_a_list(job_file):
    assert [s.path for s in read_job(job_file, ["data.train[1]=z.json"]).data.train] == ["x.jsonl", "z.json"]
    assert [s.path for s in read_job(job_file, ["data.train=[{path: p.json}]"]).data.train] == ["p.json"]
    assert [s.path for s in read_job(job_file, ["data={train: [q.json]}"]).data.train] == ["q.json"]


def test_the_value_of_an_override_may_hold_equal_signs(job_file):
    assert read_job(job_file, ["model.path=a=b=c"]).model.path == "a=b=c"


def test_later_overrides_win(job_file):
    assert read_job(job_file, ["train.seed=1", "train.seed=2"]).train.seed == 2
    assert read_job(job_file, ["train={seed: 1}", "train.seed=2"]).train.seed == 2
    assert read_job(job_file, ["train.seed=1", "train={epochs: 2}"]).train.seed == 42


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("zzz=1", f"override 'zzz=1': the job has no key 'zzz'; known here: {TOP}"),
        ("train.sed=1", "override 'train.sed=1': train has no key 'sed'; did you mean 'seed'?"),
        (
            "data.train[0].weigth=1",
            "override 'data.train[0].weigth=1': data.train.0 has no key 'weigth'; did you mean 'weight'?",
        ),
        ("model.path.x=1", "override 'model.path.x=1': model.path has no key 'x'"),
        (
            "data.train[2]=z.json",
            "override 'data.train[2]=z.json': there is no entry 2; the job file has 2, counted from 0 "
            "(to replace the list, give all of it: data.train='[{path: a.jsonl}, {path: b.jsonl}]')",
        ),
        (
            "data.train[7].weight=1",
            "override 'data.train[7].weight=1': there is no entry 7; the job file has 2, counted from 0 "
            "(to replace the list, give all of it: data.train='[{path: a.jsonl}, {path: b.jsonl}]')",
        ),
        ("data.train.weight=1", "override 'data.train.weight=1': data.train is not a mapping in the job file"),
        ("name=[1", "override 'name=[1': the value '[1' is not YAML"),
        ("name=2024-13-45", "override 'name=2024-13-45': the value '2024-13-45' is not YAML"),
        ("train.epochs=x", "override 'train.epochs=x': train.epochs: must be a whole number, not 'x'"),
        ("train={epochs: 0}", "override 'train={epochs: 0}': train.epochs: must be at least 1, not 0"),
        ("name=1e5", "override 'name=1e5': name: must be text, not 100000.0"),
    ],
)
def test_overrides_that_are_refused(job_file, override, message):
    assert refusal(job_file, override) == [message]


@pytest.mark.parametrize(
    "override", ["x", "=3", ".=3", "[]=3", "train.=3", ".train=3", "train..seed=3", "data.train[x]=3", "train[seed]=3",
                 "data.train[0=3", "data.train]=3", "data.train[-1]=3", "[0]=3"]
)  # fmt: skip
def test_overrides_that_are_no_key_and_value(job_file, override):
    assert refusal(job_file, override) == [
        f"override {override!r}: write it as key=value, for example train.epochs=3 or data.train[0].weight=0.5"
    ]


def test_an_override_into_what_is_no_mapping(job_file):
    job_file.write_text("name: a\nmodel: m\ndata: d\n")
    assert refusal(job_file, "model.path=x") == ["override 'model.path=x': model is not a mapping in the job file"]
    assert refusal(job_file, "data.train[0].weight=1") == [
        "override 'data.train[0].weight=1': data is not a mapping in the job file"
    ]


def test_an_override_of_a_part_forgets_the_lines_within(job_file):
    assert refusal(job_file, "data.train=[{path: x, weigth: 1}]") == [
        "override 'data.train=[{path: x, weigth: 1}]': unknown key 'data.train[0].weigth'; did you mean 'weight'?"
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-4", 1e-4), ("-1.5E3", -1500.0), (".5", 0.5), ("1.", 1.0), ("true", True), ("null", None),
     ("", None), ("'3'", "3"), ("1e", "1e"), ("e5", "e5"), ("1.2.3", "1.2.3"), ("[1, a]", [1, "a"]),
     ("{a: 1e3}", {"a": 1000.0})],
)  # fmt: skip
def test_values_of_overrides(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_not_a_number_is_read_as_a_number():
    assert math.isnan(parse_value(".nan"))
