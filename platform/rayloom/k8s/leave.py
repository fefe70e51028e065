"""What a worker's pod does before it ends: `python -m rayloom.k8s.leave --seconds 540`, as its preStop hook.

Kubernetes takes a pod away with a notice and a grace period; Ray does not hear the notice. This tells Ray that the node
will be taken away, which makes Rayloom save a checkpoint and move, and returns when the node has left or the time is
over.
"""

from __future__ import annotations

import argparse
import os
import time

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import RayError

_PREEMPTION = 2  # autoscaler.proto: DRAIN_NODE_REASON_PREEMPTION
_ALIVE = 0  # gcs.proto: GcsNodeInfo.ALIVE
_ANSWER_SECONDS = 15.0
_POLL_SECONDS = 1.0


def leave(address: str, node_id: str, seconds: float) -> bool:
    """Drain a node and wait for its end.

    Args:
        address: of the cluster's GCS, `HOST:PORT`.
        node_id: in hexadecimal.
        seconds: until the node is gone, whatever still runs on it.

    Returns:
        Whether Ray has let the node go in that time.

    Raises:
        RayError: the head does not answer; it is gone, and the job with it.
    """
    gcs = GcsClient(address)
    deadline = time.time() + seconds
    gcs.drain_node(node_id, _PREEMPTION, "the pod is being deleted", int(1000 * deadline), timeout=_ANSWER_SECONDS)
    while time.time() < deadline:
        if node_id not in _living(gcs):
            return True
        time.sleep(_POLL_SECONDS)
    return False


def own_node(address: str) -> str | None:
    """The node that runs under this machine's address; None: there is none.

    Raises:
        RayError: the head does not answer.
    """
    ip = ray.util.get_node_ip_address()
    return next((node_id for node_id, place in _living(GcsClient(address)).items() if place == ip), None)


def _living(gcs: GcsClient) -> dict[str, str]:
    """Address of each living node by its id."""
    nodes = gcs.get_all_node_info(timeout=_ANSWER_SECONDS)
    return {key.hex(): info.node_manager_address for key, info in nodes.items() if info.state == _ALIVE}


def main() -> None:
    """The hook. It never fails: a pod that is ending has nobody to tell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, required=True)
    seconds = parser.parse_args().seconds
    address = os.environ["RAY_ADDRESS"]
    try:
        if node_id := own_node(address):
            leave(address, node_id, seconds)
    except RayError as error:
        print(f"the head at {address} does not answer: {error}")


if __name__ == "__main__":
    main()
