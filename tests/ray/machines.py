"""Nodes of a Ray cluster as groups of processes, which a test can kill or cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import ray

from rayloom.jobs.local_head import LocalHead


class Machine:
    """A node with four CPUs, started by `ray start` with some more options.

    Args:
        environment: what it needs beside this process's own variables.
        enter: what the command begins with: that of a network namespace.
        log: where its output goes, if it is wanted.
    """

    def __init__(
        self, *options: str, environment: Mapping[str, str], enter: Sequence[str] = (), log: Path | None = None
    ) -> None:
        more = ("--num-cpus=4", "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats")
        with (log or Path(os.devnull)).open("wb") as output:
            self._process = subprocess.Popen(
                [*enter, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *more, *options],
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @classmethod
    def beside(cls, head: LocalHead) -> Machine:
        """A second node of the head's cluster."""
        return cls(f"--address={head.cluster_address}", environment=head.environment)

    def raylet(self) -> psutil.Process:
        children = psutil.Process(self._process.pid).children(recursive=True)
        return next(child for child in children if child.name().startswith("raylet"))

    def die(self) -> None:
        os.kill(self.raylet().pid, signal.SIGKILL)

    def node_id(self) -> str:
        nodes = [node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" not in node["Resources"]]
        return str(nodes[0]["NodeID"])

    def is_running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        children = psutil.Process(self._process.pid).children(recursive=True) if self.is_running() else []
        for process in [*children, self._process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()


def wait_for_nodes(head: LocalHead, count: int) -> None:
    deadline = time.monotonic() + 90
    with ray.init(address=head.cluster_address, namespace="test", logging_level="ERROR", log_to_driver=False):
        while sum(node["Alive"] for node in ray.nodes()) != count:
            assert time.monotonic() < deadline, f"the cluster never had {count} nodes"
            time.sleep(0.5)
