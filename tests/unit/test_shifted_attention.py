"""S²-attention equals a naive one that writes every allowed pair down, in families of several kinds."""

from __future__ import annotations

import pytest
import torch
import transformers

from rayloom.errors import RequestError
from rayloom.models.attention import check_shifted_attention, group_size
from rayloom.models.shifted_attention import shifted_attention, shifted_mask, use_shifted_attention

GROUP = 8
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2),
    "odd heads": transformers.Qwen3Config(**SIZES, num_attention_heads=3, num_key_value_heads=1, head_dim=8),
    "qwen3": transformers.Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8),
    "windowed": transformers.MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=4, sliding_window=5),
    "gpt2": transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=61, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    ),
}


def naive(query, key, value, scaling, documents=None, group=GROUP):
    """Attention by a loop over heads, with every allowed pair written down: (batch, length, heads, size)."""
    batch, heads, length, _ = query.shape
    key, value = (one.repeat_interleave(heads // one.shape[1], dim=1) for one in (key, value))
    place = torch.arange(length)
    result = []
    for head in range(heads):
        shift = group // 2 if head >= heads // 2 else 0
        block = (place + shift) // group
        allowed = (place[:, None] >= place[None, :]) & (block[:, None] == block[None, :])
        allowed = allowed.expand(batch, -1, -1)
        if documents is not None:
            allowed = allowed & (documents[:, :, None] == documents[:, None, :])
        scores = (query[:, head] @ key[:, head].transpose(1, 2)) * scaling
        result.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value[:, head])
    return torch.stack(result, dim=2)


def causal(batch, head, query, key):
    return key <= query


@pytest.mark.parametrize("length", [32, 8, 29, 5])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_the_naive_one_to_the_digit(length, kv_heads):
    """Also in its gradients, and for a last group that is not full."""
    torch.manual_seed(0)
    states = [
        torch.randn(2, heads, length, 8, dtype=torch.float64, requires_grad=True) for heads in (4, kv_heads, kv_heads)
    ]
    mask = shifted_mask(2, length, length, group=GROUP, mask_function=causal)
    assert mask.shape == (2, 2, -(-length // GROUP), GROUP, GROUP)
    ours, _ = shifted_attention(None, *states, mask, group=GROUP, scaling=0.3)
    wanted = naive(*states, 0.3)
    torch.testing.assert_close(ours, wanted)
    weights = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), states),
        torch.autograd.grad((wanted * weights).sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_end_of_a_row_never_learns_from_its_beginning_nor_the_other_way_round():
    """What rolling brings together: the shifted heads' last group holds the row's two ends."""
    mask = shifted_mask(1, 32, 32, group=GROUP, mask_function=causal)
    last = mask[0, 1, -1]  # rows 28..31, then 0..3
    assert not last[:4, 4:].any()
    assert not last[4:, :4].any()
    assert last[4:, 4:].tril().sum() == 10


def model_of(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[name], dtype=torch.float64, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    return model


def with_naive(model, documents=None):
    """The same model with the naive attention in the registry."""
    window = getattr(model.config, "sliding_window", None)

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        own = documents if documents is not None else torch.zeros(query.shape[0], query.shape[2], dtype=torch.long)
        if window is None:
            return naive(query, key, value, scaling, own), None
        place = torch.arange(query.shape[2])
        near = (place[:, None] - place[None, :]) < window
        return naive_windowed(query, key, value, scaling, own, near), None

    transformers.AttentionInterface.register("naive_s2", attend)
    model.config._attn_implementation = "naive_s2"
    return model


def naive_windowed(query, key, value, scaling, documents, near):
    heads = query.shape[1]
    place = torch.arange(query.shape[2])
    result = []
    for head in range(heads):
        shift = GROUP // 2 if head >= heads // 2 else 0
        block = (place + shift) // GROUP
        allowed = (place[:, None] >= place[None, :]) & (block[:, None] == block[None, :]) & near
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])
        scores = (query[:, head] @ key[:, head].transpose(1, 2)) * scaling
        result.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value[:, head])
    return torch.stack(result, dim=2)


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_models_of_several_families(name):
    ids = torch.randint(0, 61, (2, 30))
    wanted = with_naive(model_of(name))(input_ids=ids).logits
    model = model_of(name)
    use_shifted_attention(model, GROUP)
    torch.testing.assert_close(model.train()(input_ids=ids).logits, wanted)
    full = model_of(name).eval()(input_ids=ids).logits
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, full)  # evaluation sees the whole length
    assert not torch.allclose(wanted, full)


@pytest.mark.parametrize("name", ["llama", "qwen3", "windowed"])
def test_examples_of_a_packed_row_do_not_see_each_other(name):
    """Lengths that fall inside groups; told apart by positions that restart, as the project packs."""
    lengths = (11, 3, 14)
    ids = torch.randint(0, 61, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).unsqueeze(0)
    model = model_of(name)
    use_shifted_attention(model, GROUP)
    ours = model.train()(input_ids=ids, position_ids=positions).logits
    wanted = with_naive(model_of(name), documents)(input_ids=ids, position_ids=positions).logits
    torch.testing.assert_close(ours, wanted)
    changed = ids.clone()
    changed[0, :11] = 0
    after = model(input_ids=changed, position_ids=positions).logits
    torch.testing.assert_close(after[0, 11:], ours[0, 11:])


def test_padding_is_not_seen():
    model = model_of("llama")
    use_shifted_attention(model, GROUP)
    model.train()
    ids = torch.randint(0, 61, (1, 20))
    padded = torch.cat([ids, torch.zeros(1, 9, dtype=torch.long)], dim=1)
    seen = (torch.arange(29) < 20).long().unsqueeze(0)
    alone = model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=padded, attention_mask=seen).logits[:, :20], alone)


def test_through_peft_and_activation_checkpointing():
    """PEFT calls a model's `forward` past its hooks; checkpointing computes the layers twice."""
    import peft

    ids = torch.randint(0, 61, (1, 30))
    base = model_of("llama")
    use_shifted_attention(base, GROUP)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.train()
    torch.testing.assert_close(model(input_ids=ids).logits, with_naive(model_of("llama"))(input_ids=ids).logits)
    model(input_ids=ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
    model(input_ids=ids, labels=ids).loss.backward()
    assert plain
    for name, parameter in model.named_parameters():
        if name in plain:
            torch.testing.assert_close(parameter.grad, plain[name])


@pytest.mark.parametrize("cutoff", [8, 2048, 24])
def test_a_group_is_a_quarter_of_the_cutoff(cutoff):
    assert group_size(cutoff) == cutoff // 4


@pytest.mark.parametrize(("cutoff", "near"), [(2047, 2040), (12, 8), (9, 8), (4, 8)])
def test_a_cutoff_that_does_not_divide(cutoff, near):
    with pytest.raises(RequestError, match=f"data.cutoff {cutoff} does not divide .* such as {near}$"):
        group_size(cutoff)


def test_models_whose_attention_it_cannot_be():
    config = transformers.Gemma2Config(**SIZES, num_attention_heads=4, head_dim=8)
    with pytest.raises(RequestError, match="gemma2 caps its attention scores"):
        check_shifted_attention(transformers.Gemma2ForCausalLM, config)
    with pytest.raises(RequestError, match="do not take their attention from transformers' registry"):
        check_shifted_attention(transformers.MambaForCausalLM, transformers.MambaConfig())
    mask = shifted_mask(1, 8, 8, group=8, mask_function=causal)
    states = torch.zeros(1, 2, 8, 4)
    with pytest.raises(RequestError, match="attention sinks"):
        shifted_attention(None, states, states, states, mask, group=8, s_aux=torch.zeros(2))
