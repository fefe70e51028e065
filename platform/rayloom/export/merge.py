"""Whole weights of what a job has trained: an adapter becomes a part of its base.

What serves needs them: vLLM reads no other kind of adapter than LoRA, and Ray Serve gets those from object stores only.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.methods.adapter_folder import CONFIG, WEIGHTS, read_adapter_config
from rayloom.models.source import raw_config
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer
from rayloom.stages.trained import Trained, trained_by

SERVED = "served"
_STALE_SECONDS = 24 * 3600
_NOT_COPIED = (CONFIG, "README.md", "training_args.bin")


def whole_model(job: JobConfig) -> Path:
    """The folder of the model that the job has trained. An adapter is merged into its base, in fp32, once for each
    state of it, into a folder of the run directory's `served/`; the weights then stand in the base's own type. What
    was merged before stays: it may be in use.

    Raises:
        RequestError: the job has not finished; its adapter is no part of any weight, or its base has none to add to.
    """
    trained = trained_by(job)
    if trained.adapter is None:
        return Path(trained.model.path)
    _check(job, trained, read_adapter_config(str(trained.adapter), "output_dir"))
    served = job.run_dir / SERVED
    target = served / _state(trained.adapter)
    if not target.is_dir():
        served.mkdir(exist_ok=True)
        for left in served.glob(".merging-*"):  # by one that was killed
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=".merging-", dir=served))
        try:
            _merge(job, trained, trained.adapter, scratch)
            scratch.chmod(0o755)
            try:
                scratch.rename(target)
            except OSError:
                if not target.is_dir():  # else another service of this run was quicker
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _check(job: JobConfig, trained: Trained, config: Any) -> None:
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise RequestError(
            f"method.type: {job.method.type}: what {job.name} has trained stands beside the weights and cannot become "
            "a part of them"
        )
    if trained.model.train_from_scratch:
        raise RequestError("model.train_from_scratch: the adapter's base was drawn at random and is not kept")
    if "quantization_config" in raw_config(trained.model):
        raise RequestError(
            f"model.path: the weights of {trained.model.path} are quantized; nothing can be added to them"
        )


def _state(adapter: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update((adapter / name).read_bytes())
    return digest.hexdigest()[:16]


def _merge(job: JobConfig, trained: Trained, adapter: Path, target: Path) -> None:
    import peft
    import torch

    from rayloom.models.load import load_causal_lm

    # Of training's options only what the weights and the vocabulary follow from.
    plain = {"quantization": None, "attention": "sdpa", "kernels": "none", "shifted_attention": False}
    model = trained.model.model_copy(update={**plain, "moe_aux_loss": None})
    tokenizer = load_tokenizer(TokenizerSource.of(model))
    base = load_causal_lm(model, torch.float32, tokenizer=tokenizer, cutoff=job.data.cutoff, seed=job.train.seed)
    merged = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    raw = raw_config(model)
    dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"))
    for one in (merged.config, merged.config.get_text_config(decoder=True)):
        one.use_cache = True  # training has none
    merged.to(dtype).save_pretrained(target)
    for file in adapter.iterdir():  # the tokenizer, with the template that was trained
        if file.is_file() and file.suffix != ".safetensors" and file.name not in _NOT_COPIED:
            shutil.copy2(file, target)
