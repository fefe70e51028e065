"""A search over a pipeline before it starts: what its keys are, what trials share, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.ray.small_jobs import write_rows

from rayloom.config.document import Document, dump_document
from rayloom.errors import RequestError
from rayloom.pipeline.plan import plan_pipeline
from rayloom.pipeline.read import pipeline_of, read_pipeline, read_pipeline_document, split_key
from rayloom.search.pipeline_plan import PipelineSearchPlan, plan_pipeline_search

ROOT = Path(__file__).resolve().parents[2]
SPACE = {"steps.sft.train.learning_rate": "grid(1e-3, 1e-2)", "steps.dpo.train.learning_rate": "grid(1e-4, 1e-5)"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with data."""
    write_rows(tmp_path / "rows.jsonl", 12)
    pairs = [{"instruction": f"Say {i}.", "output": [f"It is {i}.", "No."]} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def document(here: Path, tiny_model: Path) -> Any:
    def written(space: dict[str, Any] | None = None, stage: str = "dpo", **search: Any) -> Document:
        pairs = {"train": [{"path": "pairs.jsonl", "ranking": True}]}
        return Document(
            "chain.yaml",
            {
                "name": "chain",
                "model": {"path": str(tiny_model)},
                "data": {"cutoff": 128},
                "train": {"device": "cpu"},
                "steps": [
                    {"name": "sft", "data": {"train": ["rows.jsonl"]}},
                    {"name": "dpo", "from": "sft", "data": pairs, "stage": {"type": stage, "reference": "cached"}},
                ],
                "search": {"metric": "loss", "searcher": "grid", "space": SPACE if space is None else space, **search},
            },
        )

    return written


def planned(document: Document) -> PipelineSearchPlan:
    return plan_pipeline_search(document)[0]


def test_trials_share_the_steps_that_they_have_in_common(document: Any, here: Path) -> None:
    plan, jobs = plan_pipeline_search(document())
    assert (plan.trials, plan.jobs_each, len(jobs)) == (4, 2, 2 * (3 + 4))
    steps = [plan.trial_plan(point).steps for point in plan.points or ()]
    assert len({sft.job.run_dir for sft, _ in steps}) == 2
    assert len({dpo.job.run_dir for _, dpo in steps}) == 4
    for (sft, dpo), point in zip(steps, plan.points or (), strict=True):
        assert sft.job.train.learning_rate == point["steps.sft.train.learning_rate"]
        assert dpo.job.train.learning_rate == point["steps.dpo.train.learning_rate"]
        assert dpo.job.method.adapters == [str(sft.job.run_dir / "model")]
        assert sft.job.run_dir.parent == here / "runs" / "chain" / "steps"
        assert sft.job.search is dpo.job.search is None


def test_the_best_trial_is_a_pipeline(document: Any, here: Path) -> None:
    plan = planned(document())
    point = (plan.points or ())[0]
    (here / "best.yaml").write_text(plan.best_text(point))
    best = plan_pipeline(read_pipeline(here / "best.yaml"))
    assert best.folder == here / "runs" / "chain-best"
    assert [step.key for step in best.steps] == [step.key for step in plan.trial_plan(point).steps], "it repeats it"


def test_a_key_of_all_steps_and_a_condition(document: Any) -> None:
    space = {
        "train.seed": "grid(1, 2)",
        "steps.sft.method": {"grid": [{"type": "lora", "rank": 4}, {"type": "full"}]},
        "steps.dpo.method.rank": {"grid": [4, 16], "when": {"steps.sft.method.type": "full"}},
    }
    plan = planned(document(space))
    assert plan.trials == 2 * (1 + 2)
    for point in plan.points or ():
        sft, dpo = plan.trial_plan(point).steps
        assert sft.job.train.seed == dpo.job.train.seed == point["train.seed"]
        is_full = sft.job.method.type == "full"
        assert getattr(dpo.job.method, "rank", None) == (point["steps.dpo.method.rank"] if is_full else 4)
    assert document(space).data["steps"][0] == {"name": "sft", "data": {"train": ["rows.jsonl"]}}


@pytest.mark.parametrize(
    ("space", "search", "message"),
    [
        ({"steps.sfd.train.seed": "grid(1, 2)"}, {}, "there is no step 'sfd'; did you mean 'sft'"),
        ({"steps.sft.train.sed": "grid(1, 2)"}, {}, "train has no key 'sed'; did you mean 'seed'"),
        ({"steps.sft.name": "grid(a, b)"}, {}, "steps.sft.name is the same in all trials"),
        ({"output_dir": "grid(a, b)"}, {}, "output_dir is the same in all trials"),
        ({"steps.dpo.stage.beta": "grid(0.1, -1)"}, {}, "with steps.dpo.stage.beta -1: "),
        ({"steps.dpo.method.rank": "grid(4, 16)"}, {}, "but the adapter of step sft goes on, and has 8"),
        ({"train.seed": "grid(1, 2)"}, {"scheduler": "population"}, "a trial of a pipeline is several"),
        ({"train.seed": "grid(1, 2)"}, {"metric": "eval_loss"}, "needs data.held_out or data.eval"),
    ],
)
def test_a_search_that_is_refused(document: Any, space: Any, search: Any, message: str) -> None:
    with pytest.raises(RequestError) as error:
        plan_pipeline_search(document(space, **search))
    assert message in str(error.value)


def test_a_step_is_not_searched_by_itself(document: Any) -> None:
    whole = document()
    whole.data["steps"][1]["search"] = whole.data.pop("search")
    with pytest.raises(RequestError, match=r"steps\[1\].search: the pipeline has one for all of its steps"):
        plan_pipeline_search(whole)
    del whole.data["steps"][1]["search"]
    with pytest.raises(RequestError, match="there is no search in this pipeline; say search at its top"):
        plan_pipeline_search(whole)


def test_a_step_is_named_in_an_override(document: Any, here: Path) -> None:
    (here / "chain.yaml").write_text(dump_document(document().data))
    found = read_pipeline_document(here / "chain.yaml", ["steps.dpo.train.epochs=3", "train.seed=7"])
    assert found.data["steps"][1]["train"] == {"epochs": 3}
    assert [step.job.train.seed for step in plan_pipeline(pipeline_of(found)).steps] == [7, 7]
    with pytest.raises(RequestError, match=r"override 'steps.dop.train.epochs=3': there is no step 'dop'"):
        read_pipeline(here / "chain.yaml", ["steps.dop.train.epochs=3"])
    assert split_key("steps.a.b.train.seed", ["a", "a.b"]) == ("a.b", "train.seed")
    assert split_key("train.seed", ["a"]) is None


def test_a_request_that_has_changed(document: Any, here: Path) -> None:
    plan = planned(document())
    (here / "job.yaml").write_text(plan.text())
    assert planned(document()).changed_since(here / "job.yaml") == []
    assert planned(document(seed=1)).changed_since(here / "job.yaml") == ["search"]


def test_the_recipe(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.chdir(ROOT)
    recipe = ROOT / "jobs" / "pipelines" / "sft-dpo-search.yaml"
    assert planned(read_pipeline_document(recipe, [f"model.path={tiny_model}"])).trials == 4
