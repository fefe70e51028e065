"""`rayloom models` and `rayloom models show NAME`."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from rayloom.cli import cli
from rayloom.errors import RequestError
from rayloom.models.show import family_rows, model_facts


def test_the_list_is_shown():
    result = CliRunner().invoke(cli, ["models"], catch_exceptions=False)
    assert result.exit_code == 0
    assert len(list(family_rows())) > 100
    assert "Mixtral" in result.output


def test_a_name_is_told_by_its_family():
    result = CliRunner().invoke(cli, ["models", "show", "meta-llama/Llama-2-7b-chat-hf"], catch_exceptions=False)
    assert "family:       Llama 2\n" in result.output
    assert "template:     llama2\n" in result.output


def test_the_name_of_a_family_will_do():
    assert dict(model_facts("chatglm3"))["note"] == "needs model.trust_remote_code: true"


def test_a_folder_is_read(tiny_model):
    facts = dict(model_facts(str(tiny_model)))
    assert facts["class"] == "LlamaForCausalLM, loaded by AutoModelForCausalLM"
    assert facts["length"] == "2,048 tokens"
    assert facts["positions"] == "rotary; rope_scaling works"
    assert facts["parameters"] == f"{AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters():,}"
    assert facts["family"].startswith("none")


def test_a_name_that_says_nothing():
    with pytest.raises(RequestError, match="no family is known for 'someone/thing'"):
        model_facts("someone/thing")
