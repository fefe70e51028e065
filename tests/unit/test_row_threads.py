"""Rows side by side in threads, against the whole batch at once and against the formula."""

import copy
import threading

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_model import small_model

from rayloom.losses.token import cross_entropy
from rayloom.models.packed_attention import use_packed_attention
from rayloom.train.batch import TrainedPositions
from rayloom.train.frozen_head import FrozenHeadLoss, frozen_head
from rayloom.train.row_threads import RowThreads, divides_rows


@pytest.fixture(autouse=True)
def cores():
    """Two, also where the suite has one for each of its processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _model(dtype=torch.float64, dropout=0.0, **options):
    model = small_model("Llama", **options)
    use_packed_attention(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=dropout)
    return peft.get_peft_model(model, config).to(dtype).train()


def _batch(rows, examples, kept):
    """Rows of `examples` lengths each, packed; `kept` positions are trained."""
    length = sum(examples)
    places = torch.cat([torch.arange(size) for size in examples]).expand(rows, -1)
    ids = torch.arange(rows * length).reshape(rows, length) % 60
    positions = torch.tensor(sorted(kept))
    labels = ((ids.flatten()[positions] + 3) % 60).unsqueeze(0)
    batch = {"input_ids": ids, "position_ids": places, "use_cache": False}
    return batch, positions, labels


def _divided(model, batch, positions, labels, items):
    loss = FrozenHeadLoss(frozen_head(model), cross_entropy)
    threads = RowThreads(model, loss, TrainedPositions(model))
    outputs = model(**batch, positions=positions, shift_labels=labels)
    return threads, loss(outputs, labels, num_items_in_batch=torch.tensor(items))


@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([2, 4, 6]),
    examples=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_loss_and_its_gradient_are_the_formulas(rows, examples, share, seed):
    model = _model()
    whole = copy.deepcopy(model)
    everything = rows * sum(examples)
    order = torch.randperm(everything, generator=torch.Generator().manual_seed(seed)).tolist()
    batch, positions, labels = _batch(rows, examples, order[: 1 + int(share * (everything - 1))])
    logits = whole(**batch).logits.flatten(0, 1)[positions]
    expected = -logits.log_softmax(-1).gather(-1, labels[0].unsqueeze(-1)).sum() / 7.0
    (3 * expected).backward()
    _, loss = _divided(model, batch, positions, labels, 7.0)
    (3 * loss).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    theirs = dict(whole.named_parameters())
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert len(trained) == 8
    for name, one in model.named_parameters():
        if one.requires_grad:
            expected = theirs[name].grad  # the layers' norms compute in float32
            assert (one.grad - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name
        else:
            assert one.grad is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_same_bits_each_time(dtype, checkpointing):
    batch, positions, labels = _batch(4, [5, 7], range(3, 45))
    found = []
    for _ in range(6):
        model = _model(dtype)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            _, loss = _divided(model, batch, positions, labels, 40.0)
        loss.backward()
        found.append([loss.detach(), *(one.grad for one in model.parameters() if one.requires_grad)])
    for others in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], others, strict=True))
    assert all(one.isfinite().all() and one.abs().max() > 0 for one in found[0])


def test_batches_add_up_and_threads_differ():
    """Gradients are accumulated as ever; each thread has its share of the cores, and the trainer's keeps all."""
    model = _model()
    batch, positions, labels = _batch(4, [6], [0, 1, 20])
    loss = FrozenHeadLoss(frozen_head(model), cross_entropy)
    threads = RowThreads(model, loss, TrainedPositions(model))
    seen, both = set(), threading.Barrier(2, timeout=60)  # broken where one part waits for the other to end

    def see(*_):
        seen.add((threading.current_thread().name, torch.get_num_threads()))
        both.wait()

    model.get_input_embeddings().register_forward_hook(see)
    for _ in range(2):
        outputs = model(**batch, positions=positions, shift_labels=labels)
        loss(outputs, labels, num_items_in_batch=torch.tensor(3.0)).backward()
    twice = [one.grad.clone() for one in model.parameters() if one.requires_grad]
    model.zero_grad()
    outputs = model(**batch, positions=positions, shift_labels=labels)
    loss(outputs, labels, num_items_in_batch=torch.tensor(3.0)).backward()
    for one, of_two in zip((one for one in model.parameters() if one.requires_grad), twice, strict=True):
        torch.testing.assert_close(2 * one.grad, of_two)
    assert seen == {("rows_0", 1), ("rows_1", 1)}
    assert torch.get_num_threads() == 2
    assert threads.threads == 2
    assert threads.backward_seconds > 0


def test_what_is_not_divided_goes_through_as_it_is():
    model = _model()
    batch, positions, labels = _batch(2, [6], [1, 2])
    threads, _ = _divided(model, batch, positions, labels, 2.0)
    assert [threads.parts({"input_ids": torch.zeros(rows, 3)}) for rows in (1, 2, 3, 4, 7, 8)] == [1, 2, 1, 2, 1, 2]
    assert model(**batch).logits.shape == (2, 6, model.config.vocab_size)


def test_which_jobs():
    cpu, model = torch.device("cpu"), _model()
    assert divides_rows(model, cpu, noise=False)
    assert not divides_rows(model, cpu, noise=True)
    assert not divides_rows(model, torch.device("cuda"), noise=False)
    assert not divides_rows(_model(dropout=0.1), cpu, noise=False)
    assert not divides_rows(_model(attention_dropout=0.1), cpu, noise=False)
    follows = _model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert not divides_rows(follows, cpu, noise=False)
    base = small_model("Llama").requires_grad_(False)
    use_packed_attention(base)
    assert not divides_rows(base, cpu, noise=False)
    turned = peft.get_peft_model(base, peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]))
    assert not divides_rows(turned, cpu, noise=False)
    unknown = peft.get_peft_model(small_model("Llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert not divides_rows(unknown, cpu, noise=False)
    for one in model.get_base_model().model.layers.parameters():
        one.requires_grad_()
    assert not divides_rows(model, cpu, noise=False)
    torch.set_num_threads(1)
    assert not divides_rows(_model(), cpu, noise=False)


def test_an_error_in_a_thread_is_the_steps():
    model = _model()
    batch, positions, labels = _batch(2, [6], [1, 8])
    labels[0, 1] = 10_000
    with pytest.raises(IndexError):
        _divided(model, batch, positions, labels, 2.0)


def test_what_wraps_the_model_sees_one_operation(tmp_path):
    """DDP, whose hooks wait for the gradient of each weight, those of a layer that no row comes by too."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        model = _model()
        batch, positions, labels = _batch(4, [6], range(5, 20))
        alone = copy.deepcopy(model)
        _, loss = _divided(alone, batch, positions, labels, 15.0)
        loss.backward()
        unused = torch.nn.Parameter(torch.zeros(3))
        model.get_base_model().model.unused = unused
        of_tokens = FrozenHeadLoss(frozen_head(model), cross_entropy)
        RowThreads(model, of_tokens, TrainedPositions(model))
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):  # the second pass fails where the first left a weight waiting
            model.zero_grad()
            outputs = wrapped(**batch, positions=positions, shift_labels=labels)
            of_tokens(outputs, labels, num_items_in_batch=torch.tensor(15.0)).backward()
        theirs = dict(alone.named_parameters())
        for name, one in model.named_parameters():
            if one.requires_grad and one is not unused:
                assert torch.equal(one.grad, theirs[name].grad), name
    finally:
        torch.distributed.destroy_process_group()
