"""A trial of a population goes on from another one's checkpoint: as a job that is resumed in a copy of its directory.

<search>/population/TRIAL/N/RUNG/       pins (`rayloom.train.pins`) of a trial's checkpoints at the rungs that are not
                                        decided; N: how often the trial has taken over
<search>/trials/.TRIAL.takeover-N/      a whole run directory, which takes the place of the trial's own

A rung is decided in this order: the directories are made, of links to a pin; then `search.json` says what was decided;
then pins are deleted. A trial puts a directory in its own one's place when `search.json` knows of it. So a search that
is killed at any time decides the same again, or finds what it has decided.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from rayloom.config.read import dump_job
from rayloom.search.plan import TRIALS, SearchPlan
from rayloom.search.population import exploits, taken_over
from rayloom.search.results import FAILED, Ledger
from rayloom.train.pins import link_tree, pinned_step

POPULATION = "population"


def pins_folder(search: Path, trial: str, number: int) -> Path:
    """Where a trial's checkpoints are pinned.

    Args:
        number: how often it has taken over.
    """
    return search / POPULATION / trial / str(number)


def decide(plan: SearchPlan, ledger: Ledger, rung: int) -> None:
    """Decide a rung in the ledger, which is not written here. The directories of those that take over are ready."""
    alive = {trial["name"]: trial for trial in ledger["trials"] if trial["status"] != FAILED}
    # In stage ppo checkpoints wait for the end of a round, so that all trials may have none at a rung.
    values = {name: trial["rungs"][str(rung)]["value"] for name, trial in alive.items() if str(rung) in trial["rungs"]}
    points = {name: trial["point"] for name, trial in alive.items()}
    decided = []
    for exploit in exploits(values, points, plan.entries, plan.search, rung):
        number = len(taken_over(ledger, exploit.trial)) + 1
        source = pins_folder(plan.folder, exploit.source, len(taken_over(ledger, exploit.source))) / str(rung)
        target = _place(plan.folder / TRIALS / exploit.trial, number)
        shutil.rmtree(target, ignore_errors=True)
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        link_tree(source, partial)
        job = plan.trial_job(exploit.trial, exploit.point)
        (partial / "job.yaml").write_text(dump_job(job), encoding="utf-8")
        partial.rename(target)
        decided.append((exploit, pinned_step(source)))
    for exploit, step in decided:
        record, new = alive[exploit.trial], plan.values(exploit.point)
        ledger["exploits"].append(
            {"trial": exploit.trial, "from": exploit.source, "rung": rung, "step": step}
            | {"old": record["values"], "new": new}
        )
        record |= {"point": exploit.point, "values": new, "passed": rung}
        record["rungs"] = {key: value for key, value in record["rungs"].items() if int(key) <= rung}
    ledger["decided"] = rung


def forget_pins(search: Path, rung: int) -> None:
    """Delete the pins of what is decided."""
    for pin in (search / POPULATION).glob("*/*/*"):
        if pin.name.isdecimal() and int(pin.name) <= rung:
            shutil.rmtree(pin, ignore_errors=True)


def is_ordered(run: Path, ledger: Ledger) -> bool:
    """Whether a trial has to take over, and has not yet.

    Args:
        run: its run directory.
    """
    number = len(taken_over(ledger, run.name))
    return number > 0 and _place(run, number).exists()


def take_over(run: Path, ledger: Ledger) -> None:
    """Put the directory that was decided on in the place of a trial's own, if it has not been done. The trial's job has
    ended."""
    if not is_ordered(run, ledger):
        return
    aside = run.with_name(f".{run.name}.before")
    shutil.rmtree(aside, ignore_errors=True)
    if run.exists():
        run.rename(aside)
    _place(run, len(taken_over(ledger, run.name))).rename(run)
    shutil.rmtree(aside, ignore_errors=True)


def _place(run: Path, number: int) -> Path:
    return run.with_name(f".{run.name}.takeover-{number}")
