"""Pipelines: what steps share, what they take from each other, their keys, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.ray.small_jobs import write_rows

from rayloom.config.document import dump_document
from rayloom.config.read import dump_job, read_job
from rayloom.errors import RequestError
from rayloom.jobs.attempt import pipeline_override
from rayloom.pipeline.plan import PipelinePlan, plan_pipeline
from rayloom.pipeline.read import is_pipeline, read_pipeline, written_jobs
from rayloom.pipeline.run import run_pipeline
from rayloom.pipeline.wire import PlannedStep

JOBS = Path(__file__).resolve().parents[2] / "jobs"
PIPELINES = sorted((JOBS / "pipelines").glob("*.yaml"))


@pytest.fixture
def here(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with data."""
    write_rows(tmp_path / "rows.jsonl", 12)
    pairs = [{"instruction": f"Say {i}.", "output": [f"It is {i}.", "No."]} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


PAIRS = {"train": [{"path": "pairs.jsonl", "ranking": True}]}
SFT = {"name": "sft", "data": {"train": ["rows.jsonl"]}}
DPO = {"name": "dpo", "from": "sft", "data": PAIRS, "stage": {"type": "dpo", "reference": "cached"}}
REWARD = {"name": "reward", "data": PAIRS, "stage": {"type": "reward"}}
PPO = {
    "name": "ppo",
    "from": "sft",
    "data": {"train": ["rows.jsonl"]},
    "stage": {"type": "ppo", "reference": "copy", "prompts": 8},
    "rewards": {"sources": [{"type": "adapter", "from": "reward"}]},
}


@pytest.fixture
def write(here: Path, tiny_model: Path) -> Any:
    """Writes a pipeline of these steps and keys of the top; returns the file."""

    def written(*steps: Any, **top: Any) -> Path:
        shared = {"model": {"path": str(tiny_model)}, "data": {"cutoff": 128}, "train": {"device": "cpu"}}
        document = {"name": "chain", **shared, **top, "steps": list(steps)}
        (here / "chain.yaml").write_text(dump_document(document))
        return here / "chain.yaml"

    return written


@pytest.fixture
def plan(write: Any) -> Any:
    def planned(*steps: Any, overrides: list[str] | None = None, **top: Any) -> PipelinePlan:
        return plan_pipeline(read_pipeline(write(*steps, **top), overrides or []))

    return planned


def by_name(plan: PipelinePlan) -> dict[str, PlannedStep]:
    return {step.name: step for step in plan.steps}


# --- what a step is -------------------------------------------------------------------------------------------------


def test_a_step_is_what_the_top_says_and_what_it_says_itself(plan: Any, here: Path) -> None:
    second = {**DPO, "train": {"batch_size": 2}}
    sft, dpo = plan(SFT, second, train={"device": "cpu", "batch_size": 3, "seed": 7}).steps
    assert (sft.job.train.batch_size, dpo.job.train.batch_size) == (3, 2)
    assert sft.job.train.seed == dpo.job.train.seed == 7
    assert sft.job.data.cutoff == dpo.job.data.cutoff == 128
    assert sft.job.run_dir == here / "runs" / "chain" / f"sft-{sft.key}"


def test_another_type_takes_nothing_of_the_tops(plan: Any) -> None:
    (step,) = plan({**SFT, "method": {"type": "full"}}, method={"rank": 4}).steps
    assert step.job.method.type == "full"
    (step,) = plan({**SFT, "method": {"dropout": 0.1}}, method={"rank": 4}).steps
    assert (step.job.method.rank, step.job.method.dropout) == (4, 0.1)


def test_overrides_of_all_and_of_one(plan: Any) -> None:
    first = {**SFT, "train": {"epochs": 2}}
    sft, dpo = plan(first, DPO, overrides=["train.epochs=3", "steps[1].train.learning_rate=0.5"]).steps
    assert (sft.job.train.epochs, dpo.job.train.epochs) == (3, 3)
    assert (sft.job.train.learning_rate, dpo.job.train.learning_rate) == (1e-4, 0.5)
    assert plan(SFT, overrides=["name=other", "output_dir=elsewhere"]).folder.parts[-2:] == ("elsewhere", "other")


@pytest.mark.parametrize("recipe", PIPELINES, ids=lambda path: path.stem)
def test_a_recipe_is_a_pipeline(recipe: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.chdir(JOBS.parent)
    found = plan_pipeline(read_pipeline(recipe, [f"model.path={tiny_model}"]))
    assert found.name == recipe.stem
    assert len(found.steps) == recipe.read_text().count("- name:")
    assert recipe.read_text().startswith("# Pipeline: ")


# --- what a step takes from those before ----------------------------------------------------------------------------


def test_an_adapter_goes_on(plan: Any, tiny_model: Path) -> None:
    sft, dpo = plan({**SFT, "method": {"rank": 4, "target": ["q_proj"]}}, DPO).steps
    assert dpo.job.method.adapters == [str(sft.job.run_dir / "model")]
    assert (dpo.job.method.rank, dpo.job.method.target) == (4, ["q_proj"])
    assert dpo.job.model == sft.job.model
    assert dpo.stand_in.method.adapters == []
    sft, dpo = plan({**SFT, "method": {"rank": 4, "init": "pissa"}}, DPO).steps
    assert (dpo.job.method.rank, dpo.job.method.init) == (8, "default")


def test_a_whole_model_is_begun_at(plan: Any, tiny_model: Path) -> None:
    first = {**SFT, "method": {"type": "full"}, "model": {"add_tokens": ["<a>"]}}
    second = {**DPO, "method": {"type": "lora"}, "model": {"attention": "eager"}, "stage": {"type": "dpo"}}
    sft, dpo = plan(first, second).steps
    assert dpo.job.model.path == str(sft.job.run_dir / "model")
    assert (dpo.job.model.add_tokens, dpo.job.model.attention) == ([], "eager")  # it has the tokens already
    assert dpo.job.method.adapters == []
    assert dpo.stand_in.model.path == str(tiny_model)
    assert (dpo.stand_in.model.add_tokens, dpo.stand_in.model.attention) == (["<a>"], "eager")


def test_a_new_adapter_is_of_the_merged_model(plan: Any) -> None:
    second = {**DPO, "method": {"rank": 2, "new_adapter": True}, "stage": {"type": "dpo"}}
    sft, dpo, last = plan(SFT, second, {**DPO, "name": "last", "from": "dpo"}).steps
    assert (dpo.job.method.adapters, dpo.job.method.rank) == ([sft.model], 2)
    assert last.job.model.path == f"{dpo.model}/base"
    assert (last.job.method.adapters, last.job.method.new_adapter) == ([dpo.model], False)


def test_an_adapter_judges(plan: Any) -> None:
    steps = by_name(plan(SFT, REWARD, PPO))
    ppo = steps["ppo"].job
    assert [source.path for source in ppo.rewards.sources] == [steps["reward"].model]
    assert ppo.method.adapters == [steps["sft"].model]
    assert steps["ppo"].stand_in.rewards.sources == []


# --- keys -----------------------------------------------------------------------------------------------------------


def keys(plan: PipelinePlan) -> list[str]:
    return [step.key for step in plan.steps]


def test_a_key_changes_with_what_changes_the_result(plan: Any, here: Path) -> None:
    before = keys(plan(SFT, DPO))
    assert keys(plan(SFT, DPO)) == before
    assert keys(plan(SFT, DPO, output_dir="elsewhere", name="other")) == before
    for override in ("train.logging_steps=3", "train.save_steps=3", "train.max_failures=0", "data.manifest=true"):
        assert keys(plan(SFT, DPO, overrides=[override])) == before
    searched = {"metric": "loss", "space": {"train.learning_rate": "loguniform(1e-5, 1e-3)"}}
    assert (
        keys(plan(SFT, DPO, search=searched)) == before
    )  # a search is of the whole, and `rayloom train` leaves it aside
    first, second = keys(plan(SFT, DPO, overrides=["steps[1].train.learning_rate=0.5"]))
    assert first == before[0]
    assert second != before[1]
    changed = keys(plan(SFT, DPO, overrides=["steps[0].train.learning_rate=0.5"]))
    assert not set(changed) & set(before)  # the second begins at the first


def test_a_key_changes_with_the_data(plan: Any, here: Path) -> None:
    before = keys(plan(SFT, DPO))
    with (here / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "More?", "output": ["Yes.", "No."]}) + "\n")
    after = keys(plan(SFT, DPO))
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_key_changes_with_a_reward_function(plan: Any, here: Path) -> None:
    rewards = {"sources": [{"type": "function", "path": "score.py:score"}]}
    found = []
    for value in (0.0, 1.0, 0.0):
        (here / "score.py").write_text(
            f"def score(prompts, answers, references):\n    return [{value} for _ in prompts]\n"
        )
        found.append(keys(plan(SFT, {**PPO, "rewards": rewards}))[1])
    assert found[0] == found[2] != found[1]


def test_a_copy_of_the_model_is_the_same_model(plan: Any, here: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, here / "model", copy_function=shutil.copyfile)
    before = keys(plan(SFT, model={"path": "model"}))
    shutil.rmtree(here / "model")
    shutil.copytree(tiny_model, here / "model", copy_function=shutil.copyfile)
    assert keys(plan(SFT, model={"path": "model"})) == before
    weights = bytearray((here / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (here / "model" / "model.safetensors").write_bytes(weights)
    assert keys(plan(SFT, model={"path": "model"})) != before


def test_workers_count_where_they_change_a_step(plan: Any) -> None:
    def of(**train: Any) -> list[str]:
        return keys(plan(SFT, train={"device": "cpu", "batch_size": 2, **train}))

    assert of(workers=1) != of(workers=2)
    assert of(workers=1, global_batch_size=8) == of(workers=2, global_batch_size=8)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], r"chain.yaml:\d+: steps: must be a list of at least one step, each with a name, not an empty list"),
        (["sft"], r"steps\[0\]: must be a mapping of keys, not 'sft'"),
        ([{"data": {"train": ["rows.jsonl"]}}], r"steps\[0\].name is missing"),
        ([{**SFT, "name": "a b"}], r"steps\[0\].name: 'a b' must start with a letter or digit"),
        ([SFT, SFT], r"steps\[1\].name: there are two steps of the name 'sft'"),
        ([SFT, {**DPO, "from": "sfd"}], r"steps\[1\].from: there is no step 'sfd'; did you mean 'sft'\?"),
        ([SFT, {**DPO, "from": "dpo"}], r"steps\[1\].from: 'dpo' is the step itself; name one before it"),
        ([{**DPO, "from": "last"}, {**SFT, "name": "last"}], r"steps\[0\].from: step 'last' comes later; name one"),
        ([{**DPO, "from": "nope"}], r"steps\[0\].from: there is no step 'nope' before this one, which is the first"),
        ([SFT, {**DPO, "from": 3}], r"steps\[1\].from: there is no step 3"),
        (
            [SFT, {**PPO, "rewards": {"sources": [{"type": "adapter", "from": "judge"}]}}],
            r"steps\[1\].rewards.sources\[0\].from: there is no step 'judge'",
        ),
        ([{**SFT, "output_dir": "x"}], r"steps\[0\].output_dir: the pipeline has one for all of its steps"),
        ([{**SFT, "resume": True}], r"steps\[0\].resume: the pipeline has one for all of its steps"),
        ([{**SFT, "trian": {}}], r"\(step sft\): unknown key 'trian'; did you mean 'train'|:\d+: unknown key 'trian'"),
        ([SFT, {**DPO, "model": {"path": "m"}}], r"steps\[1\].model.path: is that of step sft, as `from` says"),
        ([SFT, {**DPO, "method": {"adapters": ["x"]}}], r"steps\[1\].method.adapters: is that of step sft"),
        (
            [SFT, {**DPO, "method": {"rank": 3}}],
            r"steps\[1\].method.rank: 3, but the adapter of step sft goes on, and has 8; leave it out, or say",
        ),
        ([SFT, {**DPO, "method": {"alpha": 3}}], r"steps\[1\].method.alpha: 3, but the adapter .* has 16"),
        ([SFT, {**DPO, "method": {"type": "full"}}], r"steps\[1\].method.type: full: step sft leaves a LoRA adapter"),
        (
            [{**SFT, "method": {"type": "oft"}}, DPO],
            r"steps\[1\].from: step sft trains with method.type: oft, and a further step can begin only at",
        ),
        ([REWARD, {**PPO, "from": "reward"}], r"steps\[1\].from: step reward trains a reward model, which judges"),
        (
            [SFT, {**DPO, "stage": {"type": "dpo"}}],
            r"step dpo: stage.loss: sigmoid would compare with the model as it was before method.adapters",
        ),
        (
            [SFT, {**PPO, "rewards": {"sources": [{"type": "adapter", "from": "sft"}]}}],
            r"sources\[0\].from: step sft is of stage sft; one of stage reward trains a reward model",
        ),
        (
            [SFT, REWARD, {**PPO, "rewards": {"sources": [{"type": "model", "from": "reward"}]}}],
            r"sources\[0\].from: step reward leaves an adapter, no whole model; say type: adapter",
        ),
        (
            [SFT, REWARD, {**PPO, "rewards": {"sources": [{"type": "length", "from": "reward"}]}}],
            r"only sources of type adapter and model are a step's, not length",
        ),
        (
            [{**SFT, "method": {"type": "full"}}, REWARD, PPO],
            r"sources\[0\].from: the adapter of step reward is one of .*, and this step's model is .*/model;",
        ),
        (
            [SFT, {**REWARD, "from": "sft", "method": {"new_adapter": True}}, PPO],
            r"sources\[0\].from: the adapter of step reward is one of .*/model/base, and this step's model is",
        ),
        ([SFT, {**DPO, "data": {"train": ["none.jsonl"]}}], r"step dpo: .*none.jsonl: no such data file"),
    ],
)  # fmt: skip
def test_what_is_refused(write: Any, here: Path, steps: list[Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run_pipeline(read_pipeline(write(*steps)), started=0.0)
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps[2].train.epochs=1"], r"there is no step 2; the pipeline has 2, counted from 0"),
        (["steps[1]=x"], r"change a key of one step: steps\[1\].train.epochs=3"),
        (["steps=[]"], r"change a key of one step"),
        (["steps[1].train.epoch=1"], r"override 'steps\[1\].train.epoch=1': train has no key 'epoch'; did you mean"),
        (["train.epoch=1"], r"override 'train.epoch=1': train has no key 'epoch'"),
        (["output_dir=s3://bucket/runs"], r"output_dir: a pipeline needs a folder, .* s3://bucket/runs is an address"),
        (["resume=true"], r"resume: there is no run of these steps in .*chain; start without resume=true"),
        (["resume=true", "overwrite=true"], "resume and overwrite exclude each other"),
        (["name=a b"], "name: 'a b' must start with a letter or digit"),
    ],
)
def test_refused_overrides(write: Any, here: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        run_pipeline(read_pipeline(write(SFT, DPO), overrides), started=0.0)
    assert len(caught.value.messages) == 1, "what stands at the top is told once"
    assert not (here / "runs").exists()


def test_faults_of_all_steps_are_told_at_once(write: Any, here: Path) -> None:
    first, second = {**SFT, "train": {"epochs": 0}}, {**REWARD, "stage": {"type": "rewrad"}}
    with pytest.raises(RequestError) as caught:
        plan_pipeline(read_pipeline(write(first, second)))
    assert len(caught.value.messages) == 2


def test_a_later_step_is_checked_on_the_first_ones_model(write: Any, here: Path) -> None:
    """Its adapter is not there yet; what the model's shape says of the step is told all the same."""
    second = {**DPO, "method": {"rank": 2000, "new_adapter": True}, "stage": {"type": "dpo"}}
    with pytest.raises(RequestError, match=r"step dpo: method.rank: 2000 is above the size of"):
        run_pipeline(read_pipeline(write(SFT, second)), started=0.0)
    assert not (here / "runs").exists()


def test_what_others_have_left_is_kept(plan: Any, write: Any, here: Path) -> None:
    sft, _ = plan(SFT, DPO).steps
    sft.job.run_dir.mkdir(parents=True)
    (sft.job.run_dir / "job.yaml").write_text(dump_job(sft.job))
    with pytest.raises(RequestError, match=r"step sft: output_dir: .* holds an unfinished run .*resume=true goes on"):
        run_pipeline(read_pipeline(write(SFT, DPO)), started=0.0)
    (sft.job.run_dir / "result.json").write_text('{"status": "finished", "steps": 3}')
    with pytest.raises(RequestError, match=r"step sft: .*model is gone, which the finished step has left"):
        run_pipeline(read_pipeline(write(SFT, DPO)), started=0.0)
    (here / "runs" / "chain" / "job.yaml").write_text("")
    with pytest.raises(RequestError, match=r"runs/chain is the run directory of a job; give the pipeline another name"):
        run_pipeline(read_pipeline(write(SFT, DPO)), started=0.0)


def test_commands_of_one_job_refuse_a_pipeline(write: Any, job_file: Path) -> None:
    file = write(SFT)
    assert is_pipeline(file)
    assert not is_pipeline(job_file)
    assert not is_pipeline("none.yaml")
    with pytest.raises(RequestError, match=r"chain.yaml:\d+: steps: this is a pipeline of jobs, which `rayloom train`"):
        read_job(file)


def test_another_attempt_goes_on_with_what_has_begun(plan: Any, write: Any, here: Path) -> None:
    assert pipeline_override(read_pipeline(write(SFT, DPO))) is None
    plan(SFT, DPO).steps[0].job.run_dir.mkdir(parents=True)
    assert pipeline_override(read_pipeline(write(SFT, DPO))) == "resume=true"
    assert pipeline_override(read_pipeline(write(SFT, DPO), ["train.seed=7"])) is None, "other steps than these"


def test_the_jobs_as_they_are_written(write: Any, tiny_model: Path) -> None:
    """What a submission checks: it may not have the files."""
    gone = {"train": ["/on/the/cluster.jsonl"]}
    sft, reward, ppo = written_jobs(read_pipeline(write({**SFT, "data": gone}, REWARD, {**PPO, "data": gone})))
    assert {job.name for job in (sft, reward, ppo)} == {"chain"}
    assert ppo.model.path == str(tiny_model)
    with pytest.raises(RequestError, match=r"stage.type: unknown 'rewrad'; did you mean 'reward'"):
        written_jobs(read_pipeline(write(SFT, {**REWARD, "stage": {"type": "rewrad"}})))
