"""The loss behind a frozen output layer, chunk by chunk, against the loss of all logits at once."""

import copy
from functools import partial

import peft
import pytest
import torch
from tests.tiny_model import small_model

from rayloom.losses.token import cross_entropy, dft, eaft
from rayloom.train import frozen_head as module
from rayloom.train.batch import TrainedPositions
from rayloom.train.frozen_head import FrozenHeadLoss, frozen_head


def _model(name="Llama", **options):
    model = small_model(name, **options)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("loss", [cross_entropy, partial(cross_entropy, label_smoothing=0.1), dft, eaft])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients(loss, dtype, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 5)
    monkeypatch.setattr("rayloom.train.head_scores._ROWS", 5)
    monkeypatch.setattr("rayloom.train.head_scores._TILE", 500)
    whole = _model().to(dtype)
    chunked = copy.deepcopy(whole)
    ids = torch.arange(24).reshape(2, 12)
    kept = torch.tensor([0, 2, 3, 5, 7, 8, 9, 13, 15, 20, 21, 22])
    labels = (ids.flatten()[kept] + 3).unsqueeze(0)
    labels[0, 4] = -100
    by_chunks = FrozenHeadLoss(frozen_head(chunked), loss)

    def of_all(outputs, labels, *, num_items_in_batch):
        return loss(outputs.logits[0], labels[0]).sum() / num_items_in_batch

    found = []
    for model, function, take in ((whole, of_all, None), (chunked, by_chunks, by_chunks.take)):
        positions = TrainedPositions(model)
        for _ in range(2):  # twice: nothing of the first may be left
            model.zero_grad()
            positions.choose(kept, take=take)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                outputs = model(input_ids=ids, use_cache=False)
            value = function(outputs, labels, num_items_in_batch=torch.tensor(9.0))
            (3 * value).backward()
        assert outputs.logits.shape == (1, len(kept), 0 if take else whole.config.vocab_size)
        found.append((value.detach(), {n: one.grad for n, one in model.named_parameters() if one.grad is not None}))
    (expected, gradients), (ours, our_gradients) = found
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=0)
    assert gradients.keys() == our_gradients.keys()
    assert len(gradients) == 28
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


def test_only_where_the_logits_are_the_output_layers():
    assert frozen_head(_model()) is not None
    assert frozen_head(_model("Gemma2")) is None  # caps its logits
    assert frozen_head(_model("Granite", logits_scaling=2.0)) is None
    trained = _model()
    trained.get_output_embeddings().weight.requires_grad_()
    assert frozen_head(trained) is None
    assert frozen_head(_model("Qwen3Moe", num_experts=4, moe_intermediate_size=16, output_router_logits=True)) is None


def test_the_look_at_the_model_changes_nothing():
    model = _model().train()
    state = torch.get_rng_state()
    frozen_head(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.get_output_embeddings()._forward_hooks
