"""A job that is started again: with what its own attempts have left, and with nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from rayloom.config.read import dump_job, read_job
from rayloom.jobs.attempt import attempt_override, attempt_overrides
from rayloom.stages.config import SpinConfig
from rayloom.train.run_dir import check_run_dir, open_run_dir


def test_an_attempt_goes_on_with_its_own_run_only(job_file: Path, tmp_path: Path) -> None:
    job = read_job(job_file, [f"output_dir={tmp_path / 'runs'}"])
    assert attempt_override(job) is None, "nothing is there"
    run = open_run_dir(job, check_run_dir(job))
    assert attempt_override(job) == "overwrite=true", "it died before its first checkpoint"
    other = job.model_copy(update={"train": job.train.model_copy(update={"seed": 7})})
    assert attempt_override(other) is None, "another job of that name is refused by `rayloom train`"
    written = run.path / "job.yaml"
    written.write_text(re.sub(r" *(max_loss|share_gpus): .*\n", "", written.read_text()))
    assert attempt_override(job) == "overwrite=true", "an earlier version knew fewer keys"
    spin = job.model_copy(update={"stage": SpinConfig()})
    written.write_text(dump_job(spin))
    assert attempt_override(spin) == "resume=true", "its rounds are kept, whatever is in them"
    written.write_text(dump_job(job))
    run.write_result({"status": "finished"})
    assert attempt_override(job) is None


def test_the_first_attempts_wish_counts_where_it_has_left_nothing(job_file: Path, tmp_path: Path) -> None:
    given = [f"output_dir={tmp_path / 'runs'}", "overwrite=true"]
    assert attempt_overrides(str(job_file), given) == (given, None)
    older = read_job(job_file, [given[0], "train.seed=7"])
    open_run_dir(older, check_run_dir(older)).write_result({"status": "finished"})
    assert attempt_overrides(str(job_file), given) == (given, None), "it died before it overwrote the older run"
    job = read_job(job_file, given)
    open_run_dir(job, check_run_dir(job))
    assert attempt_overrides(str(job_file), given) == ([given[0], "overwrite=true"], "overwrite=true")
    assert attempt_overrides("none.yaml", ["train.epochs=2"]) == (["train.epochs=2"], None)
