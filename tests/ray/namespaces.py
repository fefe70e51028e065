"""Two network namespaces with a link between them that can be cut: machines, for all that Ray can see."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

ADDRESSES = ("198.18.73.1", "198.18.73.2")  # of a range that is set aside for tests; nobody outside sees them
_ENDS = ("rayloom-a", "rayloom-b")
_LONGEST = "1800"  # seconds, after which what holds a namespace ends by itself, whoever was killed
_SECONDS = 10.0


class NotPermittedError(Exception):
    """This machine lets us make no network namespaces; says why."""


class Network:
    """Two network namespaces and the link between them. Nothing in them sees this machine's own network.

        with Network() as network:
            subprocess.Popen([*network.enter(0), "ray", "start", ...])
            network.cut()

    In the end everything that runs in them is killed, with which they and their link are gone.

    Raises:
        NotPermittedError: when it is entered.
    """

    def __init__(self) -> None:
        self._holders: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for holder in self._holders:
            deadline = time.monotonic() + _SECONDS
            while others := _processes_beside(holder.pid):  # more than once: they start each other
                assert time.monotonic() < deadline, f"cannot be killed: {others}"
                for process in others:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                time.sleep(0.05)
            holder.kill()
            holder.wait()
        self._holders.clear()

    def enter(self, side: int) -> list[str]:
        """What a command begins with that runs in one of the two namespaces."""
        return ["nsenter", f"--net=/proc/{self._holders[side].pid}/ns/net"]

    def cut(self) -> None:
        """From now on nothing arrives on either side, and nobody is told: no connection is closed."""
        self._ip(1, "link", "set", _ENDS[1], "down")

    def mend(self) -> None:
        self._ip(1, "link", "set", _ENDS[1], "up")

    def _make(self) -> None:
        if missing := [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]:
            raise NotPermittedError(f"needs {', '.join(missing)}, of util-linux and iproute2")
        for _ in ADDRESSES:
            self._holders.append(
                subprocess.Popen(
                    ["unshare", "--net", "sleep", _LONGEST], stderr=subprocess.PIPE, start_new_session=True
                )
            )
            self._wait_until_apart(self._holders[-1])
        first, second = _ENDS
        self._ip(0, "link", "add", first, "type", "veth", "peer", "name", second, "netns", str(self._holders[1].pid))
        for side, (end, address) in enumerate(zip(_ENDS, ADDRESSES, strict=True)):
            self._ip(side, "address", "add", f"{address}/30", "dev", end)
            self._ip(side, "link", "set", "lo", "up")
            self._ip(side, "link", "set", end, "up")

    @staticmethod
    def _wait_until_apart(holder: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _SECONDS
        while _namespace(holder.pid) == _namespace(os.getpid()):
            if holder.poll() is not None:
                assert holder.stderr is not None
                raise NotPermittedError(holder.stderr.read().decode().strip())
            assert time.monotonic() < deadline, "unshare does not begin"
            time.sleep(0.01)

    def _ip(self, side: int, *arguments: str) -> None:
        done = subprocess.run(
            [*self.enter(side), "ip", *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if done.returncode:
            raise NotPermittedError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _namespace(process: int) -> str:
    try:
        return os.readlink(f"/proc/{process}/ns/net")
    except OSError:
        return ""


def _processes_beside(holder: int) -> list[int]:
    """All other processes of its network namespace; none where it is still in ours."""
    own = _namespace(holder)
    if own in ("", _namespace(os.getpid())):
        return []
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [number for number in numbers if number != holder and _namespace(number) == own]
