"""What several commands take."""

from __future__ import annotations

import click

JOB_FILE = click.argument("job_file", metavar="JOB.yaml", type=click.Path())
OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
ADDRESS = click.option(
    "--address",
    metavar="URL",
    help="The cluster's dashboard, such as http://HOST:8265. Default: RAY_API_SERVER_ADDRESS.",
)
