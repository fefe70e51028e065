"""Whether models and rewards of stage ppo fit, told from their files before anything of the job is loaded."""

from __future__ import annotations

from pathlib import Path

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.methods.adapter_folder import CONFIG
from rayloom.models.architecture import read_architecture
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer
from rayloom.models.value_head import FILE
from rayloom.rollout.rewards.config import AdapterReward, FunctionReward, ModelReward
from rayloom.rollout.rewards.function import check_function


def check_lengths_and_heads(job: JobConfig) -> None:
    """Refuse prompts and answers that the model has no positions for, and engines that cannot share its heads.

    Raises:
        RequestError: with the key, the value and what would be right.
    """
    text, engines = read_architecture(job.model).text, job.rollout
    longest, most = job.data.cutoff + engines.max_tokens, getattr(text, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise RequestError(
            f"data.cutoff: prompts of {job.data.cutoff} tokens with answers of {engines.max_tokens} "
            f"(rollout.max_tokens) pass the model's length of {most}; make one of them smaller"
        )
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:
        return
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    right = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    if engines.tensor_parallel not in right:
        own = f" ({kv_heads} for keys and values)" if kv_heads != heads else ""
        raise RequestError(
            f"rollout.tensor_parallel: {engines.tensor_parallel} does not divide the model's {heads} heads{own}; "
            f"it may be {', '.join(map(str, right))}"
        )


def check_reward_functions(job: JobConfig) -> None:
    """Refuse functions that give no rewards because they cannot be loaded, or not be called.

    Raises:
        RequestError: naming the reward's path.
    """
    for number, source in enumerate(job.rewards.sources if job.rewards else []):
        if isinstance(source, FunctionReward):
            check_function(source, f"rewards.sources[{number}].path")


def check_reward_models(job: JobConfig) -> None:
    """Refuse reward models that are none, or none for this policy. Imports torch and PEFT where there is an adapter.

    Raises:
        RequestError: naming the reward's path.
    """
    for number, source in enumerate(job.rewards.sources if job.rewards else []):
        key = f"rewards.sources[{number}].path"
        if not isinstance(source, AdapterReward | ModelReward):
            continue
        folder = Path(source.path).expanduser()
        if not (folder / FILE).is_file():
            raise RequestError(f"{key}: {source.path} has no {FILE}; a job of stage reward saves one in its model/")
        if isinstance(source, ModelReward) and (folder / CONFIG).is_file():
            raise RequestError(
                f"{key}: {source.path} holds an adapter; say type: adapter, on the base that it was trained on"
            )
        if isinstance(source, AdapterReward):
            from rayloom.methods.adapter_folder import check_adapter
            from rayloom.methods.skeleton import skeleton

            check_adapter(source.path, key, skeleton(job.model), job.model.path)
        else:
            own = load_tokenizer(TokenizerSource.of(job.model)).get_vocab()
            if load_tokenizer(source.path).get_vocab() != own:
                raise RequestError(
                    f"{key}: {source.path} has another vocabulary than {job.model.path}; a reward model reads the "
                    "policy's tokens, so both need the same one"
                )
