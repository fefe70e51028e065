"""Where a file of answers goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rayloom.errors import RequestError
from rayloom.models.config import ModelConfig
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.offline import Prediction, _rows_done, engine_options, prediction_of
from rayloom.rollout.request import Sampling


def _prediction(output: Path) -> Prediction:
    return Prediction(ModelConfig(path="model"), "prompts.jsonl", output, Sampling(8, temperature=0), RolloutConfig())


@pytest.mark.parametrize(
    ("text", "rows", "kept"),
    [
        (b"", 0, b""),
        (b'{"row": 0}\n{"row": 1}\n', 2, b'{"row": 0}\n{"row": 1}\n'),
        (b'{"row": 0}\n{"ro', 1, b'{"row": 0}\n'),
        (b'{"ro', 0, b""),
    ],
)
def test_a_line_that_was_not_written_to_its_end_is_cut_off(tmp_path: Path, text: bytes, rows: int, kept: bytes) -> None:
    prediction = _prediction(tmp_path / "folder" / "answers.jsonl")
    assert _rows_done(prediction) == 0
    prediction.output.write_bytes(text)
    assert _rows_done(prediction) == rows
    assert prediction.output.read_bytes() == kept


def test_answers_of_other_settings_are_not_gone_on_with(tmp_path: Path) -> None:
    prediction = _prediction(tmp_path / "answers.jsonl")
    _rows_done(prediction)
    prediction.output.write_bytes(b'{"row": 0}\n')
    with pytest.raises(RequestError, match=r"--output: .* differs from this one \(sampling, seed\)"):
        _rows_done(replace(prediction, sampling=Sampling(9, temperature=0), seed=1))
    assert prediction.output.read_bytes() == b'{"row": 0}\n'
    (tmp_path / "answers.jsonl.settings.json").unlink()
    with pytest.raises(RequestError, match="remove it, or name another file"):
        _rows_done(prediction)


def test_engines_take_the_gpus_of_the_cluster_unless_the_job_says_cpu(tiny_model: Path, tmp_path: Path) -> None:
    rollout = RolloutConfig(tensor_parallel=2, precision="fp32", gpu_memory=0.5)
    prediction = replace(_prediction(tmp_path / "a"), model=ModelConfig(path=str(tiny_model)), rollout=rollout)
    found = engine_options(prediction, gpus=4)
    assert (found.device, found.tensor_parallel, found.gpu_memory) == ("gpu", 2, 0.5)
    automatic = replace(prediction, rollout=RolloutConfig())
    assert engine_options(automatic, gpus=1).precision == "bf16"  # whatever this processor computes
    for without, gpus in ((prediction, 0), (replace(prediction, device="cpu"), 4)):
        found = engine_options(without, gpus)
        assert (found.device, found.tensor_parallel) == ("cpu", 1)


def _asked(model: str, *overrides: str) -> Prediction:
    return prediction_of(
        model, overrides, prompts="p.jsonl", output="o.jsonl", adapter=None, format=None, max_tokens=None,
        temperature=0.0, engines=3, seed=0,
    )  # fmt: skip


def test_a_job_that_has_trained_nothing_yet_is_refused(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"name: a\noutput_dir: {tmp_path}\nmodel: {{path: m}}\ndata: {{train: [x.jsonl], cutoff: 99}}\n")
    with pytest.raises(RequestError, match="model is not there: run the job a first"):
        _asked(str(job))
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "a" / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"a has not finished \(at work\)"):
        _asked(str(job))
    (tmp_path / "a" / "result.json").write_text('{"status": "finished"}')
    prediction = _asked(str(job), "rollout.max_tokens=7")
    assert (prediction.adapter, prediction.cutoff) == (str(tmp_path / "a" / "model"), 99)
    assert (prediction.sampling.max_tokens, prediction.rollout.engines) == (7, 3)
    with pytest.raises(RequestError, match=r"data\.cutoff=5: keys are changed of a job file"):
        _asked("model", "data.cutoff=5")
