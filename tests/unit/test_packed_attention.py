"""Attention example by example against sdpa with the whole mask."""

import pytest
import torch
import transformers

from rayloom.models.packed_attention import NAME, example_sizes, packed_attention, use_packed_attention


def _packed(lengths_of_rows, length):
    """The mask of rows with examples of these lengths, padded behind."""
    mask = torch.zeros(len(lengths_of_rows), 1, length, length, dtype=torch.bool)
    for row, lengths in enumerate(lengths_of_rows):
        start = 0
        for size in lengths:
            mask[row, 0, start : start + size, start : start + size] = torch.ones(size, size).tril().bool()
            start += size
        mask[row, 0, start:, : max(start - 1, 0)] = True  # what padding sees does not matter
    return mask


def test_sizes_of_examples_and_padding():
    assert example_sizes(_packed([[3, 1, 2], [4]], 8)) == (
        (3, True), (1, True), (2, True), (2, False), (4, True), (4, False),
    )  # fmt: skip
    assert example_sizes(_packed([[8]], 8)) == ((8, True),)


def test_other_masks_are_not_taken_for_examples():
    window = torch.ones(1, 1, 8, 8).tril().triu(-2).bool()
    both_ways = torch.ones(1, 1, 8, 8).bool()
    hole = _packed([[8]], 8)
    hole[:, :, :, 3] = False  # padding in the middle
    early = _packed([[4, 4]], 8)
    early[0, 0, 6, 1] = True  # one token sees another example
    for mask in (window, both_ways, hole, early, _packed([[8]], 8).float()):
        assert example_sizes(mask) is None


class _Module:
    def __init__(self, groups):
        self.num_key_value_groups, self.is_causal = groups, True


@pytest.mark.parametrize("lengths", [[[5, 3, 8], [16]], [[7, 2], [1, 1, 12]]])
def test_values_and_gradients_are_those_with_the_mask(lengths):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(0)
    mask = _packed(lengths, 16)
    real = mask[:, 0].diagonal(dim1=1, dim2=2)
    results = []
    inputs = [torch.randn(2, heads, 16, 8, dtype=torch.float64) for heads in (6, 2, 2)]
    for attend in (sdpa_attention_forward, packed_attention):
        given = [one.clone().requires_grad_() for one in inputs]
        out, _ = attend(_Module(3), *given, mask, scaling=0.3, dropout=0.0)
        out = out[real]
        (out * torch.arange(out.numel()).reshape(out.shape).sin()).sum().backward()
        results.append([out, *(one.grad for one in given)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_whole_model_has_the_same_loss_and_gradients(monkeypatch):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 64, (2, 12))
    batch = {"input_ids": ids, "labels": ids}
    batch["position_ids"] = torch.tensor([[*range(5), *range(7)], [*range(3), *range(4), *range(5)]])
    found = []
    calls, real = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args[0].shape[2])
        return real(*args, **kwargs)

    for packed in (False, True):
        if packed:
            use_packed_attention(model)
            assert model.config._attn_implementation == NAME
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.item(), {name: one.grad.clone() for name, one in model.named_parameters()}))
    assert calls == [5, 7, 3, 4, 5] * 2  # of each layer
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("lengths", [[[5, 3, 8], [16]], [[7, 2], [1, 1, 12]], None])
def test_in_bf16_they_are_nearly_those_with_the_mask(lengths, monkeypatch):
    """Computed by blocks; without a mask every row is one example."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(0)
    mask = None if lengths is None else _packed(lengths, 16)
    real = torch.ones(2, 16, dtype=torch.bool) if mask is None else mask[:, 0].diagonal(dim1=1, dim2=2)
    inputs = [torch.randn(2, heads, 16, 8) for heads in (6, 2, 2)]
    results = []
    for attend, dtype in ((sdpa_attention_forward, torch.float64), (packed_attention, torch.bfloat16)):
        if attend is packed_attention:
            monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
        given = [one.bfloat16().to(dtype).requires_grad_() for one in inputs]
        out, _ = attend(_Module(3), *given, mask, scaling=0.3, dropout=0.0)
        out = out[real]
        (out * torch.arange(out.numel()).double().sin().bfloat16().to(dtype).reshape(out.shape)).sum().backward()
        results.append([out, *(one.grad for one in given)])
    for exact, ours in zip(*results, strict=True):
        assert (ours.double() - exact).norm() <= 0.02 * exact.norm()
