"""What is added to the loss of stage sft, through the whole trainer: NEFTune's noise and the router's loss; and models
that average over a batch themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.matrix.tiny_configs import tiny_config
from tests.ray.small_jobs import job, plain_losses, run, write_rows
from tests.ray.test_training import LOSSES, examples_of, fresh_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected")]

STEPS, ALPHA, COEFFICIENT = 4, 5.0, 0.5


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [{"path": str(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 60))}]


def tiny(model_type: str, tiny_model: Path, folder: Path) -> Path:
    """A tiny random model of the type, with the tiny model's tokenizer."""
    tokenizer, known = AutoTokenizer.from_pretrained(tiny_model), AutoConfig.from_pretrained(tiny_model)
    ids = {name: getattr(known, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    config = tiny_config(model_type, vocab_size=known.vocab_size, max_position_embeddings=256, **ids)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def test_neftune_equals_a_loop_with_the_same_noise(
    tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Each batch is one example, so the noise is drawn here as it is there, and from the same seed."""
    train = {"max_steps": STEPS, "batch_size": 1, "gradient_accumulation": 2}
    one = {"data": {"packing": False}, "train": train}
    noisy = job(tiny_model, tmp_path, sets, name="noisy", stage={"neftune": ALPHA}, **one)
    found = losses(run(noisy)[1])
    plain = losses(run(job(tiny_model, tmp_path, sets, name="plain", **one))[1])
    assert abs(found[0] - plain[0]) > 1e-3

    def add_noise(module: Any, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        bound = ALPHA / (embedded.shape[1] * embedded.shape[2]) ** 0.5
        return embedded + torch.empty_like(embedded).uniform_(-bound, bound)

    model = fresh_model(noisy, tiny_model)
    model.get_input_embeddings().register_forward_hook(add_noise)
    torch.manual_seed(noisy.train.seed)
    assert found == pytest.approx(plain_losses(model, examples_of(noisy, STEPS), noisy), abs=1e-5)


def test_neftune_is_off_in_evaluation(tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    """At a learning rate that changes nothing: with the noise the training's losses differ, and the evaluation's do
    not."""
    train = {"max_steps": 2, "learning_rate": 1e-12, "eval_steps": 1}
    runs = [
        run(job(tiny_model, tmp_path, sets, name=name, stage=stage, data={"held_out": 0.2}, train=train))[1]
        for name, stage in (("plain", {}), ("noisy", {"neftune": ALPHA}))
    ]
    plain, noisy = ([row["eval_loss"] for row in rows if "eval_loss" in row] for rows in runs)
    assert len(plain) == 2
    assert noisy == pytest.approx(plain, abs=1e-6)
    assert all(abs(one - other) > 1e-3 for one, other in zip(losses(runs[0]), losses(runs[1]), strict=True))


@pytest.mark.parametrize("stage", ["cross_entropy", "dft"])
def test_the_routers_loss_is_added(stage: str, tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path) -> None:
    """By the model itself, and beside a loss of our own; of a step's two batches it is the mean."""
    model = tiny("mixtral", tiny_model, tmp_path / "model")
    train = {"max_steps": 1, "batch_size": 1, "gradient_accumulation": 2}
    parts = {"data": {"packing": False}, "train": train, "stage": {"loss": stage}}
    config = job(model, tmp_path, sets, name="balanced", **parts)
    config = config.model_copy(update={"model": config.model.model_copy(update={"moe_aux_loss": COEFFICIENT})})
    (balanced,) = losses(run(config)[1])
    (plain,) = losses(run(job(model, tmp_path, sets, name="plain", **parts))[1])
    (step,) = examples_of(config, 1)
    assert len(step) == 2
    bare = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)  # a new adapter changes nothing yet
    with torch.no_grad():
        router = [float(bare(torch.tensor([ids]), output_router_logits=True).aux_loss) for ids, _ in step]
    of_tokens = {} if stage == "cross_entropy" else {"of_tokens": LOSSES[stage][1]}
    (tokens,) = plain_losses(fresh_model(config, model), [step], config, **of_tokens)
    assert plain == pytest.approx(tokens, abs=1e-5)
    assert balanced == pytest.approx(tokens + COEFFICIENT * sum(router) / 2, abs=1e-5)
    assert COEFFICIENT * sum(router) / 2 > 0.1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_that_averages_over_its_batch(
    method: str, tiny_model: Path, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Bart's own loss is its batch's mean; a step's is that of its tokens, however they fall into batches."""
    model = tiny("bart", tiny_model, tmp_path / "model")
    train = {"max_steps": STEPS, "learning_rate": 1e-3}
    divided, whole = (
        job(
            model, tmp_path, sets, name=f"of-{size}", data={"packing": False}, method={"type": method},
            train={**train, "batch_size": size, "gradient_accumulation": 4 // size},
        )
        for size in (2, 4)
    )  # fmt: skip
    found = losses(run(divided)[1])
    assert found == pytest.approx(losses(run(whole)[1]), abs=1e-5)
    examples = examples_of(divided, STEPS, rows_per_step=4)
    assert [len(step) for step in examples] == [4] * STEPS
    assert found == pytest.approx(plain_losses(fresh_model(divided, model), examples, divided), abs=1e-5)
