"""A server that speaks the S3 protocol, for tests: moto's, in a process of its own, with everything in its memory."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

BUCKET = "loom"


class StorageServer(NamedTuple):
    """A server that runs."""

    endpoint: str
    process: subprocess.Popen[bytes]


@contextmanager
def storage_server(log: Path) -> Iterator[StorageServer]:
    """The server has one bucket, and this process has its keys until the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            _wait(port, server, log)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", endpoint)
                patch.setenv("AWS_ACCESS_KEY_ID", "key-of-a-test")
                patch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-a-test")
                patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
                import s3fs

                s3fs.S3FileSystem.clear_instance_cache()  # made with another test's endpoint
                s3fs.S3FileSystem().mkdir(BUCKET)
                yield StorageServer(endpoint, server)
                s3fs.S3FileSystem.clear_instance_cache()
        finally:
            server.terminate()


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
