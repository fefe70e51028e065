"""The job file: where things were written, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.job_text import JOB

from rayloom.config.document import dump_document, read_document
from rayloom.config.job import JobConfig
from rayloom.config.read import read_job
from rayloom.errors import RequestError


def refusal(path: Path, *overrides: str) -> list[str]:
    """The messages of a refused job, without the folder of the file."""
    with pytest.raises(RequestError) as refused:
        read_job(path, overrides)
    return [message.replace(str(path), "job.yaml") for message in refused.value.messages]


def refusal_of(path: Path, text: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    return refusal(path)


# --- places ---------------------------------------------------------------------------------------------------------


def test_every_key_and_entry_has_its_line(job_file):
    document = read_document(job_file)
    lines = {location: int(place.rpartition(":")[2]) for location, place in document.places.items()}
    assert all(place.startswith(f"{job_file}:") for place in document.places.values())
    assert lines == {
        ("name",): 1,
        ("model",): 2,
        ("model", "path"): 3,
        ("data",): 4,
        ("data", "train"): 5,
        ("data", "train", 0): 6,
        ("data", "train", 0, "path"): 6,
        ("data", "train", 1): 7,
    }


def test_what_was_not_written_is_placed_at_what_holds_it(job_file):
    document = read_document(job_file)
    assert document.place(("data", "train", 1, "weight")) == f"{job_file}:7"
    assert document.place(("data", "mix")) == f"{job_file}:4"
    assert document.place(("train", "epochs")) == str(job_file)


def test_anchors_aliases_and_merges_are_read(job_file):
    job_file.write_text(
        "name: &n abc\noutput_dir: *n\nmodel: {path: m}\ndata:\n  mix: interleave_once\n  train:\n"
        "  - &first {path: x.jsonl, weight: 2}\n  - {<<: *first, path: y.jsonl}\n"
    )
    job = read_job(job_file)
    assert job.output_dir == "abc"
    assert [(item.path, item.weight) for item in job.data.train] == [("x.jsonl", 2.0), ("y.jsonl", 2.0)]


def test_a_fault_behind_an_alias_is_placed_where_it_is_written(job_file):
    text = "name: a\nmodel: {path: m}\ndata:\n  train:\n  - &s {path: x.jsonl, weigth: 1}\n  - *s\n"
    assert refusal_of(job_file, text) == [
        "job.yaml:5: unknown key 'data.train[0].weigth'; did you mean 'weight'?",
        "job.yaml:5: unknown key 'data.train[1].weigth'; did you mean 'weight'?",
    ]


# --- what is no job file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "job.yaml:2:1: not YAML: key 'name' stands here twice"),
        ("train: {seed: 1, seed: 2}\n", "job.yaml:1:18: not YAML: key 'seed' stands here twice"),
        ("data:\n  train:\n  - path: a\n    path: b\n", "job.yaml:4:5: not YAML: key 'path' stands here twice"),
        ("a: b: c", "job.yaml:1:5: not YAML: mapping values are not allowed here"),
        ("name: a\n\tb: c", "job.yaml:2:1: not YAML: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2\n", "job.yaml:2:1: not YAML: but found another document"),
        ("1: x\n", "job.yaml:1:1: not YAML: a key must be text, not '1'; put it in quotes"),
        ("on: x\n", "job.yaml:1:1: not YAML: a key must be text, not 'on'; put it in quotes"),
        ("? [a, b]\n: x\n", "job.yaml:1:3: not YAML: a key must be text, not a sequence"),
        ("name: 2024-13-45\n", "job.yaml: not YAML: month must be in 1..12"),
        ("name: 0x_\n", "job.yaml: not YAML: invalid literal for int() with base 16: ''"),
        (
            "a: " + "[" * 3000,
            "job.yaml: not YAML: nested too deeply, or an alias stands within its own anchor",
        ),
        (
            "",
            "job.yaml: a job file is a mapping of keys such as `name:` and `model:`; this is an empty file",
        ),
        (
            "# nothing\n",
            "job.yaml: a job file is a mapping of keys such as `name:` and `model:`; this is an empty file",
        ),
        ("[a]", "job.yaml: a job file is a mapping of keys such as `name:` and `model:`; this is a list"),
        ("just text", "job.yaml: a job file is a mapping of keys such as `name:` and `model:`; this is a str"),
    ],
)
def test_what_is_no_job_file(job_file, text, message):
    assert refusal_of(job_file, text) == [message]


def test_python_objects_are_not_made(job_file, tmp_path):
    made = tmp_path / "made"
    (message,) = refusal_of(job_file, f"name: !!python/object/apply:os.mkdir ['{made}']\n")
    assert message.startswith("job.yaml:1:7: not YAML: could not determine a constructor for the tag")
    assert not made.exists()


def test_an_alias_within_its_own_anchor(job_file):
    assert refusal_of(job_file, JOB + "zzz: &a {b: *a}\n") == [f"job.yaml:8: unknown key 'zzz'; known here: {TOP}"]
    assert refusal_of(job_file, JOB + "train: &a {seed: [*a]}\n") == [
        "job.yaml:8: train.seed: must be a whole number, not [{'seed': [...]}]"
    ]


def test_aliases_that_multiply_cost_nothing(job_file):
    """Ten levels of ten aliases each stand for 10^10 entries."""
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 11)]
    job_file.write_text("\n".join(levels))
    assert len(read_document(job_file).places) == 11 + 110


def test_missing_file_folder_and_binary(tmp_path):
    def message(path: Path) -> str:
        with pytest.raises(RequestError) as refused:
            read_job(path)
        (text,) = refused.value.messages
        return text

    assert message(tmp_path / "nope.yaml") == f"{tmp_path}/nope.yaml: no such job file"
    assert message(tmp_path) == f"{tmp_path}: is a folder; give the job's YAML file"
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"name: \xff\n")
    assert message(binary).startswith(f"{binary}: cannot be read as text: 'utf-8' codec can't decode byte 0xff")


# --- what is refused ------------------------------------------------------------------------------------------------

METHODS = "lora, full, freeze, oft, adapter, prompt, p_tuning, prefix, ia3, vera, peft"
TOP = "name, output_dir, resume, overwrite, model, method, data, stage, rewards, rollout, train, optimizer, search"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epochs: 1", f"unknown key 'epochs'; known here: {TOP}"),
        ("modle: 1", "unknown key 'modle'; did you mean 'model'?"),
        ("train: {epoch: 1}", "unknown key 'train.epoch'; did you mean 'epochs'?"),
        ("method: {rnk: 8}", "unknown key 'method.rnk'; did you mean 'rank'?"),
        ("method: {type: lora, rnk: 8}", "unknown key 'method.rnk'; did you mean 'rank'?"),
        ("method: {type: full, rank: 8}", "unknown key 'method.rank'; known here: type"),
        ("method: {lora: {rank: 8}}", "unknown key 'method.lora'; did you mean 'rslora'?"),
        ("method: {rank: 0}", "method.rank: must be at least 1, not 0"),
        ("method: {type: dora}", "method.type: unknown 'dora'; did you mean 'lora'?"),
        ("method: {type: qqq}", f"method.type: unknown 'qqq'; known here: {METHODS}"),
        ("method: {type: 3}", f"method.type: unknown '3'; known here: {METHODS}"),
        ("method: lora", "method: must be a mapping of keys, not 'lora'"),
        ("method: ", "method: must be a mapping of keys, not None"),
        ("method: {target: 3}", "method.target: must be text, not 3; else it must be a list"),
        ("method: {target: [q, 1]}", "method.target[1]: must be text, not 1"),
        ("method: {dropout: 1}", "method.dropout: must be below 1, not 1"),
        ("method: {dropout: -0.5}", "method.dropout: must be at least 0, not -0.5"),
        ("method: {alpha: 0}", "method.alpha: must be above 0, not 0"),
        ("method: {rank: 5000}", "method.rank: must be at most 4096, not 5000"),
        ("stage: {type: rlhf}", "stage.type: unknown 'rlhf'; known here: pretrain, sft, reward, dpo, kto, ppo, spin"),
        ("stage: sft", "stage: must be a mapping of keys, not 'sft'"),
        (
            "train: {scheduler: cosin}",
            "train.scheduler: unknown 'cosin'; did you mean 'cosine'? (one of cosine, linear, constant)",
        ),
        ("train: {scheduler: 3}", "train.scheduler: unknown 3; known here: cosine, linear, constant"),
        ("train: {epochs: 1.5}", "train.epochs: must be a whole number, not 1.5"),
        ("train: {epochs: many}", "train.epochs: must be a whole number, not 'many'"),
        ("train: {epochs: [1]}", "train.epochs: must be a whole number, not [1]"),
        ("train: {epochs: }", "train.epochs: must be a whole number, not None"),
        ("train: {epochs: 0}", "train.epochs: must be at least 1, not 0"),
        ("train: {learning_rate: fast}", "train.learning_rate: must be a number, not 'fast'"),
        ("train: {learning_rate: [1]}", "train.learning_rate: must be a number, not [1]"),
        ("train: {learning_rate: 0}", "train.learning_rate: must be above 0, not 0"),
        ("train: {learning_rate: .inf}", "train.learning_rate: must be a finite number, not inf"),
        ("train: {learning_rate: .nan}", "train.learning_rate: must be a finite number, not nan"),
        (
            "train: {activation_checkpointing: maybe}",
            "train.activation_checkpointing: must be true or false, not 'maybe'",
        ),
        ("train: {activation_checkpointing: 3}", "train.activation_checkpointing: must be true or false, not 3"),
        ("resume: []", "resume: must be true or false, not []"),
        ("train: {wait_for_resources: 1e6}", "train.wait_for_resources: must be at most 86400, not 1000000.0"),
        ("train: {precision: fp16, device: cpu}", "train: precision fp16 needs a GPU; on CPU use bf16, fp32 or auto"),
        ("train: 3", "train: must be a mapping of keys, not 3"),
        ("output_dir: ''", "output_dir: must not be empty, not ''"),
        ("output_dir: [a]", "output_dir: must be text, not ['a']"),
    ],
)
def test_a_fault_is_told_with_file_line_key_and_remedy(job_file, line, message):
    assert refusal_of(job_file, JOB + line + "\n") == [f"job.yaml:8: {message}"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b", "'a/b' must start with a letter or digit and hold only letters, digits, '.', '-' and '_'"),
        ("..", "'..' must start with a letter or digit and hold only letters, digits, '.', '-' and '_'"),
        ('"a\\n"', "'a\\n' must start with a letter or digit and hold only letters, digits, '.', '-' and '_'"),
        ("''", "must not be empty, not ''"),
        ("7", "must be text, not 7"),
        ("x" * 101, f"must be shorter, not '{'x' * 101}'"),
    ],
)
def test_names_that_are_no_folder(job_file, name, message):
    assert refusal_of(job_file, JOB.replace("name: a", f"name: {name}")) == [f"job.yaml:1: name: {message}"]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("[]", "data.train: must not be empty, not []"),
        ("x.jsonl", "data.train: must be a list, not 'x.jsonl'"),
        ("[{}]", "data.train[0].path is missing"),
        ("[3]", "data.train[0]: must be a mapping of keys, not 3"),
        ("[{path: ''}]", "data.train[0].path: must not be empty, not ''"),
        ("[{path: x, weight: 0}]", "data.train[0].weight: must be above 0, not 0"),
        ("[{path: x, weight: -1}]", "data.train[0].weight: must be above 0, not -1"),
        ("[{path: x, weight: .inf}]", "data.train[0].weight: must be a finite number, not inf"),
        ("[{path: x, formt: auto}]", "unknown key 'data.train[0].formt'; did you mean 'format'?"),
        ("[a/x.jsonl, b/x.json]", "data.train: two data sets are named 'x'; give one of them another `name`"),
    ],
)
def test_faults_of_data_sets(job_file, sets, message):
    text = f"name: a\nmodel: {{path: m}}\ndata:\n  mix: interleave_once\n  train: {sets}\n"
    assert refusal_of(job_file, text) == [f"job.yaml:5: {message}"]


def test_weights_under_concat_are_refused(job_file):
    assert refusal(job_file, "data.train[0].weight=1") == [
        "job.yaml:4: data: `mix: concat` takes every row once, so a `weight` says nothing; "
        "leave the weights out or choose interleave_under, interleave_over or interleave_once"
    ]


def test_every_fault_has_one_message(job_file):
    text = JOB.replace("path: m", "pth: m") + "train: {epochs: 0, seed: x}\nzzz: 1\n"
    assert refusal_of(job_file, text) == [
        "job.yaml:2: model.path is missing",
        "job.yaml:3: unknown key 'model.pth'; did you mean 'path'?",
        "job.yaml:8: train.epochs: must be at least 1, not 0",
        "job.yaml:8: train.seed: must be a whole number, not 'x'",
        f"job.yaml:9: unknown key 'zzz'; known here: {TOP}",
    ]


def test_missing_parts(job_file):
    assert refusal_of(job_file, "output_dir: x\n") == [
        "job.yaml: name is missing",
        "job.yaml: model is missing",
        "job.yaml: data is missing",
    ]


# --- the models -----------------------------------------------------------------------------------------------------


def test_every_key_is_explained():
    schema = JobConfig.model_json_schema()
    definitions = schema["$defs"]
    keys = 0
    for part in [schema, *definitions.values()]:
        assert part.get("description", "").endswith("."), part["title"]
        for name, field in part["properties"].items():
            own = field.get("description")
            of_its_part = definitions[field["$ref"].rpartition("/")[2]]["description"] if "$ref" in field else None
            assert (own or of_its_part or "").strip(), f"{part['title']}.{name} has no docstring"
            keys += 1
    assert keys >= 40


def test_a_job_cannot_be_changed(job_file):
    job = read_job(job_file)
    with pytest.raises(ValueError, match="frozen"):
        job.name = "b"


def test_the_run_directory_is_absolute(job_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert read_job(job_file).run_dir == tmp_path / "runs" / "a"
    assert read_job(job_file, ["output_dir=~/out"]).run_dir == Path("/home/me/out/a")


@pytest.mark.parametrize("text", ["epochs: yes", "batch_size: true", "learning_rate: on", "max_steps: no"])
def test_true_is_no_number(job_file, text):
    (message,) = refusal_of(job_file, JOB + f"train: {{{text}}}\n")
    key = text.partition(":")[0]
    assert message.startswith(f"job.yaml:8: train.{key}: must be a ")
    assert message.endswith((", not True", ", not False"))


# --- what follows from what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "packs", "groups"),
    [
        ({"type": "pretrain"}, True, False),
        ({"type": "sft"}, True, False),
        ({"type": "reward"}, False, True),
        ({"type": "dpo"}, False, True),
        ({"type": "kto"}, False, True),
        ({"type": "ppo"}, False, False),
    ],
)
def test_rows_come_by_length_where_they_are_alone_and_each_counts_alike(job_file, stage, packs, groups):
    """By length, batches of texts would weigh a token by its text's length; pairs and judgements are averaged."""
    text = dump_document({"stage": stage})
    job_file.write_text(job_file.read_text(encoding="utf-8") + text, encoding="utf-8")
    job = read_job(job_file)
    assert (job.packs, job.groups_by_length) == (packs, groups)
    for wish in (True, False):
        said = read_job(job_file, ["data.packing=false", f"data.group_by_length={str(wish).lower()}"])
        assert (said.packs, said.groups_by_length) == (False, wish)
