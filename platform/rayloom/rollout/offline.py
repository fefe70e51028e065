"""Answers without a trainer: any number of prompts through a fleet, and a file of prompts to a file of answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from rayloom.data.config import DataConfig, DatasetConfig
from rayloom.data.files import place
from rayloom.data.index import make_plan
from rayloom.data.plan import DataSet
from rayloom.data.segment import SegmentOptions, read_chunk
from rayloom.data.template import Renderer
from rayloom.data.template_choice import resolve_template
from rayloom.data.walk import count_chunk
from rayloom.errors import RequestError
from rayloom.methods.adapter_folder import CONFIG, WEIGHTS, read_adapter_config
from rayloom.models.config import ModelConfig
from rayloom.models.precision import choose_precision, computes_bf16, engine_precision
from rayloom.models.source import check_model_path, raw_config
from rayloom.models.text_tokenizer import TokenizerState
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.fleet import FleetClient, start_fleet
from rayloom.rollout.request import EngineOptions, Prompt, Rollout, Sampling, Weights, probe_prompt
from rayloom.rollout.vllm_engine import check_vllm

_ROUND = 256


@dataclass(frozen=True)
class Prediction:
    """What to answer with what, and where the answers go."""

    model: ModelConfig
    prompts: str
    """A data set of any format that a job reads: a file, a folder, a hub name."""
    output: Path
    """One JSON object per line: `row`, `prompt` (as the model reads it), `answer`, `reference` (the data's own answer),
    `finish_reason`."""
    sampling: Sampling
    rollout: RolloutConfig
    adapter: str | None = None
    """Folder of a LoRA adapter."""
    format: str | None = None
    template: str = "auto"
    cutoff: int = 2048
    """Longest prompt, in tokens."""
    seed: int = 0
    """Row n is answered with seed `seed` + n."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What the engines compute on; `auto`: on GPUs where the cluster has any."""


def prediction_of(
    model: str,
    overrides: Sequence[str],
    *,
    prompts: str,
    output: str,
    adapter: str | None,
    format: str | None,
    max_tokens: int | None,
    temperature: float,
    engines: int | None,
    seed: int,
) -> Prediction:
    """What the command line asks for.

    Args:
        model: a job file, whose model, template and `rollout` count, with what it has trained; or a model.

    Raises:
        RequestError: no such job, or it has not finished.
    """
    config, template, cutoff, rollout = ModelConfig(path=model), "auto", 2048, RolloutConfig()
    device: Literal["auto", "cpu", "gpu"] = "auto"
    if model.endswith((".yaml", ".yml")):
        from rayloom.config.read import read_job
        from rayloom.stages.trained import trained_by

        job = read_job(model, overrides)
        config, template, cutoff, rollout = job.model, job.data.template, job.data.cutoff, job.rollout
        device = job.train.device
        if adapter is None:
            trained = trained_by(job)
            config = trained.model
            adapter = None if trained.adapter is None else str(trained.adapter)
    elif overrides:
        raise RequestError(f"{overrides[0]}: keys are changed of a job file, and {model} is a model")
    rollout = rollout.model_copy(update={"engines": engines or rollout.engines, "share_gpus": False})
    return Prediction(
        model=config,
        prompts=prompts,
        output=Path(output),
        sampling=rollout.sampling(max_tokens=max_tokens, temperature=temperature),
        rollout=rollout,
        adapter=adapter,
        format=format,
        template=template,
        cutoff=cutoff,
        seed=seed,
        device=device,
    )


def answers(
    fleet: FleetClient, prompts: Iterable[Prompt], sampling: Sampling, *, size: int = _ROUND
) -> Iterator[list[Rollout]]:
    """Answer prompts in rounds of `size`, each ordered by (prompt, sample). The next round is asked for before one is
    handed out, so the engines are busy meanwhile. Numbers of prompts must be distinct within a round.

    Args:
        fleet: that serves the weights to answer with, and that nobody else asks.
    """
    rows, number, before = iter(prompts), 0, None
    while batch := list(islice(rows, size)):
        pending = fleet.ask(number, 0, 1, batch, sampling)
        if before is not None:
            yield before.collect()
        before, number = pending, number + 1
    if before is not None:
        yield before.collect()


def predict(prediction: Prediction, say: Callable[[str], None]) -> int:
    """Write the answers; the number of rows in the file afterwards. Ray must be there. Where an earlier run with the
    same settings ended before the last row, it goes on.

    Args:
        say: gets lines of progress.

    Raises:
        RequestError: no such model or data; the output is of other settings; a prompt is too long.
        JobError: the engines failed.
    """
    check_vllm()
    check_model_path(prediction.model)
    data_set = _data_set(prediction)
    done = _rows_done(prediction)
    tokenizer = load_tokenizer(TokenizerSource.of(prediction.model))
    template = resolve_template(prediction.template, tokenizer, prediction.model.path)
    renderer = Renderer(TokenizerState.of(tokenizer).load(), template)
    questions = islice(_questions(data_set, renderer, prediction), done, None)
    if done:
        say(f"{prediction.output} has {done} rows; going on behind them")
    first = next(questions, None)
    if first is None:
        return done
    options = engine_options(prediction, cluster_gpus())
    fleet = start_fleet(prediction.rollout, options, probe_prompt(first[0].token_ids[:32]))
    try:
        fleet.sync(weights_of(prediction.adapter))
        asked: dict[int, tuple[Prompt, str]] = {}

        def prompts() -> Iterator[Prompt]:
            for prompt, reference in chain([first], questions):
                asked[prompt.number] = (prompt, reference)
                yield prompt

        with prediction.output.open("a", encoding="utf-8") as file:
            for rollouts in answers(fleet, prompts(), prediction.sampling):
                for rollout in rollouts:
                    prompt, reference = asked.pop(rollout.prompt)
                    ids = list(rollout.token_ids)
                    if rollout.finish_reason == "stop" and ids and ids[-1] in fleet.stop_token_ids:
                        ids.pop()
                    row = {
                        "row": rollout.prompt,
                        "prompt": tokenizer.decode(list(prompt.token_ids)),
                        "answer": tokenizer.decode(ids),
                        "reference": reference,
                        "finish_reason": rollout.finish_reason,
                    }
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    done += 1
                file.flush()
                say(f"{done} rows answered")
        for event in fleet.events():
            say(f"engine {event['engine']}: {event['what']}; it served again after {event['seconds']} s")
    finally:
        fleet.stop()
    return done


def _data_set(prediction: Prediction) -> DataSet:
    source = DatasetConfig.model_validate(
        {"path": prediction.prompts, "prompts_only": True}
        | ({"format": prediction.format} if prediction.format else {})
    )
    return make_plan(DataConfig(train=[source]), seed=0, epochs=1).sets[0]


def _questions(data_set: DataSet, renderer: Renderer, prediction: Prediction) -> Iterator[tuple[Prompt, str]]:
    """Each row of the file in its order, as a prompt, with the data's own answer."""
    number = 0
    options = SegmentOptions(cutoff=prediction.cutoff, packing=False)
    for index in range(data_set.chunks):
        chunk = data_set.chunk(index)
        for row, item in enumerate(read_chunk(data_set, 0, chunk, range(count_chunk(data_set, chunk)), options)):
            assert item.example is not None  # a bad row has ended this
            fault: ValueError | str | None = None
            try:
                question, reference = item.example.without_answer()
                (ids,) = renderer.render_prompts([question])
                if isinstance(ids, ValueError):
                    fault = ids
                elif len(ids) > prediction.cutoff:
                    fault = f"the prompt has {len(ids)} tokens, more than {prediction.cutoff}"
            except ValueError as error:
                fault = error
            if fault is not None:
                raise RequestError(f"{place(*data_set.locate(chunk), row)}: {fault}")
            yield Prompt(number, tuple(ids), prediction.seed + number), reference  # type: ignore[arg-type]
            number += 1


def _rows_done(prediction: Prediction) -> int:
    """Rows that an earlier run has written; what it was about to write when it ended is cut off.

    Raises:
        RequestError: it ran with other settings.
    """
    output = prediction.output
    settings = output.with_name(output.name + ".settings.json")
    said = {
        "model": prediction.model.model_dump(mode="json"),
        "adapter": prediction.adapter,
        "prompts": prediction.prompts,
        "template": prediction.template,
        "sampling": {**asdict(prediction.sampling), "stop": list(prediction.sampling.stop)},
        "seed": prediction.seed,
    }
    if output.exists():
        before = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else None
        if before != said:
            differing = (
                "of unknown settings" if before is None else ", ".join(k for k in said if before.get(k) != said[k])
            )
            raise RequestError(
                f"--output: {output} is there from a run that differs from this one ({differing}); remove it, or name "
                "another file"
            )
        whole, end, _ = output.read_bytes().rpartition(b"\n")
        with output.open("r+b") as file:
            file.truncate(len(whole) + len(end))
        return whole.count(b"\n") + 1 if end else 0
    output.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return 0


def cluster_gpus() -> float:
    """How many GPUs the cluster has that this process is connected to."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0))


def engine_options(prediction: Prediction, gpus: float) -> EngineOptions:
    """What the engines of a prediction are started with.

    Args:
        gpus: that the cluster has.

    Raises:
        RequestError: an adapter that they do not serve.
    """
    config, model = prediction.rollout, prediction.model
    limit = raw_config(model).get("max_position_embeddings")
    length = prediction.cutoff + prediction.sampling.max_tokens
    rank = None
    if prediction.adapter is not None:
        adapter = read_adapter_config(prediction.adapter, "--adapter")
        if adapter.peft_type.value != "LORA" or adapter.use_dora or adapter.modules_to_save:
            raise RequestError(
                f"--adapter: {prediction.adapter}: the engines serve plain LoRA; merge this one into its model first"
            )
        rank = max([adapter.r, *adapter.rank_pattern.values()])
    device: Literal["cpu", "gpu"] = "gpu" if prediction.device != "cpu" and gpus else "cpu"
    own = choose_precision(config.precision, device, bf16=device == "gpu" or computes_bf16("cpu"))
    return EngineOptions(
        model=model.path,
        precision=engine_precision(config.precision, own, device),
        max_length=min(length, limit) if limit else length,
        adapter_rank=rank,
        device=device,
        tensor_parallel=config.tensor_parallel if device == "gpu" else 1,
        kv_cache_gib=config.kv_cache_gib,
        gpu_memory=config.gpu_memory,
        trust_remote_code=bool(getattr(model, "trust_remote_code", False)),
        revision=model.revision,
    )


def weights_of(adapter: str | None) -> Weights:
    """What the engines are to serve: the model itself, or with the adapter of a folder."""
    if adapter is None:
        return Weights.of_base()
    from safetensors.torch import load_file

    from rayloom.rollout.weights import weights_to_send  # imports torch

    tensors = load_file(Path(adapter).expanduser() / WEIGHTS)
    config = json.loads((Path(adapter).expanduser() / CONFIG).read_text(encoding="utf-8"))
    return weights_to_send(1, tensors, config)
