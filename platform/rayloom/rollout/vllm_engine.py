"""vLLM behind one class: the file that knows its Python API, and the version that it was written for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rayloom.errors import JobError, RequestError, first_line
from rayloom.models.source import model_folder
from rayloom.rollout.adapter_folders import AdapterFolders, adapter_rank_limit, pack, stored_tensors
from rayloom.rollout.digest import Compared, Digest, digest_of, equal_tensors
from rayloom.rollout.request import (
    BLOCK,
    PROBE_CHOICES,
    EngineOptions,
    Probe,
    Prompt,
    Rollout,
    Sampling,
    Served,
    Weights,
)
from rayloom.rollout.vllm_cpu import use_cpu_functions

VERSION = "0.32"
"""The vLLM that this file was written for: its calls for weights change between minor versions."""
VLLM_TYPES: dict[str, Any] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions go to vLLM's workers, where there are several
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def process_environment(options: EngineOptions, threads: int) -> dict[str, str]:
    """Variables of a process with so many threads, from its very start: OpenMP and vLLM read them on import."""
    # In the engine's own process vLLM binds no threads: there are as many as OpenMP is told, wherever the system puts
    # them, beside trainers that use the same cores in turn.
    return _VARIABLES | ({"OMP_NUM_THREADS": str(threads)} if options.device == "cpu" else {})


def check_vllm() -> None:
    """Raises:
    RequestError: vLLM is not there, or is another version.
    """
    try:
        import vllm
    except ImportError as error:
        raise RequestError(
            f"rollout: the engines need vLLM, and it does not load here ({error}); `make setup` installs it, for GPUs "
            f"`pip install vllm=={VERSION}.0`"
        ) from None
    if not vllm.__version__.startswith(f"{VERSION}."):
        raise RequestError(f"rollout: vLLM {vllm.__version__} is installed; the engines need {VERSION}")


class VllmEngine:
    """One engine, in this process. Not for several threads."""

    def __init__(self, options: EngineOptions, number: int = 0) -> None:
        """Load the model. Seconds to minutes.

        Raises:
            RequestError: no vLLM of the right version; a rank that it has not.
        """
        check_vllm()
        os.environ.update({**_VARIABLES, **os.environ})
        import vllm

        self._options, self._number = options, number
        arguments: dict[str, Any] = {}
        if options.adapter_rank is not None:
            arguments |= {"enable_lora": True, "max_lora_rank": adapter_rank_limit(options.adapter_rank)}
        if options.device == "cpu":
            arguments |= use_cpu_functions() if options.tensor_parallel == 1 else {}  # else vLLM has more processes
            arguments |= {"kv_cache_memory_bytes": int(options.kv_cache_gib * 2**30), "block_size": BLOCK}
            arguments["enable_chunked_prefill"] = False  # it sets generators back, and a CPU's has no way back
        else:
            arguments |= {"gpu_memory_utilization": options.gpu_memory, "enable_sleep_mode": options.sleeps}
        self._llm: Any = vllm.LLM(
            model=model_folder(options.model),
            revision=options.revision,
            tokenizer_revision=options.revision,
            dtype=VLLM_TYPES[options.precision],
            max_model_len=max(options.max_length, 2 * BLOCK),  # probes fit too
            tensor_parallel_size=options.tensor_parallel,
            enforce_eager=options.device == "cpu",
            enable_prefix_caching=True,
            logprobs_mode="processed_logprobs",
            seed=options.seed,
            trust_remote_code=options.trust_remote_code,
            **arguments,
        )
        self._folders, self._serial = AdapterFolders(), 0
        self._adapter: Any = None  # the LoRARequest that every prompt goes with
        self._version: int | None = None
        self._loaded = (0, digest_of({}))  # of whole weights: how many tensors the model has read, and which
        self._new = False  # weights came, and no prompt has been answered with them yet
        self.rest()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's, the model folder's, the options'."""
        own = self._llm.model_config.try_get_generation_config().get("eos_token_id")
        own = own if isinstance(own, list) else [own]
        ids = {*own, self._llm.get_tokenizer().eos_token_id, *self._options.stop_token_ids}
        return tuple(sorted(ids - {None}))

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, probe: Sequence[int]
    ) -> tuple[list[Rollout], Probe | None]:
        """Answer prompts, ordered by (prompt as given, sample). What an answer is depends on its seed, not on the
        others, but for the rounding of sums in batches of another size.

        Args:
            probe: a prompt that goes before the others, where they are the first with these weights; at least a block
                of the prefix cache long (`request.probe_prompt`).

        Returns:
            The answers, and the likeliest tokens behind the probe; None: it was answered before.

        Raises:
            JobError: it has no weights yet, or keys and values of old ones are in use.
            RequestError: a prompt is too long.
        """
        if self._version is None:
            raise JobError(f"engine {self._number} was asked before it had any weights")
        self._options.check_lengths(prompts, sampling)
        asked = [(prompt, sample) for prompt in prompts for sample in range(prompt.samples)]
        first = [probe] if self._new else []
        self.rest(sleeps=False)
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in (*first, *(prompt.token_ids for prompt, _ in asked))],
            [
                *(self._parameters(Sampling(1, temperature=0), choices=PROBE_CHOICES) for _ in first),
                *(self._parameters(sampling, seed=prompt.seed + sample) for prompt, sample in asked),
            ],
            lora_request=self._adapter,
            use_tqdm=False,
        )
        said = self._probed(outputs.pop(0)) if first else None
        rollouts = [
            Rollout(
                prompt=prompt.number,
                sample=sample,
                token_ids=tuple(answer.token_ids),
                log_probs=tuple(step[id].logprob for id, step in zip(answer.token_ids, answer.logprobs, strict=True)),
                finish_reason=answer.finish_reason,
                policy_version=self._version,
                engine=self._number,
            )
            for (prompt, sample), answer in zip(asked, (output.outputs[0] for output in outputs), strict=True)
        ]
        return rollouts, said

    def take(self, weights: Weights, tensors: Any) -> None:
        """Serve these weights from now on.

        Args:
            tensors: what `weights.tensors` refers to.
        """
        self.rest(sleeps=False)
        if weights.kind == "adapter":
            self._take_adapter(weights, tensors)
        else:
            self._drop_adapter()
            self._loaded = self._take_whole(tensors) if weights.kind == "full" else (0, digest_of({}))
            self._llm.reset_prefix_cache()  # its keys do not say of which weights they are
        self._version, self._new = weights.version, True

    def serves(self) -> Served:
        """Count and digest of the tensors that are there."""
        assert self._version is not None
        count, digest = self._loaded
        if self._adapter is not None:
            args = self._adapter.lora_int_id, self._adapter.lora_path
            count, digest = min(self._llm.collective_rpc(_held, args=args))  # of several workers the worst
        return Served(self._number, self._version, count, digest)

    def _probed(self, output: Any) -> Probe:
        assert self._version is not None
        if output.num_cached_tokens:
            raise JobError(
                f"engine {self._number} answered policy version {self._version} from keys and values of earlier "
                f"weights ({output.num_cached_tokens} tokens of its prefix cache)"
            )
        self._new = False
        said = {token: one.logprob for token, one in output.outputs[0].logprobs[0].items()}
        likeliest = sorted(said, key=lambda token: -said[token])[:PROBE_CHOICES]
        return Probe(self._number, self._version, tuple(likeliest), tuple(said[token] for token in likeliest))

    def rest(self, *, sleeps: bool = True) -> None:
        """Weights to the host's memory, keys and values forgotten; or back. Where it shares its GPU with a trainer."""
        if self._options.sleeps:
            self._llm.sleep(level=1) if sleeps else self._llm.wake_up()

    def close(self) -> None:
        """Remove what it has written."""
        self._folders.close()

    def _take_adapter(self, weights: Weights, file: Any) -> None:
        """Adapters come as folders. A new one for each, with a number of its own: under an old name vLLM would serve
        the old adapter, or the new one with the old one's keys and values."""
        from vllm.lora.request import LoRARequest

        self._serial += 1
        name = f"version-{weights.version}-{self._serial}"
        folder = self._folders.write(name, file, weights.adapter_config)
        new = LoRARequest(name, self._serial, str(folder))
        try:
            self._llm.llm_engine.add_lora(new)
        except Exception as error:
            raise JobError(
                f"policy version {weights.version} did not arrive: engine {self._number} cannot load the adapter, "
                f"{len(stored_tensors(str(folder)))} tensors of {weights.count}: {first_line(error)}"
            ) from error
        self._drop_adapter()
        self._adapter = new

    def _take_whole(self, tensors: Mapping[str, Any]) -> tuple[int, str]:
        """How many tensors of the whole model were read, and their digest: of several workers the worst. These are
        processes of their own, to which vLLM can send a path, and no tensors."""
        is_sent = self._options.tensor_parallel == 1
        source = tensors if is_sent else str(self._folders.write(f"whole-{self._serial}", pack(tensors), None))
        read: tuple[int, str] = min(self._llm.collective_rpc(_reload, args=(source,)))
        if not is_sent:
            shutil.rmtree(str(source))
        return read

    def _drop_adapter(self) -> None:
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
            shutil.rmtree(self._adapter.lora_path, ignore_errors=True)
            self._adapter = None

    def _parameters(self, sampling: Sampling, *, seed: int | None = None, choices: int = 0) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
            stop=list(sampling.stop),
            stop_token_ids=list(self._options.stop_token_ids),
            logprobs=choices,  # of the token that was drawn, and of so many of the likeliest
            detokenize=bool(sampling.stop),
        )


def _reload(worker: Any, source: Mapping[str, Any] | str) -> tuple[int, str]:
    """Runs in vLLM's worker: hand tensors, or those of a folder, to the model, and keep account of those that it asks
    for."""
    tensors = stored_tensors(source) if isinstance(source, str) else source
    digest = Digest()
    worker.reload_weights(weights_iterator=digest.of_those_read(tensors))
    if worker.device.type == "cpu":
        # An output layer that shares the embeddings' weights has a packed copy, which is left as it was.
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(worker.model_runner.get_model().lm_head, remove_weight=False)
    return digest.count, str(digest)


def _held(worker: Any, number: int, folder: str) -> tuple[int, str]:
    """Runs in vLLM's worker: of the tensors of a folder those that it holds as adapter `number`, equal in every
    element: how many, and their digest.

    vLLM casts them to its own type, multiplies the factor `alpha / rank` into B, and joins layers that it computes
    together (q, k and v).
    """
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.utils import parse_fine_tuned_lora_name

    manager = worker.model_runner.lora_manager._adapter_manager
    adapter = manager.get_adapter(number)
    parts: dict[str, tuple[Any, Any]] = {}
    for name, layer in adapter.loras.items() if adapter else ():
        if name in manager.packed_modules:
            names = manager.packed_modules[name]
            parts |= {part: pair for part, *pair in zip(names, layer.lora_a, layer.lora_b, strict=True)}
        else:
            parts[name] = (layer.lora_a, layer.lora_b)
    helper = PEFTHelper.from_local_dir(folder, None)
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    renames = mapper.get_rename_mapper() if mapper is not None else None
    sent = []
    for name, tensor in stored_tensors(folder).items():
        module, is_a = parse_fine_tuned_lora_name(name, renames)
        factor = 1.0 if is_a else helper.get_rank_and_scaling(parse_fine_tuned_lora_name(name)[0])[1]
        sent.append(Compared(name, tensor, parts.get(module, (None, None))[0 if is_a else 1], factor))
    held = equal_tensors(sent)
    return len(held), digest_of(held)
