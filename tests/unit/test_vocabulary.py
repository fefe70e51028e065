"""New tokens: their rows, at the input and at the output, and that methods can train and keep them."""

from __future__ import annotations

import math
import shutil

import peft
import pytest
import torch
import transformers

from rayloom.errors import RequestError
from rayloom.models.config import ModelConfig
from rayloom.models.load import load_causal_lm
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer
from rayloom.models.vocabulary import added_token_ids, first_rows, vocabulary_modules

WIDTH = 64  # of the tiny model


def settings(path, **fields):
    return ModelConfig.model_validate({"path": str(path), **fields})


def load(path, **fields):
    model = settings(path, **fields)
    tokenizer = load_tokenizer(TokenizerSource.of(model))
    return load_causal_lm(model, torch.float32, tokenizer=tokenizer, seed=7), tokenizer


@pytest.fixture(scope="module")
def untied(tiny_model, tmp_path_factory):
    """The tiny model with an output layer of its own."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("untied"), dirs_exist_ok=True)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_rows_are_mean_and_noise():
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(100, 512, generator=generator) + 5
    rows = first_rows(known, range(100, 600), {}, seed=1)
    noise = rows.double() - known.double().mean(dim=0)
    assert noise.std().item() == pytest.approx(1 / math.sqrt(512), rel=0.01)
    assert noise.mean().abs().item() < 1e-3
    assert torch.equal(rows, first_rows(known, range(100, 600), {}, seed=1))
    assert not torch.equal(rows, first_rows(known, range(100, 600), {}, seed=2))


def test_a_described_row_is_the_mean_of_its_description():
    known = torch.arange(12.0).view(4, 3)
    rows = first_rows(known, [4, 5], {5: [0, 0, 3]}, seed=1)
    torch.testing.assert_close(rows[1], (2 * known[0] + known[3]) / 3)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_vocabulary_grows_to_the_next_multiple(tiny_model, untied, kind):
    path = tiny_model if kind == "tied" else untied
    before, plain = load(path)
    rows = before.get_input_embeddings().weight.shape[0]
    names = [f"<new{number}>" for number in range(rows - len(plain) + 1)]  # one more than there is room for
    model, tokenizer = load(path, add_tokens=names)
    for end, old in (
        (model.get_input_embeddings(), before.get_input_embeddings()),
        (model.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert end.weight.shape == (rows + 64, WIDTH)
        assert torch.equal(end.weight[: len(plain)], old.weight[: len(plain)])
        mean = old.weight[: len(plain)].mean(dim=0)
        spread = (end.weight[len(plain) :] - mean).std()
        assert spread.item() == pytest.approx(1 / math.sqrt(WIDTH), rel=0.1)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (kind == "tied")
    assert model.config.vocab_size == rows + 64
    ids = torch.tensor([added_token_ids(tokenizer, settings(path, add_tokens=names))])
    assert model(input_ids=ids).logits.shape == (1, len(names), rows + 64)


def test_tokens_that_there_is_room_for_get_their_rows_too(tiny_model, tmp_path):
    roomy, plain = load(tiny_model)
    roomy.resize_token_embeddings(len(plain) + 5, mean_resizing=False)
    path = shutil.copytree(tiny_model, tmp_path / "roomy")
    roomy.save_pretrained(path)
    before, _ = load(path)
    model, _ = load(path, add_special_tokens=["<|tool|>"])
    old, new = (one.get_input_embeddings().weight for one in (before, model))
    assert new.shape == old.shape
    changed = (new != old).any(dim=1).nonzero().flatten().tolist()
    assert changed == [len(plain)]


def test_another_multiple(tiny_model):
    before, plain = load(tiny_model)
    rows = before.get_input_embeddings().weight.shape[0]
    names = [f"<new{number}>" for number in range(rows - len(plain) + 1)]
    model, _ = load(tiny_model, add_tokens=names, vocab_multiple=1)
    assert model.get_input_embeddings().weight.shape[0] == rows + 1


def test_a_description(untied):
    text = "the quick brown fox"
    model, tokenizer = load(untied, add_tokens=["<fox>"], token_descriptions={"<fox>": text})
    plain = load_tokenizer(str(untied))(text, add_special_tokens=False).input_ids
    token = tokenizer.convert_tokens_to_ids("<fox>")
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.testing.assert_close(end.weight[token], end.weight[plain].mean(dim=0))


def test_a_description_of_added_tokens_only(tiny_model):
    with pytest.raises(
        RequestError, match=r"^model\.token_descriptions: the description of '<a>' has no token but add"
    ):
        load(tiny_model, add_tokens=["<a>", "<b>"], token_descriptions={"<a>": "<b>"})


def test_vocabulary_modules_are_those_with_a_row_a_token(tiny_model, untied):
    assert vocabulary_modules(load_causal_lm(str(tiny_model), torch.float32)) == ["model.embed_tokens"]
    both = ["model.embed_tokens", "lm_head"]
    assert vocabulary_modules(load_causal_lm(str(untied), torch.float32)) == both


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_an_adapter_trains_new_rows_and_keeps_them(tiny_model, untied, tmp_path, kind):
    """Two steps, saved, loaded on the same base: the same logits; of the old rows none has moved."""
    path = tiny_model if kind == "tied" else untied
    fields = {"add_tokens": ["<one>", "<two>"]}
    base, tokenizer = load(path, **fields)
    new = added_token_ids(tokenizer, settings(path, **fields))
    before = base.get_input_embeddings().weight.detach().clone()
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=["q_proj"],
            trainable_token_indices={name.rpartition(".")[2]: new for name in vocabulary_modules(base)},
        ),
    )
    ids = torch.tensor([[5, *new, 9]])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    model.eval()
    after = model.get_input_embeddings()(torch.arange(len(before)))
    moved = (after != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == new
    again = peft.PeftModel.from_pretrained(load(path, **fields)[0], tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
