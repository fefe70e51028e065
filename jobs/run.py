"""Entry point of `ray job submit --working-dir . -- python jobs/run.py jobs/FILE.yaml [KEY=VALUE]...`.

Runs what `rayloom train` runs, with the same exit statuses. Rayloom is taken from this checkout, so the cluster needs
its dependencies but not Rayloom itself.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

from rayloom.cli import main
from rayloom.jobs.entrypoint import lasting_arguments

if __name__ == "__main__":
    arguments, notes = lasting_arguments(sys.argv[1:], os.environ)
    for note in notes:
        print(f"note: {note}", flush=True)
    sys.argv = ["rayloom", "train", *arguments]
    main()
