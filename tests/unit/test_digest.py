"""Which tensors are where they were sent."""

import pytest
import torch

from rayloom.rollout.digest import Compared, digest_of, equal_tensors


def _sent():
    torch.manual_seed(0)
    tensors = {"q.lora_A": torch.randn(4, 6), "q.lora_B": torch.randn(6, 4), "v.lora_B": torch.randn(3, 4)}
    factors = {"q.lora_A": 1.0, "q.lora_B": 2.0, "v.lora_B": 2.0}
    there = {name: one.bfloat16() * factors[name] for name, one in tensors.items()}
    return tensors, [Compared(name, tensors[name], there[name], factors[name]) for name in tensors]


def test_all_that_was_cast_and_multiplied():
    tensors, compared = _sent()
    assert digest_of(equal_tensors(compared)) == digest_of(tensors)


@pytest.mark.parametrize("wrong", ["q.lora_A", "q.lora_B", "v.lora_B"])
@pytest.mark.parametrize("how", ["missing", "shape", "element"])
def test_one_that_is_not_there_is_left_out(wrong, how):
    tensors, compared = _sent()
    number = next(n for n, one in enumerate(compared) if one.name == wrong)
    there = compared[number].there.clone()
    there.view(-1)[-1] += 1
    found = {"missing": None, "shape": there.T.contiguous(), "element": there}[how]
    compared[number] = compared[number]._replace(there=found)
    assert equal_tensors(compared).keys() == tensors.keys() - {wrong}


def test_a_digest_is_of_names_types_shapes_and_bytes():
    one = torch.arange(6.0)
    others = [{"b": one}, {"a": one.double()}, {"a": one.view(2, 3)}, {"a": one + 1}, {}]
    assert digest_of({"a": one}) not in [digest_of(other) for other in others]
