"""Ray Train's trainer of parallel workers with a torch process group, and no more than that.

Not `ray.train.torch.TorchTrainer`: whoever unpickles its `TorchConfig` loads torch, the controller and the driver among
them. On a small machine each of these seconds stands between a job and its first batch (tests/bench/NOTES.md).
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from rayloom.collector import collector_off
from rayloom.train.monitor import answer

_SHUTDOWN_SECONDS = 30.0


class StreamDataParallelTrainer(DataParallelTrainer):
    """Ray Train's trainer without three actors, each a process that loads Ray Train or Ray Data.

    The workers' data comes from dealers (`rayloom.data.deal`), so none deals data sets. The driver, which outlives the
    controller, frees the workers' placement group if that was killed, so none waits for this. And on a Ray of the job's
    own, which cannot grow, none is asked to let it; there no process has a runtime environment either, for which Ray
    would start another process instead of one that is there, and have that load Ray twice.
    """

    def __init__(self, *args: Any, monitor: Any, own_cluster: bool, **kwargs: Any) -> None:
        self._monitor, self._own_cluster = monitor, own_cluster
        super().__init__(*args, **kwargs)

    def _create_default_callbacks(self) -> list[Any]:
        replaced = (DatasetsCallback, PlacementGroupCleanerCallback)
        kept = [one for one in super()._create_default_callbacks() if not isinstance(one, replaced)]
        return [*kept, _TellPlacementGroup(self._monitor)]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if not self._own_cluster:
            return super()._initialize_and_run_controller(**parts)
        config: Any = self.scaling_config
        parts["scaling_policy"] = _NothingRequested(config)
        controller: Any = ray.remote(num_cpus=0)(_OwnController).remote(**parts)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


class _OwnWorkerGroup(WorkerGroup):
    """Its workers inherit what Ray Train would hand on."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return dict(custom_runtime_env)


class _OwnController(TrainController):
    """On a Ray of the job's own, whose processes inherit the driver's environment."""

    worker_group_cls = _OwnWorkerGroup


class _NothingRequested(FixedScalingPolicy):
    """Runs in the controller. As many workers as there are to be, without a request for resources beforehand."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class _TellPlacementGroup(WorkerGroupCallback):
    """Runs in the controller. Ray keeps a placement group for as long as the job lives that its creator was part of."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def after_worker_group_start(self, worker_group: Any) -> None:
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        answer(self._monitor.post.remote({"kind": "placement group", "group": group}), "Ray Train's controller")


@dataclass
class ProcessGroupConfig(BackendConfig):
    """What Ray Train hands on to `_ProcessGroup`."""

    collectives: str
    """torch's name: `gloo` or `nccl`."""
    timeout_seconds: int
    """The longest that a collective call waits for the other workers."""
    threads: int | None
    """How many threads a worker computes with on CPU; None: as Ray has it."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroup

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _ProcessGroup(Backend):
    """Runs in the controller, which only asks the workers to do it."""

    share_cuda_visible_devices = True  # NCCL's peers on a node must see each other's GPUs

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, ProcessGroupConfig)
        address, port = worker_group.execute_single(0, _free_address)
        worker_group.execute(_set_threads, backend_config.threads)
        worker_group.execute(
            _join, address, port, backend_config.collectives, timeout_seconds=backend_config.timeout_seconds
        )

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        if len(worker_group) > 1:
            with contextlib.suppress(ray.exceptions.GetTimeoutError):  # the processes end in any case
                ray.get(worker_group.execute_async(_leave), timeout=_SHUTDOWN_SECONDS)


# --- in the workers ---------------------------------------------------------------------------------------------------


def _free_address() -> tuple[str, int]:
    """Where the workers will find rank 0."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("", 0))
        return address, int(free.getsockname()[1])


def _set_threads(threads: int | None) -> None:
    """Ray gives a worker OMP_NUM_THREADS=1. The math libraries read it when they are loaded; to raise the number later
    leaves parts of them at one thread (tests/bench/NOTES.md)."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _join(address: str, port: int, collectives: str, *, timeout_seconds: int) -> None:
    """Say to torch, Accelerate and DeepSpeed who this worker is, and wait for the others."""
    from datetime import timedelta

    with collector_off():
        import ray.train
        import torch
        from ray.train.torch import get_device

    context = ray.train.get_context()
    device = get_device()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
        "ACCELERATE_TORCH_DEVICE": str(device),
    }
    is_spread = context.get_local_world_size() < context.get_world_size()
    if collectives == "gloo" and is_spread and (interface := _interface_of(ray.util.get_node_ip_address())):
        # Else gloo takes the interface that the machine's name leads to, which on Debian is the loopback.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if collectives == "nccl":
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # else a hung peer is waited for without end
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    # Of groups that are made later, as DeepSpeed makes some; else they would be waited for half an hour.
    groups: Any = torch.distributed.distributed_c10d
    groups.default_pg_timeout = groups.default_pg_nccl_timeout = timeout
    torch.distributed.init_process_group(
        collectives,
        init_method="env://",
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        timeout=timeout,
    )


def _interface_of(address: str) -> str | None:
    """The network interface by which Ray reaches this machine; None where the address is not its own but a router's."""
    import psutil  # type: ignore[import-untyped]

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return str(name)
    return None


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
