"""A DeepSpeed JSON of the user's: what it may say, and that it has the last word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayloom.errors import RequestError
from rayloom.train.config import TrainConfig
from rayloom.train.deepspeed import deepspeed_config, read_deepspeed_json


def train(path: Path, text: Any, **parts: Any) -> TrainConfig:
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return TrainConfig(deepspeed_json=str(path), **({"deepspeed": "zero2"} | parts))


def test_it_has_the_last_word(tmp_path):
    own = {
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "auto"},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"pin_memory": False}},
        "wall_clock_breakdown": True,
    }
    config = train(tmp_path / "ds.json", own, offload="optimizer", batch_size=3, max_grad_norm=None)
    settled = deepspeed_config(config, "bf16", read_deepspeed_json(config))
    assert settled is not None
    assert settled["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert (settled["train_micro_batch_size_per_gpu"], settled["bf16"]) == (3, {"enabled": True})
    assert settled["wall_clock_breakdown"] is True
    assert "optimizer" not in settled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON: "),
        ("[]", "must be an object"),
        (
            {"zero_optimization": {"stage": 3}},
            "zero_optimization.stage is 3, and train.deepspeed is zero2; say the same",
        ),
        ({"gradient_clipping": 0.5}, "`gradient_clipping` is for the job file: train.max_grad_norm; leave it out"),
        ({"optimizer": {"type": "Adam"}}, "`optimizer` is for the job file: optimizer.type"),
    ],
)
def test_what_it_may_not_say(tmp_path, text, message):
    with pytest.raises(RequestError, match=message):
        read_deepspeed_json(train(tmp_path / "ds.json", text))


def test_a_file_that_is_not_there(tmp_path):
    config = TrainConfig(deepspeed="zero2", deepspeed_json=str(tmp_path / "none.json"))
    with pytest.raises(RequestError, match=r"train.deepspeed_json: .*none.json: No such file"):
        read_deepspeed_json(config)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"offload": "optimizer"}, "offload optimizer is DeepSpeed's; say deepspeed: zero2 or zero3"),
        ({"deepspeed_json": "x.json"}, "deepspeed_json needs deepspeed to say which stage it is"),
        ({"deepspeed": "zero2", "offload": "all"}, "offload all: zero2 does not shard the weights"),
        ({"deepspeed": "zero1", "on_bad_step": "skip"}, "on_bad_step skip: DeepSpeed makes its steps itself"),
        ({"workers": 2, "min_workers": 3, "global_batch_size": 8}, r"min_workers 3 is more than workers \(2\)"),
        ({"workers": 2, "min_workers": 1}, "min_workers needs global_batch_size"),
        ({"best_metric": "eval_loss"}, "best_metric needs eval_steps"),
        ({"early_stopping": 2}, "early_stopping needs best_metric"),
    ],
)
def test_what_does_not_go_together(parts, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**parts)


def test_possible_workers():
    config = TrainConfig(workers=6, min_workers=2, batch_size=2, global_batch_size=24, deepspeed="zero3")
    assert config.possible_workers == [6, 4, 3, 2]
    assert [config.with_workers(n).accumulation for n in config.possible_workers] == [2, 3, 4, 6]
    assert TrainConfig(workers=5).possible_workers == [5]
