"""NEFTune through transformers' hook: noise in training only, and nothing of it in what is saved."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.optimizer_cases import batch, small_model

ALPHA = 5.0


@pytest.mark.parametrize("with_lora", [False, True])
def test_noise_in_training_only_and_nothing_saved(with_lora, tmp_path):
    model: Any = small_model()
    start = model.get_input_embeddings().weight.detach().clone()
    if with_lora:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    embeddings = model.get_input_embeddings()
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    class Watch(transformers.TrainerCallback):
        """Once the trainer's hook is there, look at what comes out behind it."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            def watch(module: Any, args: Any, output: torch.Tensor) -> None:
                plain = torch.nn.functional.embedding(args[0], module.weight)
                seen[module.training].append((output - plain).detach())

            embeddings.register_forward_hook(watch)

    rows = [{name: tensor[0] for name, tensor in batch(number).items()} for number in range(8)]
    args = transformers.TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        neftune_noise_alpha=ALPHA,
        learning_rate=0.0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, callbacks=[Watch()])
    trainer.train()
    bound = ALPHA / (8 * 16) ** 0.5
    noise = torch.stack(seen[True])
    assert bound * 0.95 < noise.abs().max() <= bound * 1.0001
    assert noise.std() == pytest.approx(bound / 3**0.5, rel=0.1)  # uniform
    assert len(seen[False]) >= 3
    assert all((difference == 0).all() for difference in seen[False])
    assert not hasattr(embeddings, "neftune_noise_alpha")
    assert torch.equal(embeddings.weight, start)
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(next((tmp_path / "saved").glob("*.safetensors")))
    if with_lora:
        assert all("lora_" in name for name in saved)
    else:
        assert torch.equal(saved["model.embed_tokens.weight"], start)
    model.train()
    assert (embeddings(rows[0]["input_ids"]) == start[rows[0]["input_ids"]]).all()  # the hook is gone
