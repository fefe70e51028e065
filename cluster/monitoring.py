"""Prometheus, and Grafana where it is installed, beside a Ray head that runs on this machine, with Rayloom's alerts and
dashboards: `python cluster/monitoring.py`.

Ctrl-C ends them, and nothing else; Ray is only read. What they wrote is in a temporary folder that goes with them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from rayloom.errors import JobError, RequestError

_DASHBOARDS = Path(__file__).resolve().parents[1] / "dashboards"
_NODES = "prom_metrics_service_discovery.json"  # the head writes the addresses of its nodes' metrics there
_START_SECONDS = 60.0
_END_SECONDS = 10.0
_HOST = "127.0.0.1"  # neither has a password


@dataclass(frozen=True)
class Monitoring:
    """What runs."""

    addresses: dict[str, str]
    """Of Prometheus, and of Grafana where it is installed."""
    processes: list[Process]

    def wait(self) -> NoReturn:
        """Wait until one of them ends by itself.

        Raises:
            JobError: naming it, with the end of its log.
        """
        while True:
            for process in self.processes:
                process.check()
            time.sleep(0.5)


@contextmanager
def monitoring(ray_folder: Path, *, port: int = 9090, grafana_port: int = 3000) -> Iterator[Monitoring]:
    """Start both, and end them afterwards.

    Args:
        ray_folder: the temporary folder of the head.

    Raises:
        RequestError: Prometheus is not installed, no head has this folder, or a port is taken.
        JobError: one does not start.
    """
    prometheus, grafana = shutil.which("prometheus"), shutil.which("grafana")
    if prometheus is None:
        raise RequestError("prometheus is not on the PATH; on Debian: apt-get install prometheus")
    if not (ray_folder / _NODES).exists():
        raise RequestError(
            f"--ray-folder: {ray_folder} holds no {_NODES}: it is the temporary folder of no Ray head of this machine; "
            "name the one that the head was started with (--temp-dir; by default /tmp/ray)"
        )
    check_port(port, "--port")
    if grafana is not None:
        check_port(grafana_port, "--grafana-port")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rayloom-monitoring-")))
        addresses = {"Prometheus": f"http://{_HOST}:{port}"}
        command = [prometheus, f"--config.file={write_prometheus(folder, ray_folder)}"]
        command += [f"--storage.tsdb.path={folder / 'measured'}", f"--web.listen-address={_HOST}:{port}"]
        processes = [stack.enter_context(Process(command, folder / "prometheus.log"))]
        processes[0].wait_for(f"{addresses['Prometheus']}/-/ready")
        if grafana is not None:
            addresses["Grafana"] = f"http://{_HOST}:{grafana_port}"
            command = [grafana, "server", "--homepath", str(grafana_home(Path(grafana)))]
            variables = write_grafana(folder, addresses["Prometheus"], grafana_port)
            processes.append(stack.enter_context(Process(command, folder / "grafana.log", variables)))
            processes[1].wait_for(f"{addresses['Grafana']}/api/health")
        yield Monitoring(addresses, processes)


def write_prometheus(folder: Path, ray_folder: Path) -> Path:
    """The project's configuration for the nodes of this head; the file."""
    source = _DASHBOARDS / "prometheus"
    config = yaml.safe_load((source / "prometheus.yaml").read_text())
    config["rule_files"] = [str(source / file) for file in config["rule_files"]]
    (scrape,) = config["scrape_configs"]
    scrape["file_sd_configs"] = [{"files": [str((ray_folder / _NODES).resolve())]}]
    file = folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def write_grafana(folder: Path, prometheus: str, port: int) -> dict[str, str]:
    """Grafana's provisioning: where the numbers and the dashboards are; the variables that lead it there."""
    source = {"name": "Prometheus", "uid": "rayloom", "type": "prometheus", "access": "proxy", "url": prometheus}
    pages = {"name": "Rayloom", "type": "file", "options": {"path": str(_DASHBOARDS / "grafana")}}
    for name, body in (
        ("datasources", {"apiVersion": 1, "datasources": [{**source, "isDefault": True}]}),
        ("dashboards", {"apiVersion": 1, "providers": [pages]}),
    ):
        (folder / "provisioning" / name).mkdir(parents=True)
        (folder / "provisioning" / name / "rayloom.yaml").write_text(yaml.safe_dump(body))
    return {
        "GF_PATHS_PROVISIONING": str(folder / "provisioning"),
        "GF_PATHS_DATA": str(folder / "grafana"),
        "GF_PATHS_LOGS": str(folder / "grafana"),
        "GF_SERVER_HTTP_ADDR": _HOST,
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
    }


def grafana_home(program: Path) -> Path:
    """Where the files of an installed Grafana are: beside the program, or where packages put them.

    Raises:
        RequestError: they are nowhere.
    """
    above = program.resolve().parent.parent
    for home in (above, above / "share" / "grafana", Path("/usr/share/grafana")):
        if (home / "conf" / "defaults.ini").exists():
            return home
    raise RequestError(f"{program}: Grafana's conf/defaults.ini is neither in {above} nor in /usr/share/grafana")


def check_port(port: int, option: str) -> None:
    """Refuse a port on which something listens.

    Raises:
        RequestError: naming the option.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was in use just now is free
        try:
            probe.bind((_HOST, port))
        except (OSError, OverflowError) as error:
            raise RequestError(f"{option}: {port}: {error}; choose another") from None


class Process:
    """A context manager: a server that is ended with its block.

    Args:
        log: the file for all that it says.
        variables: for its environment, besides ours.
    """

    def __init__(self, command: list[str], log: Path, variables: dict[str, str] | None = None) -> None:
        self._name, self._log = Path(command[0]).name, log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for us
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def check(self) -> None:
        """Raise where it has ended."""
        if (status := self._process.poll()) is not None:
            raise JobError(f"{self._name} ended with exit status {status}; {self._tail()}")

    def wait_for(self, address: str) -> None:
        """Return when it answers there."""
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(address):
            self.check()
            if time.monotonic() > deadline:
                raise JobError(f"waited {_START_SECONDS:g} s for {self._name} at {address}; {self._tail()}")
            time.sleep(0.2)

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-10:]
        return "\n".join(["the end of its log:", *(f"  {line}" for line in lines)])


def _answers(address: str) -> bool:
    try:  # never through a proxy: it is this machine
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def say(addresses: dict[str, str]) -> None:
    """Where to look."""
    for name, address in addresses.items():
        print(f"{name}: {address}")
    if "Grafana" not in addresses:
        print(f"Grafana is not on the PATH; it imports {_DASHBOARDS / 'grafana'}/*.json")


def main() -> None:
    """Start, say where, wait."""
    parser = argparse.ArgumentParser(
        description="Prometheus, and Grafana where it is installed, beside a Ray head of this machine, until Ctrl-C.",
        epilog="example: python cluster/monitoring.py --ray-folder /tmp/ray --port 9091",
    )
    parser.add_argument(
        "--ray-folder", type=Path, default=Path("/tmp/ray"), help="the head's temporary folder (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=9090, help="of Prometheus (default: %(default)s)")
    parser.add_argument("--grafana-port", type=int, default=3000, help="of Grafana (default: %(default)s)")
    options = parser.parse_args()
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:  # as nohup has it
            signal.signal(name, signal.default_int_handler)  # as Ctrl-C
    try:
        with monitoring(options.ray_folder, port=options.port, grafana_port=options.grafana_port) as running:
            say(running.addresses)
            print("Ctrl-C ends it.", flush=True)
            running.wait()
    except KeyboardInterrupt:
        print()
    except RequestError as error:
        print("\n".join(error.messages), file=sys.stderr)
        sys.exit(2)
    except JobError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
