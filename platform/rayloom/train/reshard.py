"""DeepSpeed's checkpoint of one number of workers, made over for another.

    every rank's flat pieces -> the whole tensors -> the pieces of the new ranks

DeepSpeed has a universal checkpoint for this, which knows Adam's state alone and, under ZeRO-3, gives all groups of
parameters the first one's weight decay. Here any state goes that has a number for each weight; the rest of the files,
and how they are loaded, stays DeepSpeed's. Each rank writes its own two files into a folder of its own, where
everything else is a link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from rayloom.errors import JobError

_ALIGNMENT = 2
"""ZeRO 1 and 2 make a piece's length a multiple of this."""
_SUB_GROUP = 1e9
"""DeepSpeed's own `zero_optimization.sub_group_size`."""
_OPTIMIZER, _MODEL = "optim_states.pt", "model_states.pt"

Pieces = list[torch.Tensor]


def fitting_checkpoint(folder: Path, target: Path, rank: int, workers: int, config: dict[str, Any]) -> Path:
    """`folder`, if its DeepSpeed state is of so many workers; else `target`, made for rank `rank` of `workers`.

    Args:
        config: what the engine has been given.

    Raises:
        JobError: an optimizer's state that cannot be cut anew.
    """
    (tag,) = (path for path in folder.glob("global_step*") if path.is_dir())
    before = len(list(tag.glob(f"*_{_OPTIMIZER}")))
    if before == workers:
        return folder
    zero = config.get("zero_optimization", {})
    if zero.get("round_robin_gradients"):
        raise _refusal(before, "zero_optimization.round_robin_gradients lays weights out by the number of workers")
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path != tag and not (target / path.name).exists():
            (target / path.name).symlink_to(path.absolute())
    (target / tag.name).mkdir(exist_ok=True)
    states = [_read(_file(tag, number, _OPTIMIZER)) for number in range(before)]
    model_file = _file(tag, 0, _MODEL)
    model = _read(model_file)
    parts = [state["optimizer_state_dict"] for state in states]
    if int(parts[0]["zero_stage"]) == 3:
        numels = [[shape.numel() for shape in group.values()] for group in model["param_shapes"]]
        made = _stage3(parts, numels, rank, workers, int(zero.get("sub_group_size", _SUB_GROUP)))
    else:
        made = _stage12(parts, rank, workers)
    torch.save({**states[0], "optimizer_state_dict": made}, target / tag.name / _name(tag, rank, _OPTIMIZER))
    torch.save({**model, "dp_world_size": workers}, target / tag.name / _name(tag, rank, _MODEL))
    return target


# --- ZeRO 1 and 2: a group's weights one after the other, cut into equal pieces -------------------------------------


def recut(pieces: Pieces, total: int, rank: int, workers: int) -> torch.Tensor:
    """The piece of one of `workers`: equal pieces, of which the first `total` numbers count, and zeros behind them."""
    length = -(-total // (_ALIGNMENT * workers)) * _ALIGNMENT
    piece = _span(pieces, min(total, rank * length), min(total, (rank + 1) * length))
    return torch.cat([piece, piece.new_zeros(length - len(piece))])


def _span(pieces: Pieces, start: int, stop: int) -> torch.Tensor:
    """Numbers `start` to before `stop` of all pieces together. The rest of a file is not read."""
    found, before = [pieces[0][:0]], 0
    for piece in pieces:
        first, last = max(0, start - before), min(len(piece), stop - before)
        found.append(piece[first : max(first, last)])
        before += len(piece)
    return torch.cat(found)


def _stage12(parts: list[dict[str, Any]], rank: int, workers: int) -> dict[str, Any]:
    first, weights, paddings = parts[0], [], []
    optimizer = first["base_optimizer_state"]
    state: dict[int, dict[str, Any]] = {}
    for group in range(len(first["single_partition_of_fp32_groups"])):
        pieces = [part["single_partition_of_fp32_groups"][group] for part in parts]  # without their padding
        total = sum(map(len, pieces))
        piece = recut(pieces, total, rank, workers)
        own = max(0, min(len(piece), total - rank * len(piece)))
        weights.append(piece[:own])
        paddings.append(len(piece) - own)
        lengths = [len(piece) + int(part["group_paddings"][group]) for piece, part in zip(pieces, parts, strict=True)]
        states = [part["base_optimizer_state"]["state"][group] for part in parts]
        state[group] = {
            key: recut([one[key] for one in states], total, rank, workers) if is_cut else states[0][key]
            for key, is_cut in _which_are_cut(states, lengths)
        }
    return {
        **first,
        "base_optimizer_state": {**optimizer, "state": state},
        "single_partition_of_fp32_groups": weights,
        "group_paddings": paddings,
        "partition_count": [workers] * len(weights),
        "param_slice_mappings": None,  # for other tools; DeepSpeed makes its own
    }


# --- ZeRO 3: each weight is cut into equal pieces of its own, and some weights' pieces make a sub-group -------------


def recut_each(pieces: Pieces, numels: Sequence[int], rank: int, workers: int) -> Pieces:
    """For each weight the piece of one of `workers`, with zeros where a weight has no more numbers.

    Args:
        pieces: of each old rank its pieces of all weights, one after the other.
        numels: of each weight, how many numbers it has.
    """
    found, start = [], 0
    for numel in numels:
        before, length = -(-numel // len(pieces)), -(-numel // workers)
        whole = torch.cat([piece[start : start + before] for piece in pieces])[:numel]
        piece = whole[rank * length : (rank + 1) * length]
        found.append(torch.cat([piece, piece.new_zeros(length - len(piece))]))
        start += before
    return found


def sub_groups(numels: Sequence[int], workers: int, most: int) -> list[int]:
    """How many weights there are in each sub-group, as DeepSpeed fills them: to `most` numbers of a rank and over."""
    counts, count, size = [], 0, 0
    for number, numel in enumerate(numels):
        count, size = count + 1, size - (-numel // workers)
        if size >= most or number == len(numels) - 1:
            counts.append(count)
            count = size = 0
    return counts


def _stage3(parts: list[dict[str, Any]], numels: list[list[int]], rank: int, workers: int, most: int) -> dict[str, Any]:
    """`numels`: of each weight of each sub-group."""
    optimizer = parts[0]["optimizer_state_dict"]
    flat: Pieces = []
    state: dict[int, dict[str, Any]] = {}
    groups = []
    for group in optimizer["param_groups"]:
        subs = group["params"]
        counts = sub_groups([numel for sub in subs for numel in numels[sub]], workers, most)

        def regroup(of: Callable[[dict[str, Any], int], Any], subs: list[int] = subs, to: list[int] = counts) -> Pieces:
            weights = iter(
                [w for sub in subs for w in recut_each([of(part, sub) for part in parts], numels[sub], rank, workers)]
            )
            return [torch.cat([next(weights) for _ in range(count)]) for count in to]

        made = regroup(lambda part, sub: part["fp32_flat_groups"][sub])
        numbers = list(range(len(flat), len(flat) + len(made)))
        flat += made
        states = [part["optimizer_state_dict"]["state"][subs[0]] for part in parts]
        lengths = [len(part["fp32_flat_groups"][subs[0]]) for part in parts]
        cut = dict(_which_are_cut(states, lengths))
        of_group = {key: regroup(_of_state(key)) for key, is_cut in cut.items() if is_cut}
        for place, number in enumerate(numbers):
            # A copy of what is no piece: an optimizer counts its steps in place, of each sub-group.
            state[number] = {key: of_group[key][place] if key in of_group else deepcopy(states[0][key]) for key in cut}
        groups.append({**group, "params": numbers})
    return {
        **parts[0],
        "optimizer_state_dict": {**optimizer, "state": state, "param_groups": groups},
        "fp32_flat_groups": flat,
        "partition_count": workers,
    }


def _of_state(key: str) -> Callable[[dict[str, Any], int], Any]:
    return lambda part, sub: part["optimizer_state_dict"]["state"][sub][key]


# --- what both have in common ---------------------------------------------------------------------------------------


def _which_are_cut(states: list[dict[str, Any]], lengths: Sequence[int]) -> Iterator[tuple[str, bool]]:
    """Of an optimizer's state of a group whether it has a number for each weight, or is the same on every rank.

    Args:
        lengths: of each old rank's piece.

    Raises:
        JobError: neither.
    """
    for key, value in states[0].items():
        is_cut = torch.is_tensor(value) and value.dim() > 0
        if is_cut and [tuple(state[key].shape) for state in states] != [(length,) for length in lengths]:
            raise _refusal(len(lengths), f"the optimizer's {key} has not one number for each weight")
        yield key, is_cut


def _refusal(before: int, why: str) -> JobError:
    return JobError(
        f"resume: the checkpoint is DeepSpeed's state of {before} workers and cannot be made over for others: {why}; "
        f"resume with train.workers={before}"
    )


def _file(tag: Path, rank: int, kind: str) -> Path:
    """A rank's file; of ZeRO 1 and 2 there is one of the model for all."""
    (found,) = [*tag.glob(f"*zero_pp_rank_{rank}_mp_rank_00_{kind}")] or tag.glob(f"mp_rank_00_{kind}")
    return found


def _name(tag: Path, rank: int, kind: str) -> str:
    return _file(tag, 0, kind).name.replace("_rank_0_mp", f"_rank_{rank}_mp")


def _read(file: Path) -> dict[str, Any]:
    """What is in a file; tensors are read where they are used."""
    return dict(torch.load(file, map_location="cpu", mmap=True, weights_only=False))
