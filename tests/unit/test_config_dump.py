"""From a job back to YAML: what is stored in a run directory repeats the run."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from rayloom.config.document import dump_document, parse_value
from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job, read_job
from rayloom.data.config import DatasetConfig

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20) | st.sampled_from(
    [
        "1e5",
        "1e-5",
        ".5",
        "12:30",
        "null",
        "~",
        "true",
        "no",
        "0x1",
        "1_000",
        "2024-01-01",
        "=",
        "<<",
        "- a",
        "#",
        " a ",
    ]
)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
COUNT = st.integers(1, 10**20)


@st.composite
def jobs(draw: st.DrawFn) -> JobConfig:
    mix = draw(st.sampled_from(["concat", "interleave_under", "interleave_over", "interleave_once"]))
    weight = st.none() if mix == "concat" else st.none() | POSITIVE
    names = draw(st.lists(TEXT, min_size=1, max_size=3, unique=True))
    share = st.floats(0, 1, exclude_max=True)
    device = draw(st.sampled_from(["auto", "cpu", "gpu"]))
    lora = {
        "rank": st.integers(1, 4096),
        "alpha": st.none() | POSITIVE,
        "dropout": share,
        "target": st.just("all") | TEXT | st.lists(TEXT, max_size=3),
    }
    train = {
        "workers": COUNT,
        "device": st.just(device),
        "cpus_per_worker": POSITIVE,
        "learning_rate": POSITIVE,
        "warmup": share,
        "max_steps": st.none() | COUNT,
        "seed": st.integers(0, 2**70),
        "precision": st.sampled_from(["auto", "bf16", "fp32"] + ["fp16"] * (device != "cpu")),
    }
    fields: dict[str, Any] = {
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True) | st.sampled_from(["1e5", "0"])),
        "output_dir": draw(TEXT),
        "resume": draw(st.booleans()),
        "model": {"path": draw(TEXT)},
        "method": draw(st.fixed_dictionaries({}, optional=lora) | st.just({"type": "full"})),
        "data": {
            "mix": mix,
            "train": [{"path": draw(TEXT), "name": name, "weight": draw(weight)} for name in names],
            "template": draw(TEXT),
            "packing": draw(st.booleans()),
        },
        "train": draw(st.fixed_dictionaries({}, optional=train)),
    }
    return JobConfig.model_validate(fields)


@given(job=jobs())
def test_a_dumped_job_reads_as_the_same_job(job, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_job(job), encoding="utf-8")
    assert read_job(path) == job


def test_a_dumped_job_says_every_value(job_file):
    job = read_job(job_file)
    dumped = parse_value(dump_job(job))
    assert list(dumped) == list(JobConfig.model_fields)
    for part in ("data", "train", "method"):
        assert list(dumped[part]) == list(type(getattr(job, part)).model_fields)
    second = dumped["data"]["train"][1]
    assert list(second) == list(DatasetConfig.model_fields)
    assert (second["path"], second["format"], second["weight"], second["name"]) == ("y.jsonl", "auto", None, "y")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXT.filter(lambda key: key != "<<"), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(data=st.dictionaries(TEXT, PLAIN, max_size=4))
@example(data={"a": "1e5", "1e5": 1.0, "b": -0.0, "c": float("inf")})
def test_any_plain_data_survives_yaml(data):
    assert parse_value(dump_document(data)) == data
