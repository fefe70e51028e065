"""Stage spin: rounds of answering with the last round's model and learning to prefer the data's answers to these.

    <run directory>/rounds/answers-N.jsonl   pairs: the data's answer chosen, the model's own rejected
    <run directory>/rounds/round-N/          the run directory of a job of stage dpo
    <run directory>/model/                   of the last round

What is whole is not made again: a job that goes on begins at the round, and in it at the checkpoint, where it stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from rayloom.collector import collector_off
from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job, read_job
from rayloom.data.config import DatasetConfig
from rayloom.data.example import Example
from rayloom.data.index import make_plan
from rayloom.data.segment import SIDE_COLUMN, SegmentOptions, read_chunk, side_of
from rayloom.data.template import Renderer
from rayloom.data.template_choice import resolve_template
from rayloom.data.walk import count_chunk
from rayloom.errors import RequestError
from rayloom.methods.config import LoraConfig
from rayloom.models.text_tokenizer import TokenizerState
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer
from rayloom.rollout.fleet import start_fleet
from rayloom.rollout.offline import Prediction, answers, cluster_gpus, engine_options, weights_of
from rayloom.rollout.request import Prompt, probe_prompt
from rayloom.stages.config import DpoConfig, SpinConfig
from rayloom.stages.prepare import make_encoder, plan_data
from rayloom.stages.rules import check_stage
from rayloom.train.driver import check_model_and_method, check_parts, run_job
from rayloom.train.ppo_rules import engine_faults
from rayloom.train.ray_session import prepare_environment, ray_session
from rayloom.train.run_dir import check_run_dir, differences, find_run, rest_of

_COLUMNS = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}


def run_self_play(job: JobConfig, *, started: float, verbose: bool = False) -> dict[str, Any]:
    """Run all rounds, or until the job is told to stop. Returns what `result.json` holds.

    Raises:
        RequestError: the request was wrong.
        JobError: a round failed.
    """
    stage = job.stage
    assert isinstance(stage, SpinConfig)
    if job.resume and job.overwrite:
        raise RequestError("resume and overwrite exclude each other: one keeps what is there, the other deletes it")
    check_self_play(job)
    if not job.resume:
        check_run_dir(job)
    elif not (job.run_dir / "job.yaml").exists():
        raise RequestError(f"resume: there is no run in {job.run_dir}; start without resume=true")
    else:
        _check_goes_on(job)
    _check_sources(job)
    folder = job.run_dir / "rounds"
    if job.overwrite and job.run_dir.exists():
        shutil.rmtree(job.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    kept = job.model_copy(update={"resume": False, "overwrite": False})
    (job.run_dir / "job.yaml").write_text(dump_job(kept), encoding="utf-8")
    results: list[dict[str, Any]] = []
    adapter = None
    for number in range(1, stage.rounds + 1):
        pairs = folder / f"answers-{number}.jsonl"
        if not pairs.exists():
            print(f"round {number} of {stage.rounds}: answering the prompts", flush=True)
            prepare_environment()
            with ray_session(verbose=verbose):
                _write_pairs(job, adapter, pairs, seed=job.train.seed + number)
        result = _learn(_round_job(job, folder, number, pairs, adapter), time.time(), verbose)
        results.append(result)
        if result["status"] == "stopped":
            break
        adapter = str(result["model_dir"])
    whole = {
        "name": job.name,
        "status": results[-1]["status"],
        "steps": sum(result["steps"] for result in results),
        "rounds": results,
        "seconds": round(time.time() - started, 2),
        "model_dir": None,
    }
    if whole["status"] == "finished":
        shutil.copytree(results[-1]["model_dir"], job.run_dir / "model", dirs_exist_ok=True)
        whole["model_dir"] = str(job.run_dir / "model")
    (job.run_dir / "result.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return whole


def check_self_play(job: JobConfig) -> None:
    """Refuse what the rounds could not do.

    Raises:
        RequestError: naming the key.
    """
    faults = []
    if job.output_folder is None:
        faults.append(f"output_dir: stage spin needs a folder for its rounds, and {job.output_dir} is an address")
    method = job.method
    if not isinstance(method, LoraConfig) or method.dora or method.changes_base or method.merged or method.adapters:
        faults.append(
            "method.type: stage spin trains one new adapter of type lora, without dora, pissa, olora or adapters"
        )
    else:
        faults += engine_faults(job)
    for key in ("share_gpus", "max_staleness"):
        if getattr(job.rollout, key):
            faults.append(f"rollout.{key}: in stage spin engines and workers take turns; leave it out")
    if job.rewards is not None:
        faults.append("rewards: they are for stage ppo, and this is spin; leave them out")
    if job.data.eval:
        faults.append("data.eval: stage spin makes its own pairs; say data.held_out")
    if faults:
        raise RequestError(*faults)
    check_stage(job)
    # The rounds are checked again when they begin; but then there are answers, and an old run is gone.
    assert isinstance(job.stage, SpinConfig)
    folder = job.run_dir / "rounds"
    for number, adapter in enumerate((None, "the last round's")[: job.stage.rounds], 1):
        check_parts(_round_job(job, folder, number, folder / f"answers-{number}.jsonl", adapter))


def _check_goes_on(job: JobConfig) -> None:
    """Refuse to go on as another job, but with more or fewer rounds."""
    place = job.run_dir / "job.yaml"
    before = read_job(place)
    if isinstance(before.stage, SpinConfig) and isinstance(job.stage, SpinConfig):
        before = before.model_copy(update={"stage": before.stage.model_copy(update={"rounds": job.stage.rounds})})
    if faults := differences(before, job, place):
        raise RequestError(*faults)


def _check_sources(job: JobConfig) -> None:
    """Refuse a model or data that cannot be read, while an old run is still there."""
    plan_data(job)
    with collector_off():
        check_model_and_method(job, job.train.device)
        make_encoder(job)


def _learn(job: JobConfig, started: float, verbose: bool) -> dict[str, Any]:
    """One round's training: what is left of it."""
    prepare_environment()
    rest = rest_of(job)
    return find_run(job).result() if rest is None else run_job(rest, started=started, verbose=verbose)


def _round_job(job: JobConfig, folder: Path, number: int, pairs: Path, adapter: str | None) -> JobConfig:
    """The dpo job of a round: it goes on with the last round's adapter, and compares with that round's model, whose
    log-probabilities are computed before the first step, so there is one copy of the weights."""
    assert isinstance(job.stage, SpinConfig)
    assert isinstance(job.method, LoraConfig)
    source = DatasetConfig.model_validate(
        {"path": str(pairs), "format": "openai", "ranking": True, "columns": _COLUMNS, "name": "self-play"}
    )
    return job.model_copy(
        update={
            "name": f"round-{number}",
            "output_dir": str(folder),
            "method": job.method.model_copy(update={"adapters": [adapter] if adapter else []}),
            "data": job.data.model_copy(update={"train": [source], "mix": "concat", "description": None}),
            "stage": DpoConfig(beta=job.stage.beta, reference="cached" if adapter else "adapter_off"),
            "rollout": type(job.rollout)(),
        }
    )


def _write_pairs(job: JobConfig, adapter: str | None, file: Path, *, seed: int) -> None:
    """Answer every prompt of the job's data with the last round's model, and put both answers side by side; whole or
    not at all."""
    tokenizer = load_tokenizer(TokenizerSource.of(job.model))
    renderer = Renderer(
        TokenizerState.of(tokenizer).load(),
        resolve_template(job.data.template, tokenizer, job.model.path),
        enable_thinking=job.data.enable_thinking,
    )
    asked: dict[int, tuple[Example, str]] = {}

    def prompts() -> Iterator[Prompt]:
        for number, (question, reference) in enumerate(_questions(job)):
            (ids,) = renderer.render_prompts([question])
            if isinstance(ids, list) and len(ids) <= job.data.cutoff:
                asked[number] = (question, reference)
                yield Prompt(number, tuple(ids), seed=seed * 1_000_003 + number & 0x7FFFFFFF)

    rollout = job.rollout
    sampling = rollout.sampling()
    cutoff, device = job.data.cutoff, job.train.device
    options = Prediction(job.model, "", file, sampling, rollout, adapter=adapter, cutoff=cutoff, device=device)
    stream = prompts()
    first = next(stream, None)
    if first is None:
        raise RequestError("data.train: none of its rows has a prompt within data.cutoff")
    fleet = start_fleet(rollout, engine_options(options, cluster_gpus()), probe_prompt(first.token_ids[:32]))
    partial = file.with_suffix(".partial")
    try:
        fleet.sync(weights_of(adapter))
        with partial.open("w", encoding="utf-8") as output:
            done = 0
            for rollouts in answers(fleet, chain([first], stream), sampling):
                for one in rollouts:
                    question, reference = asked.pop(one.prompt)
                    own = tokenizer.decode(list(one.token_ids), skip_special_tokens=True)
                    output.write(json.dumps(_pair(question, reference, own), ensure_ascii=False) + "\n")
                done += len(rollouts)
                print(f"{done} prompts answered", flush=True)
    finally:
        fleet.stop()
    partial.replace(file)


def _questions(job: JobConfig) -> Iterator[tuple[Example, str]]:
    """The prompts of all of the job's data in the order of its files, and the data's answers. Left out are rows with
    calls of tools, which have no place in a pair of texts, and answers that were judged bad."""
    data = job.data.model_copy(
        update={"mix": "concat", "train": [one.model_copy(update={"weight": None}) for one in job.data.train]}
    )
    options = SegmentOptions(cutoff=data.cutoff, packing=False, on_bad_row=data.on_bad_row, converters=data.converters)
    for number, data_set in enumerate(make_plan(data, seed=job.train.seed, epochs=1).sets):
        for index in range(data_set.chunks):
            chunk = data_set.chunk(index)
            for item in read_chunk(data_set, number, chunk, range(count_chunk(data_set, chunk)), options):
                example = item.example
                if example is None or example.text is not None or example.tools or example.desirable is False:
                    continue
                yield example.without_answer()


def _pair(question: Example, chosen: str, rejected: str) -> dict[str, Any]:
    def answer(text: str) -> dict[str, str]:
        return {"role": "assistant", "content": text}

    # What is held out must stay so when the next round rejects another answer.
    same = {"messages": question.as_dicts(), "chosen": answer(chosen)}
    return {**same, "rejected": answer(rejected), SIDE_COLUMN: side_of(same)}
