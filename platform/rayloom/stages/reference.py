"""Where the log-probabilities under a job's reference are kept, for `stage.reference: cached`.

Two keys, so that what does not fit is never found and what fits is used as widely as it can be:
- the folder's is of all that changes the log-probability of given tokens: the model's files, how it is loaded, what it
  computes in, the adapters that training begins with, the versions;
- within it a row is known by its tokens (`rayloom.data.reference`), so a row that changed, whether in the file,
  by the template or by the cutoff, is another row.
A job leaves a mark, of all that tells which rows it sees: a job that finds its mark need not look for missing ones.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rayloom import __version__
from rayloom.config.job import JobConfig
from rayloom.data.plan import Plan
from rayloom.data.reference import LAYOUT, is_marked
from rayloom.data.segment import Encoder
from rayloom.methods.config import LoraConfig
from rayloom.models.fingerprint import folder_fingerprint, model_fingerprint
from rayloom.models.precision import Precision


@dataclass(frozen=True)
class ReferencePlace:
    """Where a job's reference log-probabilities are, or will be."""

    folder: Path
    mark: str

    @property
    def is_whole(self) -> bool:
        """Whether those of every row that the job sees are there."""
        return is_marked(self.folder, self.mark)


def reference_place(
    job: JobConfig, plan: Plan, eval_plan: Plan | None, encoder: Encoder, precision: Precision, device: str
) -> ReferencePlace | None:
    """None: the job keeps none.

    Args:
        device: "cpu" or "gpu", on which they are computed.
    """
    if not job.stage.has_reference or getattr(job.stage, "reference", None) != "cached":
        return None
    assert job.output_folder is not None  # `stages.rules` refuses
    root = job.output_folder / "reference"
    data = job.data.model_dump(mode="json", exclude={"store", "manifest"})
    sets = [plan.fingerprints, eval_plan.fingerprints if eval_plan else None]
    train = job.train
    length = [train.epochs, train.max_steps, train.rows_per_step, train.seed]
    converters = Path(job.data.converters).expanduser().read_text(encoding="utf-8") if job.data.converters else None
    rows = [data, sets, converters, encoder.key(), version("tokenizers"), length]
    return ReferencePlace(root / _key(_model_facts(job, precision, device)), _key(rows))


def _model_facts(job: JobConfig, precision: Precision, device: str) -> list[Any]:
    model, method = job.model, job.method
    begins: list[Any] = []
    if isinstance(method, LoraConfig) and method.adapters:
        folders = [folder_fingerprint(Path(adapter).expanduser()) for adapter in method.adapters]
        begins = [method.model_dump(mode="json", exclude={"adapters"}), folders]
    is_random = model.train_from_scratch or model.add_tokens or model.add_special_tokens
    return [
        model_fingerprint(model),
        model.model_dump(mode="json", exclude={"path"}),
        begins,
        job.train.seed if is_random else None,
        job.data.cutoff,  # of which a stretched model's positions follow
        getattr(job.stage, "ld_alpha", None),
        [precision, device, job.train.deepspeed == "none"],  # DeepSpeed computes without autocast
        [LAYOUT, __version__, version("transformers"), version("torch")],
    ]


def _key(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
