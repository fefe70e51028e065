"""Whole weights of what a job has trained: an adapter becomes a part of its base.

What serves needs them: vLLM reads no other kind of adapter than LoRA, and Ray Serve gets those from object stores only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.methods.adapter_folder import CONFIG, WEIGHTS, read_adapter_config
from rayloom.models.source import raw_config
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer
from rayloom.stages.trained import Trained, trained_by

SERVED = "served"
_MERGES = ("LORA", "OFT", "IA3", "VERA", "LOHA")


def whole_model(job: JobConfig) -> Path:
    """The folder of the model that the job has trained. An adapter is merged into its base, in fp32, once for each
    state of it, into the run directory's `served/`; the weights then stand in the base's own type.

    Raises:
        RequestError: the job has not finished, or its method is no part of any weight.
    """
    trained = trained_by(job)
    if trained.adapter is None:
        return Path(trained.model.path)
    config = read_adapter_config(str(trained.adapter), "output_dir")
    if config.peft_type.value not in _MERGES:
        raise RequestError(
            f"method.type: {job.method.type}: what {job.name} has trained stands beside the weights and cannot become "
            f"a part of them; of adapters {', '.join(kind.lower() for kind in _MERGES)} can"
        )
    target = job.run_dir / SERVED / _state(trained.adapter)
    if not target.is_dir():
        target.parent.mkdir(exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".merging-", dir=target.parent))
        try:
            _merge(job, trained, trained.adapter, scratch)
            scratch.chmod(0o755)
            if not target.is_dir():  # another replica may have been as quick
                os.rename(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for older in target.parent.iterdir():
            if older != target and not older.name.startswith("."):
                shutil.rmtree(older, ignore_errors=True)
    return target


def _state(adapter: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update((adapter / name).read_bytes())
    return digest.hexdigest()[:16]


def _merge(job: JobConfig, trained: Trained, adapter: Path, target: Path) -> None:
    import peft
    import torch

    from rayloom.models.load import load_causal_lm

    model = trained.model.model_copy(update={"quantization": None})
    tokenizer = load_tokenizer(TokenizerSource.of(model))
    base = load_causal_lm(model, torch.float32, tokenizer=tokenizer, cutoff=job.data.cutoff, seed=job.train.seed)
    merged = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    raw = raw_config(model)
    dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"))
    for one in (merged.config, merged.config.get_text_config(decoder=True)):
        one.use_cache = True  # training has none
    merged.to(dtype).save_pretrained(target)
    for file in adapter.iterdir():  # the tokenizer, with the template that was trained
        if file.is_file() and file.name not in (CONFIG, WEIGHTS, "README.md", "training_args.bin"):
            shutil.copy2(file, target)
