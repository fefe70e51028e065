"""Keep a local Ray head running, for jobs that are submitted from another terminal: `python cluster/local_head.py`.

Ctrl-C ends it and everything in it. Each start has ports and a token of its own; nothing is written outside of its
temporary folder.
"""

from __future__ import annotations

import argparse
import sys

from rayloom.jobs.local_head import LocalHead


def main() -> None:
    """Start, say how to reach it, wait."""
    parser = argparse.ArgumentParser(description="A local Ray head, until Ctrl-C.")
    parser.add_argument("--num-cpus", type=int, help="CPUs that Ray hands out; by default those of the machine")
    options = parser.parse_args()
    try:
        with LocalHead(num_cpus=options.num_cpus) as head:
            print(f"Ray is ready; dashboard: {head.address}. In the terminal that submits jobs:\n")
            for name, value in head.environment.items():
                print(f"export {name}={value}")
            print(f"\nTo see its metrics: python cluster/monitoring.py --ray-folder {head.folder}")
            print("\nCtrl-C ends it.", flush=True)
            sys.exit(f"the head ended by itself, with exit status {head.wait()}")
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
