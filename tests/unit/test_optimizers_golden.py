"""Each optimizer against its paper's update rule, written out naively in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rayloom.errors import JobError
from rayloom.methods.optimizers.adam_mini import AdamMini, block_count
from rayloom.methods.optimizers.apollo import Apollo
from rayloom.methods.optimizers.badam import BAdam, active_block, active_entries, layer_choice, ratio_choice
from rayloom.methods.optimizers.build import Setting, lora_plus, make_optimizer, optim_name
from rayloom.methods.optimizers.config import AdamWConfig, MuonConfig
from rayloom.methods.optimizers.galore import GaLore
from rayloom.methods.optimizers.layerwise import LayerWise
from rayloom.methods.optimizers.projection import random_projection
from rayloom.train.schedule import ProgressSchedule, learning_rate_factor

BETA1, BETA2, EPS, LR, DECAY = 0.9, 0.99, 1e-8, 0.1, 0.01
STEPS = 7
SHAPES = [(6, 4), (4, 6)]


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=(BETA1, BETA2), eps=EPS)


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def gradients(shape: tuple[int, ...], steps: int = STEPS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(math.prod(shape))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


class NaiveAdam:
    """Adam's direction m̂ / (sqrt(v̂) + eps), as its paper writes it."""

    def __init__(self) -> None:
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.t = 0

    def __call__(self, g: torch.Tensor) -> torch.Tensor:
        self.t += 1
        self.m = BETA1 * self.m + (1 - BETA1) * g
        self.v = BETA2 * self.v + (1 - BETA2) * g**2
        return (self.m / (1 - BETA1**self.t)) / ((self.v / (1 - BETA2**self.t)) ** 0.5 + EPS)


def run(optimizer: torch.optim.Optimizer, weight: nn.Parameter, grads: list[torch.Tensor]) -> torch.Tensor:
    for gradient in grads:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def group(*params: nn.Parameter) -> dict[str, Any]:
    return {"params": list(params), "lr": LR, "weight_decay": DECAY}


def close(ours: torch.Tensor, naive: torch.Tensor) -> None:
    assert not torch.allclose(naive, weights(tuple(naive.shape))[0], atol=1e-2), "the rule moved nothing"
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_galore(shape, proj_type):
    (weight,), rank, gap, scale = weights(shape), 2, 3, 0.25
    optimizer = GaLore([], [group(weight)], adamw, rank=rank, scale=scale, proj_type=proj_type, update_proj_gap=gap)
    rows_are_projected = {"std": shape[0] < shape[1], "reverse_std": shape[0] >= shape[1]}.get(proj_type)
    w, adam = weight.detach().clone(), NaiveAdam()
    for step, g in enumerate(gradients(shape)):
        if step % gap == 0:
            u, _, vh = torch.linalg.svd(g)
            p, q = u[:, :rank], vh[:rank].T
            if not (proj_type in ("left", "full") or rows_are_projected is True):
                p = torch.eye(shape[0], dtype=torch.float64)
            if not (proj_type in ("right", "full") or rows_are_projected is False):
                q = torch.eye(shape[1], dtype=torch.float64)
        w = w * (1 - LR * DECAY) - LR * scale * p @ adam(p.T @ g @ q) @ q.T
    close(run(optimizer, weight, gradients(shape)), w)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scale_type", "rank", "scale"), [("channel", 2, 1.0), ("tensor", 1, 128.0)])
def test_apollo_and_apollo_mini(shape, scale_type, rank, scale, monkeypatch):
    drawn = []

    def draw(*args: Any) -> Any:
        drawn.append(random_projection(*args))
        return drawn[-1]

    monkeypatch.setattr("rayloom.methods.optimizers.apollo.random_projection", draw)
    (weight,), gap = weights(shape), 3
    start = weight.detach().clone()
    optimizer = Apollo(
        [], [group(weight)], adamw, rank=rank, scale=scale, scale_type=scale_type, seed=5, update_proj_gap=gap
    )
    ours = run(optimizer, weight, gradients(shape))
    assert len(drawn) == math.ceil(STEPS / gap)
    wide = int(shape[0] < shape[1])  # then the rows are projected, and a channel is a column
    w, adam, last = start, NaiveAdam(), None
    for step, g in enumerate(gradients(shape)):
        p = drawn[step // gap].left if wide else drawn[step // gap].right
        r = p.T @ g if wide else g @ p.T
        n = adam(r)
        s = n.norm() / (r.norm() + 1e-8)
        if scale_type == "channel":
            s = torch.stack(
                [n.select(wide, j).norm() / (r.select(wide, j).norm() + 1e-8) for j in range(n.shape[wide])]
            )
            s = s if wide else s[:, None]
        update = g * s
        if last is not None and update.norm() > 1.01 * (last + 1e-8):
            update = update * 1.01 * (last + 1e-8) / update.norm()
        last = update.norm()
        w = w * (1 - LR * DECAY) - LR * scale**0.5 * update
    close(ours, w)


def test_random_projections_keep_length_on_average_and_differ_by_seed():
    gradient = torch.randn(400, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projection = random_projection(gradient, 32, (False, True), 3)
    assert projection.down(gradient).shape == (400, 32)
    assert projection.down(gradient).norm() == pytest.approx(gradient.norm().item(), rel=0.05)
    assert torch.equal(projection.right, random_projection(gradient, 32, (False, True), 3).right)
    assert not torch.equal(projection.right, random_projection(gradient, 32, (False, True), 4).right)


def test_layerwise_galore_is_galore_in_the_backward_pass():
    whole, pieces = weights(*SHAPES), weights(*SHAPES)
    options: dict[str, Any] = {"rank": 2, "scale": 0.5, "update_proj_gap": 2}
    plain = GaLore([], [group(*whole)], adamw, **options)
    layerwise = LayerWise([GaLore([], [group(weight)], adamw, **options) for weight in pieces])
    for step in range(STEPS):
        for params, optimizer in ((whole, plain), (pieces, layerwise)):
            for entry in optimizer.param_groups:
                entry["lr"] = LR / (step + 1)  # the schedule reaches the pieces
            optimizer.zero_grad()
            sum(((weight - 1) ** 4).sum() for weight in params).backward()
            assert all((weight.grad is None) == (params is pieces) for weight in params)
            optimizer.step()
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one, other)


def test_layerwise_makes_no_step_with_what_is_no_number():
    (weight,) = weights((2, 2))
    before = weight.detach().clone()
    layerwise = LayerWise([torch.optim.AdamW([weight], lr=0.1)])
    met: list[int] = []
    layerwise.on_bad = lambda: met.append(1)
    (weight * torch.nan).sum().backward()
    assert met == [1]
    assert torch.equal(weight, before)
    assert weight.grad is None

    def stop() -> None:
        raise JobError("stopped")

    layerwise.on_bad = stop
    with pytest.raises(JobError, match="stopped"):  # through the backward pass
        (weight * torch.inf).sum().backward()
    weight.grad = None
    weight.sum().backward()
    assert not torch.equal(weight, before)


def test_badam_by_layers():
    a, b, c = params = weights((3, 2), (4,), (5, 1))
    start = [weight.detach().clone() for weight in params]
    optimizer = BAdam(
        [group(a, b, c)], adamw, layer_choice([[a], [b, c]], "descending", None, 0), switch_interval=3, freezes=True
    )
    optimizer.begin()
    naive = [weight.clone() for weight in start]
    for step in range(STEPS):
        active = (1, 2) if step // 3 % 2 == 0 else (0,)
        assert [weight.requires_grad for weight in params] == [index in active for index in range(3)]
        if step % 3 == 0:
            adams = {index: NaiveAdam() for index in active}
        for index, weight in enumerate(params):
            g = gradients(tuple(weight.shape))[step]
            weight.grad = g.clone() if index in active else None
            if index in active:
                naive[index] = naive[index] * (1 - LR * DECAY) - LR * adams[index](g)
        optimizer.step()
    for weight, expected in zip(params, naive, strict=True):
        close(weight.detach(), expected)


@pytest.mark.parametrize("mask_mode", ["adjacent", "scatter"])
def test_badam_by_ratio(mask_mode):
    (weight,) = weights((5, 4))
    w = weight.detach().clone().view(-1)
    optimizer = BAdam(
        [group(weight)], adamw, ratio_choice([weight], 0.35, mask_mode, 9), switch_interval=2, freezes=False
    )
    for step, g in enumerate(gradients((5, 4))):
        entries = next(iter(ratio_choice([weight], 0.35, mask_mode, 9)(step // 2).values()))
        if step % 2 == 0:
            adam = NaiveAdam()
        w[entries] = w[entries] * (1 - LR * DECAY) - LR * adam(g.view(-1)[entries])
        weight.grad = g.clone()
        before = weight.detach().clone().view(-1)
        optimizer.step()
        assert (before != weight.view(-1)).sum() == 7 == len(entries.unique())
    close(weight.detach(), w.view(5, 4))


def test_badam_of_weights_in_bf16_keeps_fp32_values():
    (weight,) = weights((4, 4))
    weight.data = weight.data.bfloat16()
    optimizer = BAdam(
        [{**group(weight), "lr": 1e-5}],
        adamw,
        layer_choice([[weight]], "fixed", None, 0),
        switch_interval=100,
        freezes=True,
    )
    start = weight.detach().clone()
    for _ in range(90):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    (values,) = optimizer.state_dict()["state"]["values"]
    assert values.dtype == torch.float32
    assert torch.equal(values.bfloat16(), weight)
    torch.testing.assert_close(values - start.float(), torch.full((4, 4), -9e-4), rtol=0.03, atol=0)


def test_order_of_blocks():
    def order(mode: str, start: int | None = None, periods: int = 8) -> list[int]:
        return [active_block(period, 4, mode, start, 7) for period in range(periods)]

    assert order("ascending") == [0, 1, 2, 3, 0, 1, 2, 3]
    assert order("ascending", 2) == [2, 3, 0, 1, 2, 3, 0, 1]
    assert order("descending") == [3, 2, 1, 0, 3, 2, 1, 0]
    assert order("fixed", 1) == [1] * 8
    drawn = order("random", periods=40)
    passes = [tuple(drawn[i : i + 4]) for i in range(0, 40, 4)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in passes)
    assert len(set(passes)) > 3
    assert order("random", 2)[0] == 2


@pytest.mark.parametrize("mode", ["adjacent", "scatter"])
def test_blocks_of_entries_take_turns_until_all_were_active(mode):
    seen = torch.cat([active_entries(period, 103, 0.1, mode, 5) for period in range(11)])
    assert len(seen) == 110
    assert len(seen.unique()) == 103
    assert len(active_entries(0, 3, 0.01, mode, 5)) == 1


def test_adam_mini():
    params = weights((8, 6), (4, 6), (6,), (4,))
    names = ["l.q_proj.weight", "l.up_proj.weight", "l.norm.weight", "l.q_proj.bias"]
    blocks = {weight: block_count(name, weight, 2) for name, weight in zip(names, params, strict=True)}
    assert list(blocks.values()) == [4, 4, 1, 4]  # heads of two rows, rows, the whole, entries
    optimizer = AdamMini([group(*params)], blocks, betas=(BETA1, BETA2), eps=EPS)
    for weight in params:
        w = weight.detach().clone().reshape(blocks[weight], -1)
        m = torch.zeros_like(w)
        v = [0.0] * len(w)
        for t, g in enumerate(gradients(tuple(weight.shape)), start=1):
            for b, g_b in enumerate(g.reshape(len(w), -1)):
                m[b] = BETA1 * m[b] + (1 - BETA1) * g_b
                v[b] = BETA2 * v[b] + (1 - BETA2) * (g_b**2).mean().item()
                step = (m[b] / (1 - BETA1**t)) / ((v[b] / (1 - BETA2**t)) ** 0.5 + EPS)
                w[b] = w[b] * (1 - LR * DECAY) - LR * step
        close(run(optimizer, weight, gradients(tuple(weight.shape))), w.view_as(weight))
        weight.grad = None


def small_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=False, **{**sizes, **changes}))


def test_muon_trains_hidden_matrices_and_adamw_the_rest():
    model = small_llama()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    names = set(start)
    optimizer = make_optimizer(MuonConfig(beta2=BETA2), Setting(model, LR, DECAY, names, 0))
    assert optimizer is not None
    generator = torch.Generator().manual_seed(2)
    grads = {name: [torch.randn(w.shape, generator=generator) for _ in range(3)] for name, w in start.items()}
    for step in range(3):
        for name, weight in model.named_parameters():
            weight.grad = grads[name][step].clone()
        optimizer.step()
    for name, weight in model.named_parameters():
        w, m, adam = start[name], torch.zeros_like(weight), NaiveAdam()
        muon = weight.ndim == 2 and "embed" not in name and "lm_head" not in name
        for g in grads[name]:
            w = w * (1 - LR * DECAY)
            if not muon:
                w = w - LR * adam(g)
                continue
            m = 0.95 * m + 0.05 * g
            x = (0.95 * m + 0.05 * g).double()
            x = x if x.shape[0] <= x.shape[1] else x.T
            x = x / x.norm()
            for _ in range(5):
                s = x @ x.T
                x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
            x = x if x.shape == g.shape else x.T
            w = w - LR * 0.2 * max(g.shape) ** 0.5 * x
        moved, expected = weight.detach() - start[name], w - start[name]
        # torch iterates in bf16: three digits.
        assert (moved - expected).norm() < (0.02 if muon else 1e-5) * expected.norm(), name


def test_lora_plus_is_pefts_and_keeps_its_ratio_through_the_schedule(tmp_path):
    import peft
    from transformers import TrainingArguments

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(small_llama(), config)
    plus = AdamWConfig(type="adamw_torch", lora_plus_ratio=16, beta2=0.95)
    args = TrainingArguments(tmp_path, learning_rate=1e-3, weight_decay=0.1, optim=optim_name(plus), report_to=[])
    optimizer = lora_plus(plus, args, model)
    expected = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {w: entry["lr"] for entry in expected.param_groups for w in entry["params"]}
    assert len(set(rates.values())) == 3
    schedule = ProgressSchedule(optimizer, 1e-3)
    for progress in (0.0, 0.5, 0.9):
        factor = learning_rate_factor(progress, "cosine", 0.0)
        schedule.set(factor)
        for entry in optimizer.param_groups:
            assert entry["betas"] == (0.9, 0.95)
            for weight in entry["params"]:
                assert entry["lr"] == pytest.approx(rates[weight] * factor)
    assert sum(len(entry["params"]) for entry in optimizer.param_groups) == len(rates)
    optimizer.load_state_dict(optimizer.state_dict())  # a resumed run
    schedule.set(0.5)
    named = {weight: name for name, weight in model.named_parameters()}
    for entry in optimizer.param_groups:
        for weight in entry["params"]:
            if "lora_B" in named[weight]:
                assert entry["lr"] == pytest.approx(16 * 0.5e-3)
