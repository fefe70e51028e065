"""DeepSpeed's state of one number of workers made over for another: each weight keeps its numbers."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayloom.errors import JobError
from rayloom.train.reshard import fitting_checkpoint, recut, recut_each, sub_groups

TAG = "global_step7"


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5))
def test_a_flat_group_is_cut_anew(total: int, before: int, after: int):
    whole = torch.arange(1.0, total + 1)
    old = [recut([whole], total, rank, before) for rank in range(before)]
    assert len({len(piece) for piece in old}) == 1
    assert len(old[0]) % 2 == 0
    new = [recut(old, total, rank, after) for rank in range(after)]
    joined = torch.cat(new)
    assert torch.equal(joined[:total], whole)
    assert not joined[total:].any()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 5))
def test_each_weight_is_cut_anew(numels: list[int], before: int, after: int):
    weights = [torch.arange(1.0, numel + 1) + 100 * number for number, numel in enumerate(numels)]
    whole = torch.cat(weights)
    old = [torch.cat(recut_each([whole], numels, rank, before)) for rank in range(before)]
    new = [recut_each(old, numels, rank, after) for rank in range(after)]
    for number, weight in enumerate(weights):
        joined = torch.cat([pieces[number] for pieces in new])
        assert torch.equal(joined[: len(weight)], weight)
        assert len(joined) - len(weight) < after


def test_sub_groups_are_filled_as_deepspeed_fills_them():
    assert sub_groups([10, 10, 10, 4], 1, 20) == [2, 2]
    assert sub_groups([10, 10, 10, 4], 2, 20) == [4]
    assert sub_groups([50, 1], 1, 20) == [1, 1]
    assert sub_groups([3], 4, 20) == [1]


# --- whole checkpoints ----------------------------------------------------------------------------------------------

SHAPES = [[(3, 5), (7,)], [(4,), (1,), (2, 3)]]  # of two groups' weights
HYPER = [{"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.1, "weight_decay": 0.0}]


def whole_state() -> list[dict[str, list[torch.Tensor]]]:
    """Of each group and kind of number the weights' numbers."""
    torch.manual_seed(0)
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    return [{kind: [torch.randn(torch.Size(shape).numel()) for shape in group] for kind in kinds} for group in SHAPES]


def write_stage2(folder: Path, workers: int, **more: Any) -> None:
    folder.joinpath(TAG).mkdir(parents=True)
    for rank in range(workers):
        state, weights, paddings = {}, [], []
        for number, group in enumerate(whole_state()):
            flat = {kind: torch.cat(numbers) for kind, numbers in group.items()}
            total = len(flat["weights"])
            length = -(-total // (2 * workers)) * 2
            pad = torch.nn.functional.pad
            cut = {
                kind: pad(numbers, (0, length * workers - total))[rank * length :][:length]
                for kind, numbers in flat.items()
            }
            padding = min(length, max(0, (rank + 1) * length - total))
            weights.append(cut.pop("weights")[: length - padding])
            paddings.append(padding)
            state[number] = {**cut, "step": torch.tensor(7.0), **more}
        groups = [{**hyper, "params": [number]} for number, hyper in enumerate(HYPER)]
        made = {
            "zero_stage": 2,
            "base_optimizer_state": {"state": state, "param_groups": groups},
            "single_partition_of_fp32_groups": weights,
            "group_paddings": paddings,
            "partition_count": [workers] * 2,
            "param_slice_mappings": None,
        }
        torch.save({"optimizer_state_dict": made}, folder / TAG / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save({"dp_world_size": workers, "module": 1}, folder / TAG / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text(TAG)


def write_stage3(folder: Path, workers: int, most: int = 10**9) -> None:
    """With sub-groups of at least `most` numbers."""
    folder.joinpath(TAG).mkdir(parents=True)
    for rank in range(workers):
        flat, state, groups, shapes = [], {}, [], []
        for number, group in enumerate(whole_state()):
            numels = [len(weight) for weight in group["weights"]]
            subs, start = [], 0
            for count in sub_groups(numels, workers, most):
                part = slice(start, start + count)
                start += count
                cut = {
                    kind: torch.cat(
                        [torch.nn.functional.pad(w, (0, -len(w) % workers)).chunk(workers)[rank] for w in weights[part]]
                    )
                    for kind, weights in group.items()
                }
                subs.append(len(flat))
                state[len(flat)] = {key: value for key, value in cut.items() if key != "weights"}
                state[len(flat)]["step"] = torch.tensor(7.0)
                flat.append(cut["weights"])
                shapes.append(OrderedDict((str(i), torch.Size(s)) for i, s in enumerate(SHAPES[number][part])))
            groups.append({**HYPER[number], "params": subs})
        made = {
            "zero_stage": 3,
            "optimizer_state_dict": {"state": state, "param_groups": groups},
            "fp32_flat_groups": flat,
            "partition_count": workers,
        }
        torch.save({"optimizer_state_dict": made}, folder / TAG / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        model = {"dp_world_size": workers, "param_shapes": shapes}
        torch.save(model, folder / TAG / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    (folder / "latest").write_text(TAG)


def same(one: Any, other: Any) -> bool:
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (3, 2), (2, 5)])
@pytest.mark.parametrize(("write", "options"), [(write_stage2, {}), (write_stage3, {}), (write_stage3, {"most": 9})])
def test_it_is_as_if_the_new_workers_had_written_it(tmp_path, before, after, write, options):
    write(tmp_path / "old", before, **options)
    write(tmp_path / "new", after, **options)
    (tmp_path / "old" / "stream.json").write_text("{}")
    config = {"zero_optimization": {"sub_group_size": options["most"]} if options else {}}
    for rank in range(after):
        target = fitting_checkpoint(tmp_path / "old", tmp_path / f"own{rank}", rank, after, config)
        assert (target / "stream.json").read_text() == "{}"
        assert (target / "latest").read_text() == TAG
        written = sorted((target / TAG).iterdir())
        assert len(written) == 2
        for file in written:
            found, expected = (
                torch.load(path, weights_only=False) for path in (file, tmp_path / "new" / TAG / file.name)
            )
            found.pop("param_shapes", None), expected.pop("param_shapes", None)
            assert same(found, expected), file.name
            if "optimizer_state_dict" in found and write is write_stage3:
                states = found["optimizer_state_dict"]["optimizer_state_dict"]["state"].values()
                assert len({state["step"].data_ptr() for state in states}) == len(states)  # each counts for itself


def test_what_fits_is_left_as_it_is(tmp_path):
    write_stage2(tmp_path / "old", 2)
    assert fitting_checkpoint(tmp_path / "old", tmp_path / "own", 1, 2, {}) == tmp_path / "old"
    assert not (tmp_path / "own").exists()


def test_what_cannot_be_cut_anew(tmp_path):
    write_stage2(tmp_path / "old", 2, absmax=torch.zeros(3))
    with pytest.raises(JobError, match=r"the optimizer's absmax has not one number .* resume with train.workers=2"):
        fitting_checkpoint(tmp_path / "old", tmp_path / "own", 0, 1, {})
    own = {"zero_optimization": {"round_robin_gradients": True}}
    with pytest.raises(JobError, match="round_robin_gradients lays weights out by the number of workers"):
        fitting_checkpoint(tmp_path / "old", tmp_path / "own", 0, 1, own)
