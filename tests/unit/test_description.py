"""`dataset_info.json` as LlamaFactory has it: what it says, and in which words a wrong one is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rayloom.data.description import Columns, Description, Tags, read_descriptions
from rayloom.errors import RequestError

DEMOS = Path(__file__).parents[3] / "shared" / "data"


def written(folder: Path, content: Any) -> Path:
    path = folder / "dataset_info.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def faults(folder: Path, content: Any) -> list[str]:
    with pytest.raises(RequestError) as refused:
        read_descriptions(written(folder, content))
    return [message.replace(str(folder), "HERE") for message in refused.value.messages]


def test_columns_that_are_not_given_are_not_read():
    assert (Columns().prompt, Columns().query, Columns().response) == ("instruction", "input", "output")
    given = Columns(prompt="question")
    assert {name: column for name, column in given if column is not None} == {"prompt": "question"}
    assert Columns.model_validate({}) == Columns()


@given(columns=st.dictionaries(st.sampled_from(sorted(Columns.model_fields)), st.sampled_from("abc")))
def test_a_description_survives_being_written(columns):
    description = Description.model_validate({"columns": columns})
    assert Description.model_validate_json(description.model_dump_json()) == description
    assert Description.model_validate(description.model_dump(exclude_unset=True)) == description


def test_every_key_has_a_help_text():
    for model in (Description, Columns, Tags):
        assert all(field.description for field in model.model_fields.values())


def test_a_set_is_ranked_or_judged_not_both():
    with pytest.raises(ValidationError, match="exclude each other"):
        Description(ranking=True, columns=Columns(prompt="q", kto_tag="label"))


def test_an_entry_in_full(tmp_path):
    entry = {
        "hf_hub_url": "org/set",
        "file_name": "a.json",
        "formatting": "sharegpt",
        "ranking": True,
        "subset": "en",
        "split": "test",
        "folder": "python",
        "num_samples": 7,
        "columns": {"messages": "talk", "chosen": "chosen", "rejected": "rejected"},
        "tags": {"role_tag": "role"},
    }
    found = read_descriptions(written(tmp_path, {"one": entry}))["one"]
    assert (found.name, found.source, found.address) == ("one", "hf_hub_url", "org/set")
    assert (found.subset, found.split, found.folder, found.num_samples) == ("en", "test", "python", 7)
    assert found.description == Description(
        format="sharegpt",
        ranking=True,
        columns=Columns(messages="talk", chosen="chosen", rejected="rejected"),
        tags=Tags(role_tag="role"),
    )
    assert found.refusal is None


@pytest.mark.parametrize(
    ("keys", "source", "address"),
    [
        ("hf_hub_url ms_hub_url om_hub_url script_url cloud_file_name file_name", "hf_hub_url", "hf_hub_url"),
        ("cloud_file_name file_name", "cloud_file_name", "cloud_file_name"),
        ("ms_hub_url file_name", "file_name", "HERE/file_name"),
        ("ms_hub_url om_hub_url script_url", "ms_hub_url", "ms_hub_url"),
        ("om_hub_url script_url", "om_hub_url", "om_hub_url"),
        ("script_url", "script_url", "script_url"),
    ],
)
def test_where_the_rows_are(tmp_path, keys, source, address):
    """LlamaFactory's priority, but what cannot be read comes last."""
    written(tmp_path, {"one": {key: key for key in keys.split()}})
    found = read_descriptions(tmp_path)["one"]
    assert (found.source, found.address) == (source, address.replace("HERE", str(tmp_path)))
    assert (found.refusal is None) == (source in ("hf_hub_url", "cloud_file_name", "file_name"))


def test_a_set_that_cannot_be_read_says_why(tmp_path):
    found = read_descriptions(written(tmp_path, {"one": {"ms_hub_url": "org/set"}}))["one"]
    assert found.refusal == (
        f"{tmp_path}/dataset_info.json: 'one' is to be had only on ModelScope (ms_hub_url: org/set), which cannot be "
        "read; give one of hf_hub_url, cloud_file_name, file_name as well"
    )


def test_a_file_name_may_be_absolute(tmp_path):
    assert read_descriptions(written(tmp_path, {"one": {"file_name": "/a/b.json"}}))["one"].address == "/a/b.json"


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ({}, "alpaca"),
        ({"formatting": "openai"}, "openai"),
        ({"formatting": "own"}, "own"),
        ({"columns": {"prompt": "text"}}, "text"),
        ({"columns": {"prompt": "question", "response": "answer"}}, "alpaca"),
        ({"ranking": True, "columns": {"prompt": "q", "chosen": "c", "rejected": "r"}}, "alpaca"),
    ],
)
def test_the_format(tmp_path, entry, name):
    """An alpaca set without answers is LlamaFactory's way to describe plain text."""
    sets = read_descriptions(written(tmp_path, {"one": {"file_name": "a.json", **entry}}))
    assert sets["one"].description.format == name


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_nam": "a"}, "unknown key 'file_nam'; did you mean 'file_name'?"),
        ({"columns": {"promt": "a"}}, "unknown key 'columns.promt'; did you mean 'prompt'?"),
        ({"tags": {"user": "a"}}, "unknown key 'tags.user'; did you mean 'user_tag'?"),
        ({"ranking": "perhaps"}, "ranking: must be true or false, not 'perhaps'"),
        ({"num_samples": 0}, "num_samples: must be at least 1, not 0"),
        ({"num_samples": "7"}, "num_samples: must be a whole number, not '7'"),
        ({"split": 3}, "split: must be text, not 3"),
        ({"columns": {"prompt": ""}}, "columns.prompt: must not be empty, not ''"),
        ({"columns": ["prompt"]}, "columns: must be an object, not ['prompt']"),
        (
            {"ranking": True, "columns": {"kto_tag": "label"}},
            "`ranking` (two answers) and `columns.kto_tag` (one judged answer) exclude each other",
        ),
    ],
)
def test_entries_that_are_wrong(tmp_path, entry, message):
    assert faults(tmp_path, {"good": {"file_name": "a"}, "one": {"file_name": "a", **entry}}) == [
        f"HERE/dataset_info.json: 'one': {message}"
    ]


def test_every_fault_has_its_own_line(tmp_path):
    assert faults(tmp_path, {"one": {}, "two": "a.json", "three": {"file_name": "a", "split": 3, "xyz": 1}}) == [
        "HERE/dataset_info.json: 'one': does not say where its rows are; give one of hf_hub_url, cloud_file_name, "
        "file_name",
        "HERE/dataset_info.json: 'two': must be an object, not 'a.json'",
        "HERE/dataset_info.json: 'three': split: must be text, not 3",
        "HERE/dataset_info.json: 'three': unknown key 'xyz'; known here: hf_hub_url, ms_hub_url, om_hub_url, "
        "script_url, cloud_file_name, file_name, formatting, ranking, subset, split, folder, num_samples, columns, "
        "tags",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"one": {"file_name": }\n}', "HERE/dataset_info.json:2:22: not JSON: Expecting value"),
        ("[]", "HERE/dataset_info.json: a description file is an object of data sets by name; this is a list"),
        (
            '{"one": {"file_name": "a"}, "one": {"file_name": "b"}}',
            "HERE/dataset_info.json: key 'one' stands twice in one object; give each data set another name",
        ),
    ],
)
def test_files_that_are_no_descriptions(tmp_path, text, message):
    assert faults(tmp_path, text) == [message]


def test_there_is_no_file(tmp_path):
    with pytest.raises(RequestError, match=r"/dataset_info.json: no such description file; give a dataset_info.json"):
        read_descriptions(tmp_path)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "dataset_info.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match=r"dataset_info.json: cannot be read as text: 'utf-8' codec"):
        read_descriptions(tmp_path)


@pytest.mark.skipif(not DEMOS.is_dir(), reason=f"no dataset_info.json in {DEMOS}")
def test_llamafactorys_own_descriptions():
    sets = read_descriptions(DEMOS / "dataset_info.json")
    assert len(sets) == 104
    assert Counter(found.source for found in sets.values()) == {"hf_hub_url": 89, "file_name": 14, "ms_hub_url": 1}
    assert [found.name for found in sets.values() if found.refusal] == ["deepctrl"]
    formats = Counter(found.description.format for found in sets.values())
    assert formats == {"alpaca": 49, "sharegpt": 38, "text": 17}
    assert sum(found.description.ranking for found in sets.values()) == 12
    assert sets["starcoder_python"].folder == "python"
    assert sets["adgen_eval"].split == "validation"
    assert sets["c4_demo"].description.columns == Columns(prompt="text")
