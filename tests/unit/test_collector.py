"""The collector is off within, and as it was afterwards."""

import gc

import pytest

from rayloom.collector import collector_off


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_off_within_and_as_before_afterwards(was_on):
    gc.enable() if was_on else gc.disable()
    try:
        with collector_off():
            assert not gc.isenabled()
        assert gc.isenabled() == was_on
        assert gc.get_freeze_count() > 0
        with pytest.raises(ZeroDivisionError), collector_off():
            raise ZeroDivisionError
        assert gc.isenabled() == was_on
    finally:
        gc.enable()
        gc.unfreeze()
