"""One real vLLM engine in this process, against transformers and PEFT in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import reference
from tests.engine.reference import (
    PROBE,
    adapted,
    adapter_weights,
    agrees,
    base,
    full_weights,
    greedy,
    log_probs,
    noisy,
    prompts,
)
from transformers import AutoTokenizer

from rayloom.errors import JobError, RequestError
from rayloom.rollout.adapter_folders import adapter_rank_limit, pack
from rayloom.rollout.request import PROBE_CHOICES, EngineOptions, Probe, Prompt, Rollout, Sampling, Weights, difference
from rayloom.rollout.vllm_engine import VllmEngine

GREEDY = Sampling(max_tokens=12, temperature=0)
DRAWN = Sampling(max_tokens=16, temperature=0.7)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(EngineOptions(str(tiny_model), "fp32", 256, adapter_rank=4, kv_cache_gib=0.25))
    yield engine
    engine.close()


def _send(engine: VllmEngine, model: Any, version: int) -> Weights:
    weights, tensors = adapter_weights(model, version)
    engine.take(weights, pack(tensors))
    return weights


def _answers(engine: VllmEngine, asked: list[Prompt], sampling: Sampling) -> list[Rollout]:
    return engine.generate(asked, sampling, PROBE)[0]


def _probe(engine: VllmEngine) -> Probe:
    """What comes with the first prompts after new weights."""
    _, probe = engine.generate(prompts(2), GREEDY, PROBE)
    assert probe is not None
    return probe


def test_it_answers_nothing_before_it_has_weights(tiny_model: Path, engine: VllmEngine) -> None:
    if engine._version is None:  # another test may have been here
        with pytest.raises(JobError, match="before it had any weights"):
            engine.generate(prompts(1), GREEDY, PROBE)


def test_greedy_answers_are_those_of_transformers_with_and_without_an_adapter(
    tiny_model: Path, engine: VllmEngine
) -> None:
    end = engine.stop_token_ids
    assert end
    engine.take(Weights.of_base(), None)
    for model in (base(tiny_model), adapted(tiny_model, 1)):
        if hasattr(model, "peft_config"):
            _send(engine, model, 1)
        for prompt, rollout in zip(prompts(5), _answers(engine, prompts(5), GREEDY), strict=True):
            assert rollout.token_ids == greedy(model, prompt.token_ids, GREEDY.max_tokens, end)
            assert rollout.finish_reason == ("stop" if rollout.token_ids[-1] in end else "length")


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_log_probs_are_those_of_transformers_under_the_temperature(
    tiny_model: Path, engine: VllmEngine, temperature: float
) -> None:
    model = adapted(tiny_model, 1)
    _send(engine, model, 1)
    for prompt, rollout in zip(
        prompts(4), _answers(engine, prompts(4), replace(DRAWN, temperature=temperature)), strict=True
    ):
        expected = log_probs(model, prompt.token_ids, rollout.token_ids, temperature)
        assert rollout.log_probs == pytest.approx(expected, abs=reference.TOLERANCE)


def test_the_same_seeds_give_the_same_answers_whoever_is_asked_beside(tiny_model: Path, engine: VllmEngine) -> None:
    _send(engine, adapted(tiny_model, 1), 1)
    together = _answers(engine, prompts(6, samples=2), DRAWN)
    alone = [rollout for prompt in prompts(6, samples=2) for rollout in _answers(engine, [prompt], DRAWN)]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [(r.prompt, r.sample) for r in together] == [(n, s) for n in range(6) for s in range(2)]
    assert len({r.token_ids for r in together}) > 6  # the samples of a prompt differ
    other = [replace(prompt, seed=prompt.seed + 100) for prompt in prompts(6, samples=2)]
    assert [r.token_ids for r in _answers(engine, other, DRAWN)] != [r.token_ids for r in together]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1), Sampling(1, temperature=0.5), Sampling(1, top_k=7), Sampling(1, temperature=1.3, top_p=0.6)],
    ids=["all", "temperature", "top_k", "top_p"],
)
def test_tokens_are_drawn_as_often_as_the_model_says(tiny_model: Path, engine: VllmEngine, sampling: Sampling) -> None:
    """Pearson's chi-squared test, its bound five standard deviations above the mean."""
    model, draws = adapted(tiny_model, 1), 4000
    _send(engine, model, 1)
    (prompt,) = prompts(1, samples=draws)
    found = torch.tensor([answer.token_ids[0] for answer in _answers(engine, [prompt], sampling)])
    log_probs = (reference.next_log_probs(model, prompt.token_ids) / sampling.temperature).log_softmax(-1)
    probabilities, order = log_probs.exp().sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    probabilities[sampling.top_k or len(order) :] = 0
    probabilities[before >= sampling.top_p] = 0
    expected = draws * probabilities / probabilities.sum()
    counts = found.bincount(minlength=len(order))[order].double()
    assert not counts[expected == 0].any()
    often = expected >= 5
    pairs = [(counts[often], expected[often])]
    if expected[~often].sum() >= 5:
        pairs.append((counts[~often].sum()[None], expected[~often].sum()[None]))
    statistic = sum(float(((count - mean) ** 2 / mean).sum()) for count, mean in pairs)
    freedom = sum(len(count) for count, _ in pairs) - 1
    assert freedom >= 5
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_an_answer_ends_at_a_stop_text(tiny_model: Path, engine: VllmEngine) -> None:
    """Of one token or of several, and nowhere else: up to there it is the answer that it would have been."""
    _send(engine, adapted(tiny_model, 1), 1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    asked, free = prompts(6, samples=4), replace(DRAWN, max_tokens=40)
    whole = _answers(engine, asked, free)

    def text(ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    letter = min("abcdefghijklmnopqrstuvwxyz", key=lambda one: abs(sum(one in text(a.token_ids) for a in whole) - 8))
    pairs = [text(one.token_ids[n : n + 2]) for one in whole for n in range(8, len(one.token_ids) - 1)]
    stop = (
        letter,
        next(two for two in pairs if two.isascii() and two.isprintable() and len(two) > 1 > two.count(letter)),
    )
    ended, pair_alone = 0, False
    for one, found in zip(whole, _answers(engine, asked, replace(free, stop=stop)), strict=True):
        ends = (n for n in range(1, len(one.token_ids) + 1) if any(word in text(one.token_ids[:n]) for word in stop))
        end = next(ends, None)
        assert found.token_ids == one.token_ids[:end]
        assert found.log_probs == pytest.approx(one.log_probs[:end], abs=reference.TOLERANCE)
        assert found.finish_reason == ("stop" if end is not None else one.finish_reason)
        ended += end is not None
        pair_alone |= end is not None and letter not in text(one.token_ids[:end])
    assert 0 < ended < len(whole)
    assert pair_alone


def test_no_answer_is_shorter_than_it_may_be(tiny_model: Path, engine: VllmEngine) -> None:
    """Until then no token that ends an answer is drawn, and the log-probabilities are of the others alone; a stop text
    ends nothing either."""
    model, fewest = adapted(tiny_model, 1), 30
    _send(engine, model, 1)
    asked, free = prompts(4, samples=60), Sampling(max_tokens=40)
    assert any(len(one.token_ids) < fewest for one in _answers(engine, asked, free))
    found = _answers(engine, asked, replace(free, min_tokens=fewest))
    lengths = [len(one.token_ids) for one in found]
    assert min(lengths) >= fewest
    assert any(length < 40 for length in lengths)  # behind that they end as ever
    end = list(engine.stop_token_ids)
    for one in found[::60]:
        ids = torch.tensor([[*asked[one.prompt].token_ids, *one.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(asked[one.prompt].token_ids) - 1 : -1].double()
        logits[:fewest, end] = -torch.inf
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(one.token_ids)[:, None])[:, 0]
        assert one.log_probs == pytest.approx(expected.tolist(), abs=reference.TOLERANCE)
    stopped = _answers(engine, asked, replace(free, min_tokens=10, stop=("e",)))
    assert min(len(one.token_ids) for one in stopped) >= 10
    assert any(len(one.token_ids) < fewest for one in stopped)


def test_more_tokens_than_vllm_takes_in_a_step(tiny_model: Path, engine: VllmEngine) -> None:
    """A prompt that it would cut in two, and whose generator it would set back, which a CPU's cannot."""
    _send(engine, adapted(tiny_model, 1), 1)
    asked = [Prompt(n, tuple(3 + (7 * n + k) % 300 for k in range(150)), n) for n in range(60)]
    together = _answers(engine, asked, Sampling(4))
    assert [len(answer.log_probs) for answer in together] == [len(answer.token_ids) for answer in together]
    for number in (0, 26, 27, 59):
        (alone,) = _answers(engine, [asked[number]], Sampling(4))
        assert alone.token_ids == together[number].token_ids


def test_the_compiled_norms_are_taken(engine: VllmEngine) -> None:
    from vllm import ir

    x = torch.ones(2, 16)
    for operation, given in ((ir.ops.rms_norm, (x,)), (ir.ops.fused_add_rms_norm, (x, x))):
        assert operation.dispatch(*given, torch.ones(16), 1e-5).provider == "vllm_c_cpu"


def test_each_version_that_is_sent_is_the_one_served(tiny_model: Path, engine: VllmEngine) -> None:
    folders = []
    for version in (1, 2, 3):
        model = adapted(tiny_model, version)
        weights = _send(engine, model, version)
        probe = _probe(engine)
        assert difference(weights, engine.serves()) is None
        assert agrees(model, probe)
        assert not agrees(adapted(tiny_model, version + 1), probe)
        likeliest = reference.next_log_probs(model, PROBE).topk(PROBE_CHOICES).indices
        assert probe.token_ids == tuple(likeliest.tolist())
        (rollout,) = _answers(engine, prompts(1), GREEDY)
        assert rollout.token_ids == greedy(model, prompts(1)[0].token_ids, 12, engine.stop_token_ids)
        assert rollout.policy_version == version
        assert engine.generate(prompts(1), GREEDY, PROBE)[1] is None  # once
        folders.append(engine._adapter.lora_path)
    assert [Path(folder).exists() for folder in folders] == [False, False, True]


def test_when_an_engine_that_shares_its_gpu_sleeps(
    tiny_model: Path, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM sleeps on GPUs only, so here it is only told to: awake from new weights or prompts until it shall rest."""
    model = adapted(tiny_model, 1)
    _send(engine, model, 1)
    expected = _answers(engine, prompts(3), GREEDY)
    done: list[str] = []
    answer = engine._llm.generate
    monkeypatch.setattr(engine, "_options", replace(engine._options, sleeps=True))
    monkeypatch.setattr(engine._llm, "sleep", lambda level: done.append(f"sleep {level}"))
    monkeypatch.setattr(engine._llm, "wake_up", lambda: done.append("wake"))
    monkeypatch.setattr(engine._llm, "generate", lambda *given, **more: done.append("answer") or answer(*given, **more))
    _send(engine, model, 1)
    assert done == ["wake"]
    assert engine.serves().version == 1
    assert [one.token_ids for one in _answers(engine, prompts(3), GREEDY)] == [one.token_ids for one in expected]
    engine.rest()
    assert done == ["wake", "wake", "answer", "sleep 1"]  # one that is awake takes no notice
    _answers(engine, prompts(3), GREEDY)
    assert done[-2:] == ["wake", "answer"]


# --- sabotage: each is caught by what the sync itself says ------------------------------------------------------------


def test_an_engine_that_keeps_old_weights_is_found_out(
    tiny_model: Path, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _send(engine, adapted(tiny_model, 1), 1)
    kept = engine._adapter.lora_int_id
    core = engine._llm.llm_engine
    with monkeypatch.context() as patch:
        patch.setattr(core, "add_lora", lambda request: True)
        patch.setattr(core, "remove_lora", lambda number: True)
        patch.setattr(engine, "_serial", kept - 1)  # the old one stands under the new one's number
        weights = _send(engine, adapted(tiny_model, 2), 2)
        fault = difference(weights, engine.serves())
    assert fault is not None
    assert "engine 0 serves tensors 0 instead of" in fault


def test_an_adapter_with_missing_tensors_is_found_out(tiny_model: Path, engine: VllmEngine) -> None:
    weights, tensors = adapter_weights(adapted(tiny_model, 3), 3)
    lost = next(iter(tensors))
    engine.take(weights, pack({name: tensor for name, tensor in tensors.items() if name != lost}))
    fault = difference(weights, engine.serves())
    assert fault is not None
    assert f"tensors {len(tensors) - 1} instead of {len(tensors)}" in fault
    engine.take(weights, pack({**tensors, lost: tensors[lost] * 1.001}))
    fault = difference(weights, engine.serves())
    assert fault is not None
    assert "digest" in fault
    assert "tensors" not in fault


def test_prompts_that_go_with_another_adapter_are_found_out(tiny_model: Path, engine: VllmEngine) -> None:
    from vllm.lora.request import LoRARequest

    _send(engine, adapted(tiny_model, 4), 4)
    old_folder = Path(engine._adapter.lora_path).with_name("kept")
    Path(engine._adapter.lora_path).rename(old_folder)
    model = adapted(tiny_model, 5)
    weights = _send(engine, model, 5)
    engine._adapter = LoRARequest("kept", 10_000, str(old_folder))
    fault = difference(weights, engine.serves())
    assert fault is not None
    assert "engine 0 serves" in fault


def test_keys_and_values_of_old_weights_are_found_out(
    tiny_model: Path, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core import kv_cache_utils

    monkeypatch.setattr(kv_cache_utils, "_gen_lora_extra_hash_keys", lambda request: ["policy"])
    _send(engine, adapted(tiny_model, 6), 6)
    _probe(engine)  # nothing stands under that key yet
    _send(engine, adapted(tiny_model, 7), 7)
    with pytest.raises(JobError, match="from keys and values of earlier weights"):
        _probe(engine)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_prompt_that_passes_the_engines_length_is_refused(tiny_model: Path, engine: VllmEngine) -> None:
    _send(engine, adapted(tiny_model, 1), 1)
    with pytest.raises(RequestError, match=r"rollout.max_tokens: 254: with a prompt of 3 tokens"):
        _answers(engine, prompts(1), Sampling(max_tokens=254))


def test_a_rank_above_the_engines_limit_is_refused() -> None:
    assert [adapter_rank_limit(rank) for rank in (1, 2, 8, 9, 512)] == [1, 8, 8, 16, 512]
    with pytest.raises(RequestError, match=r"method.rank: 513"):
        adapter_rank_limit(513)


def test_whole_weights(tiny_model: Path, tmp_path: Path) -> None:
    """An engine of its own: one with adapters does not take whole weights."""
    engine = VllmEngine(EngineOptions(str(tiny_model), "fp32", 256, kv_cache_gib=0.25))
    try:
        for version in (1, 2):
            model = noisy(tiny_model, version)
            weights, tensors = full_weights(model, version)
            engine.take(weights, tensors)
            probe = _probe(engine)
            assert difference(weights, engine.serves()) is None
            assert agrees(model, probe)
            (rollout,) = _answers(engine, prompts(1), GREEDY)
            assert rollout.token_ids == greedy(model, prompts(1)[0].token_ids, 12, engine.stop_token_ids)
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_an_engine_of_two_processes_takes_weights_and_tells_which(
    tiny_model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tensor parallelism needs, which here is on CPU: vLLM's workers are processes of their own."""
    from vllm import envs

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else it wants a NUMA node for each
    envs.disable_envs_cache()  # another engine in this process has read all variables for good
    rank = 4 if kind == "adapter" else None
    options = EngineOptions(str(tiny_model), "fp32", 256, adapter_rank=rank, kv_cache_gib=0.25, tensor_parallel=2)
    engine = VllmEngine(options)
    try:
        for version in (1, 2):
            model: Any = adapted(tiny_model, version) if kind == "adapter" else noisy(tiny_model, version)
            weights, tensors = (adapter_weights if kind == "adapter" else full_weights)(model, version)
            engine.take(weights, pack(tensors) if kind == "adapter" else tensors)
            probe = _probe(engine)
            assert difference(weights, engine.serves()) is None
            assert agrees(model, probe)
            lost = sorted(tensors)[0]
            some = {name: tensor for name, tensor in tensors.items() if name != lost}
            if kind == "full":
                engine.take(weights, some)
                assert difference(weights, engine.serves()) is not None
    finally:
        engine.close()
