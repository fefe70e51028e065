"""What every Ray Train worker runs, top to bottom: model, method, trainer, train, save."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
import transformers

from rayloom.config.job import JobConfig
from rayloom.data.deal import Shard
from rayloom.data.reference import ReferenceTable, read_table
from rayloom.errors import JobError, RequestError
from rayloom.losses.token import cross_entropy
from rayloom.methods.attach import attach_method
from rayloom.methods.config import LoraConfig, MethodConfig
from rayloom.methods.optimizers.build import optim_name
from rayloom.methods.optimizers.support import check_precision
from rayloom.methods.parameters import count_parameters, has_idle_parts, size_of
from rayloom.methods.save import finish_saved, keep_start
from rayloom.models.load import load_causal_lm
from rayloom.models.precision import Precision, cast_trained, choose_precision, computes_bf16, computing_dtype
from rayloom.models.quantization import leave_out_of_broadcast
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer, pad_token
from rayloom.models.value_head import attach_value_head
from rayloom.models.vocabulary import added_token_ids
from rayloom.remote import Remote
from rayloom.stages.reference import ReferencePlace
from rayloom.stages.step_loss import averages_over_step, step_loss, token_loss
from rayloom.train.config import TrainConfig
from rayloom.train.deepspeed import deepspeed_config, engine_of, inference_config
from rayloom.train.frozen_head import FrozenHeadLoss, frozen_head
from rayloom.train.kernels import load_cpu_kernels
from rayloom.train.kto_trainer import KtoTrainer
from rayloom.train.meter import StreamMeter
from rayloom.train.monitor import answer
from rayloom.train.ppo_setup import prepare_model, trainer_parts
from rayloom.train.ppo_trainer import PpoTrainer
from rayloom.train.preference_trainer import PreferenceTrainer
from rayloom.train.reference import ReferencePass, Scorer
from rayloom.train.reshard import fitting_checkpoint
from rayloom.train.reward_trainer import RewardTrainer
from rayloom.train.trainer import StreamTrainer

_ENDLESS = 2**31
_TRAINERS: dict[str, type[StreamTrainer]] = {
    "pretrain": StreamTrainer,
    "sft": StreamTrainer,
    "reward": RewardTrainer,
    "dpo": PreferenceTrainer,
    "kto": KtoTrainer,
    "ppo": PpoTrainer,
}


def _announced(tables: Iterator[pa.Table], on_first: Callable[[], None]) -> Iterator[pa.Table]:
    """The same tables; `on_first` is called when the first has come."""
    for number, table in enumerate(tables):
        if number == 0:
            on_first()
        yield table


class _Milestones(transformers.TrainerCallback):
    def __init__(self, phase: Any, settings: TrainConfig, evaluates: bool) -> None:
        self._phase = phase
        self._eval_steps = settings.eval_steps if evaluates else None
        self._save_steps = settings.save_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._phase("engine")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._phase("first step")
        if state.global_step == args.max_steps:
            control.should_log = True  # the last step, also between two rows of metrics
        if self._eval_steps and state.global_step % self._eval_steps == 0:
            control.should_evaluate = control.should_log = True  # the best one is saved
        if state.global_step % self._save_steps == 0:
            control.should_log = True  # a row of metrics ends where a resume may begin


def train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """One worker's life. Rank 0's return value is the driver's summary.

    What is wrong with the request, and why a job must end, is posted to the driver: Ray keeps only the text of an
    exception, wrapped in traces.
    """
    try:
        return _train(config)
    except RequestError as error:
        answer(config["monitor"].post.remote({"kind": "refused", "messages": error.messages}), "a worker")
        raise
    except JobError as error:
        answer(config["monitor"].post.remote({"kind": "failed", "text": str(error)}), "a worker")
        raise


def _train(config: dict[str, Any]) -> dict[str, Any] | None:
    if Path(config["folder"]).is_dir():  # Ray Train has gone elsewhere, and paths in the job file are the driver's
        os.chdir(config["folder"])
    job = JobConfig.model_validate(config["job"])
    model_dir: Path | Remote = config["model_dir"]
    monitor, device, sets = config["monitor"], config["device"], len(config["sets"])
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    shards = {name: Shard(dealer, rank, workers) for name, dealer in config["dealers"].items()}
    reached: set[str] = set()

    def phase(name: str) -> None:
        if rank == 0 and name not in reached:
            reached.add(name)
            answer(monitor.post.remote({"kind": "phase", "name": name, "time": time.time()}), "rank 0")

    def say(*lines: str) -> None:
        if rank == 0:
            answer(monitor.post.remote({"kind": "say", "lines": lines}), "rank 0")

    node = ray.get_runtime_context().get_node_id()
    answer(monitor.post.remote({"kind": "node", "id": node}), f"rank {rank}")
    phase("workers")
    per_round = getattr(job.stage, "prompts", None)  # of stage ppo, whose batches are of answers
    tables = shards["train"].batches(per_round // workers if per_round else job.train.batch_size)
    eval_shard = shards.get("eval")
    _quieten(device)
    if device == "cpu":
        torch.set_num_threads(_own_cores())
        if job.train.deepspeed != "none":
            load_cpu_kernels(say)
    precision = choose_precision(job.train.precision, device, bf16=computes_bf16(device))
    check_precision(job.optimizer, precision)
    transformers.set_seed(job.train.seed)

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rayloom-worker-")))
        # The arguments come before the model: under ZeRO-3 they make `from_pretrained` load it in shards.
        arguments = _arguments(job, device, precision, scratch, config["deepspeed"])
        tokenizer = load_tokenizer(TokenizerSource.of(job.model))
        if config["chat_template"] and (job.data.template != "auto" or not tokenizer.chat_template):
            tokenizer.chat_template = config["chat_template"]  # saved with the model, which answers in no other
        batches_per_step = job.train.workers * job.train.accumulation
        load = partial(
            load_causal_lm,
            job.model,
            _weight_dtype(job, precision),
            tokenizer=tokenizer,
            cutoff=job.data.cutoff,
            seed=job.train.seed,
            batches_per_step=batches_per_step,
        )
        new_tokens = added_token_ids(tokenizer, job.model)
        more: dict[str, Any] = {}
        eval_tables = None
        if eval_shard is not None:
            eval_tables = cache(partial(eval_shard.first, job.data.eval_samples, job.train.batch_size))
        reference = partial(_reference, load, job.method, new_tokens)
        if job.stage.has_reference and getattr(job.stage, "reference", None) == "copy":
            more["reference"] = reference()
        if config["reference"] is not None:
            scorer = Scorer(
                reference,
                pad_token(tokenizer),
                arguments.device,
                computing_dtype(precision) if job.train.deepspeed == "none" and precision in ("bf16", "fp16") else None,
                inference_config(job.train, precision),
                getattr(job.stage, "ld_alpha", None),
            )
            more["cached"] = _cached(config, job, shards.get("reference"), eval_tables, scorer, say)
            phase("reference")
        model = attach_method(load(), job.method, new_tokens)
        if job.train.deepspeed == "none":
            cast_trained(model, precision)
        if job.stage.type == "reward":
            attach_value_head(model)
        elif job.stage.type == "ppo":
            prepare_model(job, model)
            dtype = _weight_dtype(job, precision)
            more |= trainer_parts(job, config["fleet"], model, dtype, precision, rank=rank, ranks=workers)
        leave_out_of_broadcast(model)
        parameters = count_parameters(model)
        start = scratch / "start"
        say(*parameters.lines())
        if rank == 0:
            keep_start(model, job.method, start)
        if job.train.activation_checkpointing:
            model.enable_input_require_grads()
        # BAdam's layers take turns, and an adapter may stand where no batch comes by. Looking copies the logits.
        may_idle = job.method.type != "full" or getattr(job.optimizer, "mode", None) == "layer" or has_idle_parts(model)
        arguments.ddp_find_unused_parameters = may_idle
        phase("model")

        checkpoint, meter = ray.train.get_checkpoint(), StreamMeter.start(sets)
        folder = None
        if checkpoint is not None:
            folder = stack.enter_context(checkpoint.as_directory())
            meter, _ = StreamMeter.load(Path(folder))
            if isinstance(arguments.deepspeed, dict):
                folder = str(fitting_checkpoint(Path(folder), scratch / "fitting", rank, workers, arguments.deepspeed))
        trainer = _TRAINERS[job.stage.type](
            model=model,
            stage=job.stage,
            compute_loss_func=_loss_function(job, model, batches_per_step),
            optimizer_config=job.optimizer,
            args=arguments,
            processing_class=tokenizer,
            callbacks=[_Milestones(phase, job.train, eval_shard is not None)],
            tables=_announced(tables, lambda: phase("first batch")),
            meter=meter,
            settings=job.train,
            monitor=monitor,
            pad_token=pad_token(tokenizer),
            manifest=job.data.manifest,
            eval_tables=eval_tables,
            set_names=config["sets"],
            eval_names=config["eval_sets"],
            checkpoints=config["checkpoints"],
            **more,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if folder is not None:
            trainer.restore_own(Path(folder))
        trainer.train(resume_from_checkpoint=folder)
        evaluation = None
        if eval_shard is not None and not trainer.stopped:
            evaluation = trainer.evaluate()
            trainer.load_best()
        if not trainer.stopped:
            saved = model_dir if isinstance(model_dir, Path) else scratch / "model"
            trainer.save_model(str(saved))
            if rank == 0:
                finish_saved(model, job.method, saved, start, tokenizer=tokenizer, place=str(model_dir))
                _upload(saved, model_dir)
        trainer.finish_saving()
    if rank != 0:
        return None
    return {
        "status": "stopped" if trainer.stopped else "finished",
        "stopped_early": trainer.stopped_early,
        "best": trainer.best,
        "skipped_steps": meter.skipped_steps,
        "steps": trainer.state.global_step,
        "tokens": meter.tokens,
        "trained_tokens": meter.trained_tokens,
        "examples": meter.examples,
        "counts": meter.counts,
        "epochs_done": meter.epochs_done,
        "position": meter.position.as_dict(),
        "eval": evaluation,
        "precision": precision,
        "engine": engine_of(trainer.model_wrapped)
        | {"row_threads": trainer.row_threads.threads if trainer.row_threads else 1},
        "parameters": parameters.as_dict() | {"trained": sum(map(size_of, trainer.trained))},
    }


def _arguments(
    job: JobConfig, device: str, precision: Precision, scratch: Path, deepspeed: dict[str, Any]
) -> transformers.TrainingArguments:
    train = job.train
    return transformers.TrainingArguments(
        output_dir=str(scratch),
        max_steps=train.max_steps or _ENDLESS,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        gradient_checkpointing=train.activation_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm or 0.0,  # 0: none
        optim=optim_name(job.optimizer),
        neftune_noise_alpha=getattr(job.stage, "neftune", None),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device == "cpu",
        deepspeed=deepspeed_config(train, precision, deepspeed),
        logging_steps=train.logging_steps,
        logging_nan_inf_filter=False,  # it would count a step that was left out as one of loss 0
        save_strategy="steps",
        save_steps=train.save_steps,
        ignore_data_skip=True,  # the stream starts at the position; there is nothing to skip
        seed=train.seed,
        report_to=[],
        disable_tqdm=True,
    )


def _reference(load: Callable[[], Any], method: MethodConfig, new_tokens: Sequence[int]) -> Any:
    """The model as it is before this training: with the adapters of before, where the method begins with some. A new
    adapter changes nothing before its first step."""
    with torch.random.fork_rng():
        model = load()
        return attach_method(model, method, new_tokens) if isinstance(method, LoraConfig) and method.adapters else model


def _cached(
    config: dict[str, Any],
    job: JobConfig,
    shard: Shard | None,
    eval_tables: Callable[[], list[pa.Table]] | None,
    scorer: Scorer,
    say: Callable[..., None],
) -> ReferenceTable:
    """What the reference says of every row that this execution trains or evaluates on."""
    place: ReferencePlace = config["reference"]
    if shard is None:  # a job like this one has left all of it
        return read_table(place.folder)
    step, train, checkpoint = 0, job.train, ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            _, step = StreamMeter.load(Path(folder))
    work = ReferencePass(
        folder=place.folder,
        mark=place.mark,
        batch_rows=train.batch_size,
        batches_per_step=train.accumulation,
        steps=None if train.max_steps is None else train.max_steps - step,
        epochs=train.epochs,
        from_start=step == 0,
        stop=lambda: bool(answer(config["monitor"].stop_requested.remote(), "rank 0")),
        say=say,
    )
    return work.run(shard.batches(train.batch_size), eval_tables() if eval_tables else [], scorer)


def _upload(saved: Path, place: Path | Remote) -> None:
    """Put a model that was saved here to its address, if it has one."""
    if isinstance(place, Remote):
        try:
            place.upload(saved)
        except OSError as error:
            raise JobError(f"the trained model is not stored: {error}") from error


def _loss_function(job: JobConfig, model: Any, batches_per_step: int) -> Any:
    """What transformers' Trainer computes the loss by; None: the model itself, or a trainer of our own."""
    of_token = token_loss(job.stage)
    plain = job.model.kernels == "none" and job.model.moe_aux_loss is None
    if job.stage.type in ("pretrain", "sft") and plain:
        if job.train.deepspeed != "zero3" and (head := frozen_head(model)) is not None:
            return FrozenHeadLoss(head, of_token or cross_entropy)
        if not averages_over_step(model):
            of_token = of_token or cross_entropy
    return of_token and step_loss(of_token, (job.model.moe_aux_loss or 0.0) / batches_per_step)


def _weight_dtype(job: JobConfig, precision: Precision) -> torch.dtype:
    """What the weights are loaded in: in fp32 where all of them train under autocast, so that no digit is lost."""
    frozen = job.method.type != "full"
    if frozen or precision == "pure_bf16" or job.train.deepspeed != "none":
        return computing_dtype(precision)
    return torch.float32


def _own_cores() -> int:
    """This worker's share of its node's cores."""
    node = ray.get_runtime_context().get_node_id()
    declared = next(item["Resources"].get("CPU", 1) for item in ray.nodes() if item["NodeID"] == node)
    cores = min(len(os.sched_getaffinity(0)), max(1, int(declared)))
    return max(1, cores // ray.train.get_context().get_local_world_size())


def _quieten(device: str) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
