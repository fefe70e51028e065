"""A dozen model types, the widest spread, through what `make matrix` does with all of them; and what is refused."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from tests.job_text import JOB
from tests.matrix import check
from tests.matrix.tiny_configs import model_types, tiny_config
from transformers import AutoModelForCausalLM

from rayloom.config.read import read_job
from rayloom.errors import RequestError
from rayloom.methods.targets import linear_layers, peft_targets
from rayloom.models.causal import why_not_causal
from rayloom.models.packing import packing_is_exact, why_not_packed
from rayloom.stages.prepare import prepare_data

SPREAD = {
    "qwen2": "dense MHA",
    "gemma3": "dense GQA tied",  # composite: sees, and reads here
    "gpt2": "dense MHA tied",  # learned positions, Conv1D layers
    "bloom": "dense MHA tied",  # ALiBi
    "gpt_bigcode": "dense MQA tied",
    "gpt_neox": "dense MHA",
    "roberta": "dense MHA tied",  # an encoder that is told to decode, positions from 2 on
    "mixtral": "MoE GQA",
    "llama4_text": "MoE GQA",  # its router is a Linear by name only
    "deepseek_v3": "MoE MLA",  # dense, shared and routed experts
    "jamba": "hybrid MoE GQA",
    "mamba": "recurrent none tied",
    "zamba": "hybrid MHA tied",  # layers that share their weights
}


@pytest.mark.parametrize("model_type", SPREAD)
def test_trains_saves_loads_and_merges(model_type, tmp_path):
    facts = check.train_and_save(model_type, tmp_path)
    facts |= check.load_and_compare(tmp_path)
    assert f"{facts['kind']} {facts['heads']}{' tied' if facts['tied'] else ''}" == SPREAD[model_type]
    assert facts["packing"] is packing_is_exact(model_type)
    assert facts["loss_after"] < facts["loss_before"]
    assert 0 < facts["share"] <= 1


def test_the_data_speak_of_types_that_there_are():
    types = model_types()
    assert len(types) == 178
    known = [one for one in types if packing_is_exact(one) is not None]
    assert len(known) >= 150
    assert all((why_not_packed(one) is None) is packing_is_exact(one) for one in known)
    assert packing_is_exact("no_such_type") is None
    assert why_not_packed("no_such_type") is None


def test_a_model_that_does_not_look_back_shows_nothing_of_packing(tmp_path):
    """The packing check must have something to find."""

    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = torch.nn.Embedding(128, 8), torch.nn.Linear(8, 128)

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, labels=None, shift_labels=None, **ignored):
            logits = self.head(self.table(input_ids))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shift_labels.flatten())
            return type("Output", (), {"logits": logits, "loss": loss})

    with pytest.raises(check.CheckError, match="do not depend"):
        check.packing_leak(Bigram())


def test_a_reader_of_both_sides_is_not_causal():
    assert not check.is_causal_as_it_comes("roberta")
    assert check.is_causal_as_it_comes("gpt2")


def model_of(model_type):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type))


def last_names(model_type):
    return {name.rpartition(".")[2] for name in linear_layers(model_of(model_type))}


def test_linear_layers_are_all_but_the_head():
    assert last_names("qwen2") == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert last_names("gpt2") == {"c_attn", "c_proj", "c_fc"}  # transformers' Conv1D
    assert "router" not in last_names("llama4_text")
    assert "out_proj" not in last_names("mamba")


def test_layers_that_share_a_weight_get_no_adapter():
    names = linear_layers(AutoModelForCausalLM.from_config(tiny_config("zamba")))
    assert names
    assert not [name for name in names if "shared_transf" in name]


def test_no_layer_of_a_part_that_does_not_train():
    model = model_of("gemma3")
    assert any("vision_tower" in name for name, _ in model.named_modules())
    assert not [name for name in linear_layers(model) if "vision_tower" in name]


def test_shared_experts_keep_their_adapter():
    """PEFT's own `all-linear` takes these names for the experts' and leaves the layers out."""
    model = AutoModelForCausalLM.from_config(tiny_config("deepseek_v3"))
    modules, parameters = peft_targets(model, "all")
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in parameters
    assert "model.layers.0.self_attn.o_proj" in modules
    assert peft_targets(model_of("qwen2"), ["model.layers.0.mlp.up_proj"]) == (["model.layers.0.mlp.up_proj"], [])

    naive = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    assert not isinstance(
        naive.get_submodule("base_model.model.model.layers.1.mlp.shared_experts.up_proj"), peft.tuners.lora.LoraLayer
    ), "PEFT does it right by now: `peft_targets` is no longer needed"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "bart", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "bert"}, "set is_decoder: true"),
        ({"model_type": "xlnet"}, "permuted"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(config, said):
    assert said in (why_not_causal(config) or "")


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"model_type": "bert", "is_decoder": True}, {}])
def test_causal_language_models_are_not_refused(config):
    assert why_not_causal(config) is None


@pytest.mark.parametrize(
    ("changed", "overrides", "message"),
    [
        ({"model_type": "bart", "is_encoder_decoder": True}, [], r"model.path: .* \(type bart\) is an encoder-decoder"),
        ({"model_type": "mamba"}, [], r"data.packing: true: .*type mamba.*state runs on.*say data.packing: false"),
        ({"model_type": "mamba"}, ["data.packing=false"], None),
    ],
)
def test_a_job_is_refused_before_its_model_loads(changed, overrides, message, tiny_model, tmp_path):
    folder, data, job = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "job.yaml"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changed), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"not read")
    data.write_text('{"instruction": "Say A.", "input": "", "output": "A"}\n' * 4, encoding="utf-8")
    job.write_text(JOB, encoding="utf-8")
    request = read_job(job, [f"model.path={folder}", f"data.train=[{data}]", *overrides])
    if message is None:
        prepare_data(request)
    else:
        with pytest.raises(RequestError, match=message):
            prepare_data(request)
