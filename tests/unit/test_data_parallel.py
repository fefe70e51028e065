"""Ray Train's controller gets on without torch; the process group is the workers'."""

import socket
import subprocess
import sys

CHECK = """
import pickle, sys
from rayloom.train.data_parallel import ProcessGroupConfig, StreamDataParallelTrainer
config = pickle.loads(pickle.dumps(ProcessGroupConfig("gloo", 60, threads=2)))
config.backend_cls()
assert config.to_dict() == {"collectives": "gloo", "timeout_seconds": 60, "threads": 2}
trainer = StreamDataParallelTrainer(print, backend_config=config, monitor=None, own_cluster=True)
names = [type(one).__name__ for one in trainer._create_default_callbacks()]
assert "BackendSetupCallback" in names, names
assert not {"DatasetsCallback", "PlacementGroupCleanerCallback"} & set(names), names
print(sorted({"torch", "transformers", "peft"} & set(sys.modules)))
"""


def test_what_the_controller_loads_does_without_torch():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_rank_0_is_found_at_a_free_port():
    from rayloom.train.data_parallel import _free_address

    address, port = _free_address()
    with socket.socket() as own:
        own.bind((address, port))  # nobody holds it


def test_the_interface_of_an_address():
    from rayloom.train.data_parallel import _interface_of

    assert _interface_of("127.0.0.1") == "lo"
    assert _interface_of("198.18.73.1") is None  # of a range that is set aside for tests
