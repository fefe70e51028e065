"""A worker that is killed while it copies a checkpoint: what it leaves is none; the job goes on from the one before."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from tests.ray.small_jobs import job, metrics, run, write_rows
from tests.ray.test_recovery import processes
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rayloom.jobs.local_head import LocalHead
from rayloom.train.checkpoints import SNAPSHOT, checkpoint_name, step_of
from rayloom.train.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected"), pytest.mark.timeout(600)]

STEPS, SAVE = 24, 4


def wider_model(tiny_model: Path, folder: Path) -> Path:
    """The tiny model with 20 million weights: with AdamW's state a checkpoint has 240 MB."""
    config = AutoConfig.from_pretrained(tiny_model)
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 1024, 2048, 32
    config.num_key_value_heads = 32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file."""
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def counted(checkpoints: Path) -> int | None:
    """The newest step on Ray Train's list, if there is a whole one."""
    try:
        listed = json.loads((checkpoints / SNAPSHOT).read_text())
    except (OSError, ValueError):
        return None
    names = [Path(one["checkpoint_dir_name"]).name for one in listed["checkpoint_results"]]
    return max((step_of(name) or 0 for name in names), default=None)


def test_a_checkpoint_that_was_not_copied_to_its_end(head: LocalHead, tiny_model: Path, tmp_path: Path) -> None:
    sets = [{"path": str(write_rows(tmp_path / "rows.jsonl", 200))}]
    train = {"max_steps": STEPS, "save_steps": SAVE, "keep_checkpoints": STEPS, "learning_rate": 1e-4, "batch_size": 4}
    model = wider_model(tiny_model, tmp_path / "model")
    config = job(model, tmp_path, sets, method={"type": "full"}, train=train)
    checkpoints = config.run_dir / "checkpoints"
    found: list[tuple[int, int, dict[str, int], Path | None]] = []

    def watch() -> None:
        """Kill the worker as soon as there is the folder of a checkpoint, behind one that counts."""
        seen: set[int] = set()
        workers: list[psutil.Process] = []
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            steps = {step_of(path.name) or 0 for path in checkpoints.glob("step-*")}
            new, seen = steps - seen, seen | steps
            if new and workers and (before := counted(checkpoints)) is not None:
                for worker in workers:
                    worker.kill()
                psutil.wait_procs(workers)
                (step,) = new
                left = sizes(checkpoints / checkpoint_name(step))
                found.append((before, step, left, RunDir(config.run_dir, existed=True).latest_checkpoint()))
                return
            if not workers and counted(checkpoints) is not None:
                workers = processes(head, "RayTrainWorker")
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    result, _ = run(config)
    thread.join(1)
    ((before, step, left, latest),) = found
    whole = sizes(checkpoints / checkpoint_name(before))
    assert before < step
    assert sum(left.values()) < sum(whole.values())  # it was killed in the middle
    assert latest is not None
    assert latest.name == checkpoint_name(before)
    (event,) = result["breaks"]
    assert (event["kind"], event["from_step"]) == ("fault", before)
    assert [row["step"] for row in metrics(config)] == list(range(1, STEPS + 1))
    assert (result["status"], result["steps"]) == ("finished", STEPS)
    assert sizes(checkpoints / checkpoint_name(step)).keys() == whole.keys()  # made anew, and whole
