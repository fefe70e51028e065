"""A Kubernetes API server for custom resources, with etcd beneath it: both real, on this machine."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_START_SECONDS = 120.0
_ANSWER_SECONDS = 30.0
# Of a whole API server; this one has no core kinds for them to look at.
_WITHOUT = (
    "NamespaceLifecycle,MutatingAdmissionWebhook,ValidatingAdmissionWebhook,ValidatingAdmissionPolicy,"
    "MutatingAdmissionPolicy"
)


@dataclass(frozen=True)
class Answer:
    """What the server says to a request."""

    status: int
    body: dict[str, Any]

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))


class ApiServer:
    """A context manager: starts etcd and the server, and ends both.

    Args:
        folder: holds `etcd` and `apiextensions-apiserver` (`tests/api_server.sh` builds them).
    """

    def __init__(self, folder: Path) -> None:
        self._programs = folder
        self._port = 0
        self._stack = ExitStack()

    def __enter__(self) -> ApiServer:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rl-api-")))
            clients, peers, self._port = _free_ports(3)
            self._start(
                stack,
                scratch / "etcd.log",
                "etcd",
                f"--data-dir={scratch / 'etcd'}",
                f"--listen-client-urls=http://127.0.0.1:{clients}",
                f"--advertise-client-urls=http://127.0.0.1:{clients}",
                f"--listen-peer-urls=http://127.0.0.1:{peers}",
                f"--initial-advertise-peer-urls=http://127.0.0.1:{peers}",
                f"--initial-cluster=default=http://127.0.0.1:{peers}",
            )
            server = self._start(
                stack,
                scratch / "server.log",
                "apiextensions-apiserver",
                f"--etcd-servers=http://127.0.0.1:{clients}",
                f"--secure-port={self._port}",
                "--bind-address=127.0.0.1",
                *_credentials(scratch, self._port),
                f"--disable-admission-plugins={_WITHOUT}",
            )
            self._context = _client_context(scratch)
            deadline = time.monotonic() + _START_SECONDS
            while not self._answers():
                log = "\n".join((scratch / "server.log").read_text(errors="replace").splitlines()[-20:])
                assert server.poll() is None, f"the API server ended: {log}"
                assert time.monotonic() < deadline, f"the API server does not answer: {log}"
                time.sleep(0.2)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def call(self, method: str, path: str, body: Any = None, *, kind: str = "application/json") -> Answer:
        request = urllib.request.Request(
            f"https://127.0.0.1:{self._port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": kind},
        )
        handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self._context))
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=_ANSWER_SECONDS) as answer:
                return Answer(answer.status, json.load(answer))
        except urllib.error.HTTPError as error:
            return Answer(error.code, json.load(error))

    def define(self, definition: dict[str, Any]) -> None:
        """Serve a custom resource; returns when it is served."""
        path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{definition['metadata']['name']}"
        query = "?fieldManager=test&fieldValidation=Strict"
        answer = self.call("PATCH", path + query, definition, kind="application/apply-patch+yaml")
        assert answer.status in (200, 201), answer.message
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not self._is_established(path):
            assert time.monotonic() < deadline, f"{path} is not served"
            time.sleep(0.1)

    def _is_established(self, path: str) -> bool:
        conditions = self.call("GET", path).body["status"]["conditions"] or []  # null at first
        return any(one["type"] == "Established" and one["status"] == "True" for one in conditions)

    def _answers(self) -> bool:
        try:
            return self.call("GET", "/apis/apiextensions.k8s.io/v1").status == 200
        except OSError:
            return False

    def _start(self, stack: ExitStack, log: Path, program: str, *options: str) -> subprocess.Popen[bytes]:
        output = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            [self._programs / program, *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        return process


def _credentials(folder: Path, port: int) -> list[str]:
    """The server's options for its own key, and for ours, which may do anything; each vouches for itself."""
    subjects = {"server": "/CN=server", "client": "/O=system:masters/CN=test"}
    for name, subject in subjects.items():
        command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -addext subjectAltName=IP:127.0.0.1".split()
        files = ["-keyout", folder / f"{name}.key", "-out", folder / f"{name}.crt"]
        subprocess.run([*command, "-subj", subject, *files], check=True, capture_output=True, timeout=60)
    address = f"https://127.0.0.1:{port}"
    of_client = {"client-certificate": str(folder / "client.crt"), "client-key": str(folder / "client.key")}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "own", "cluster": {"server": address, "certificate-authority": str(folder / "server.crt")}}
        ],
        "users": [{"name": "own", "user": of_client}],
        "contexts": [{"name": "own", "context": {"cluster": "own", "user": "own"}}],
        "current-context": "own",
    }
    itself = folder / "config.json"
    itself.write_text(json.dumps(config))
    return [
        f"--tls-cert-file={folder / 'server.crt'}",
        f"--tls-private-key-file={folder / 'server.key'}",
        f"--client-ca-file={folder / 'client.crt'}",
        f"--kubeconfig={itself}",
        f"--authentication-kubeconfig={itself}",
        f"--authorization-kubeconfig={itself}",
        "--authentication-skip-lookup",
    ]


def _client_context(folder: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(folder / "server.crt"))
    context.load_cert_chain(folder / "client.crt", folder / "client.key")
    return context


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
