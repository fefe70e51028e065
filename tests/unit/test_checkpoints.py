"""Ray Train's list of checkpoints, which it does not write atomically."""

from __future__ import annotations

import pytest

from rayloom.train.checkpoints import SNAPSHOT, keep_snapshot, mend_snapshot


@pytest.mark.parametrize("broken", ["", '{"checkpoint_results": [', "\x00" * 40])
def test_a_list_that_broke_off_is_replaced_by_the_one_before(tmp_path, broken):
    (tmp_path / SNAPSHOT).write_text('{"n": 1}')
    keep_snapshot(tmp_path)
    (tmp_path / SNAPSHOT).write_text(broken)
    keep_snapshot(tmp_path)  # what is broken does not replace what is whole
    mend_snapshot(tmp_path)
    assert (tmp_path / SNAPSHOT).read_text() == '{"n": 1}'


def test_a_whole_list_stays(tmp_path):
    (tmp_path / SNAPSHOT).write_text('{"n": 1}')
    keep_snapshot(tmp_path)
    (tmp_path / SNAPSHOT).write_text('{"n": 2}')
    mend_snapshot(tmp_path)
    assert (tmp_path / SNAPSHOT).read_text() == '{"n": 2}'


def test_nothing_there(tmp_path):
    keep_snapshot(tmp_path)
    mend_snapshot(tmp_path)
    assert not [*tmp_path.iterdir()]
    (tmp_path / SNAPSHOT).write_text("{")
    mend_snapshot(tmp_path)  # nothing was kept: Ray Train says what is wrong with it
    assert (tmp_path / SNAPSHOT).read_text() == "{"
