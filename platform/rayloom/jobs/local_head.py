"""A Ray head of our own on this machine: nothing of it is shared, and nothing of it outlives its `with` block.

It has a folder, ports and a token of its own, so it disturbs no other Ray and no other Ray finds it. It is ended by
process id: `ray stop` would end every Ray on the machine.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

from rayloom.errors import JobError
from rayloom.jobs import keeper

STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
"""How long a job that is stopped has for its checkpoint. Ray Jobs reads it where it watches the job; its default is
3 seconds."""

# Above Ray's default worker ports and below the ports that systems give to outgoing connections.
_PORTS = range(20001, 32000)
# What would lead the head, or the jobs in it, to another cluster or another identity.
_NOT_INHERITED = (
    "RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN_PATH RAY_JOB_CONFIG_JSON_ENV_VAR RAY_JOB_HEADERS "
    "RAY_NAMESPACE RAY_RUNTIME_ENV_HOOK RAY_TMPDIR"
).split()


class LocalHead:
    """A context manager: starts the head, waits until it takes jobs, and ends all of its processes.

        with LocalHead(num_cpus=2) as head:
            client = connect(head.address, environment=head.environment)

    A keeper beside it ends the head also when this process ends in any other way, be it by SIGKILL.

    Attributes:
        address: of the dashboard and the Jobs API, `http://127.0.0.1:PORT`.
        cluster_address: of the cluster, `127.0.0.1:PORT`: what a driver finds in `RAY_ADDRESS`.
        folder: the private temporary folder; gone afterwards.
    """

    def __init__(self, *, num_cpus: int | None = None, start_seconds: float = 180.0) -> None:
        """
        Args:
            num_cpus: what Ray hands out, which may be more than there are; by default, what the machine has.
            start_seconds: how long the start may take.
        """
        self._num_cpus = num_cpus
        self._start_seconds = start_seconds
        self._token = secrets.token_hex(32)
        self._mark = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self.address = ""
        self.cluster_address = ""
        self.folder = Path()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a client, or a subprocess such as `ray job submit`, needs to reach the head."""
        return {"RAY_API_SERVER_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}

    def __enter__(self) -> LocalHead:
        try:
            agent = self._start()
            self._wait_for("the Jobs API", f"{self.address}/api/jobs/")
            self._wait_for("the node's agent", f"http://127.0.0.1:{agent}/api/local_raylet_healthz")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is None:
            return
        survivors = ""
        if self._keeper is not None:
            survivors = self._keeper.communicate(b"end\n")[0].decode().strip()
        if self._keeper is None or self._keeper.returncode != 0:  # never started, or killed by someone
            survivors = " ".join(map(str, keeper.end_processes(self._process.pid, self._mark)))
            keeper.remove(self.folder)
        if survivors:
            raise JobError(f"could not end these processes of the local Ray head: {survivors}")
        self._process.wait()
        self._process = self._keeper = None

    def wait(self) -> int:
        """Wait until the head ends by itself, which is a failure; return its exit status."""
        assert self._process is not None
        return self._process.wait()

    def _start(self) -> int:
        """Start the head and its keeper; return the port of the node's agent."""
        gcs, dashboard, agent, metrics, client, autoscaler_metrics, dashboard_metrics = _free_ports(7)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.cluster_address = f"127.0.0.1:{gcs}"
        self.folder = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp" if Path("/tmp").is_dir() else None))
        options = {
            "port": gcs,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "metrics-export-port": metrics,
            "ray-client-server-port": client,
            "min-worker-port": 0,  # the system chooses: two heads with one range would hand out the same ports
            "max-worker-port": 0,
            "temp-dir": self.folder,
            "include-dashboard": "true",
            "log-color": "false",
        } | ({} if self._num_cpus is None else {"num-cpus": self._num_cpus})
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "AUTOSCALER_METRIC_PORT": str(autoscaler_metrics),
            "DASHBOARD_METRIC_PORT": str(dashboard_metrics),
            # Ray Jobs starts `python`, and DeepSpeed `ninja`, from the head's PATH.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            keeper.MARK: self._mark,
            **STOP_WAIT,
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
                + [f"--{name}={value}" for name, value in options.items()],
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for the starter
            )
        arguments = [str(os.getpid()), str(self._process.pid), self._mark, str(self.folder)]
        self._keeper = subprocess.Popen(
            [sys.executable, "-P", keeper.__file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        return agent

    @property
    def _log(self) -> Path:
        return self.folder / "head.log"

    def _wait_for(self, what: str, url: str) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self._start_seconds
        while True:
            if (code := self._process.poll()) is not None:
                raise JobError(f"the local Ray head ended with exit status {code} while it started; {self._log_tail()}")
            if (answer := _get(url, self._token)) == "200":
                return
            if time.monotonic() > deadline:
                raise JobError(
                    f"waited {self._start_seconds:g} s for {what} of the local Ray head at {url} "
                    f"(last answer: {answer}); {self._log_tail()}"
                )
            time.sleep(0.2)

    def _log_tail(self) -> str:
        parts = []
        for file in (self._log, self.folder / "session_latest/logs/dashboard.log"):
            with suppress(OSError):
                lines = file.read_text(errors="replace").splitlines()[-20:]
                parts += [f"the end of {file.name}:", *(f"  {line}" for line in lines)]
        return "\n".join(parts) or "it wrote no log"


def _free_ports(count: int) -> list[int]:
    """Distinct ports that nobody listens on."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, 500):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))  # on every interface: the GCS takes the node's own, not the loopback
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise JobError(f"found no {count} free ports between {_PORTS.start} and {_PORTS.stop}")


def _get(url: str, token: str) -> str:
    """The status of the answer, or why there was none. Never through a proxy: it is this machine."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError as error:
        return str(error)
