"""Which process this is, by the variables of torchrun, and what one does alone."""

import pytest

from regraft.core.errors import UsageError
from regraft.core.processes import DONE, Processes, processes
from tests.helpers import run_python

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_of_the_environment():
    assert processes({}) == processes({"WORLD_SIZE": "1", "RANK": "0"}) == Processes()
    assert processes(TORCHRUN) == Processes(3, 4, 1)
    assert processes({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}) == Processes(3, 4, 1, 2)
    assert not processes(TORCHRUN).first


@pytest.mark.parametrize("change", [{"RANK": "4"}, {"RANK": "x"}, {"WORLD_SIZE": "many"}, {"RANK": None},
                                    {"MASTER_ADDR": None}, {"LOCAL_RANK": "y"},
                                    {"LOCAL_WORLD_SIZE": "z"}])  # fmt: skip
def test_a_contradiction(change):
    variables = {key: value for key, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(UsageError, match="does not say which process this is") as caught:
        processes(variables)
    assert "torchrun" in caught.value.remedy


def test_alone_there_is_nobody_to_wait_for():
    alone = Processes()
    alone.announce(DONE)
    alone.wait(DONE)
    alone.part()
    assert alone.ending(5) == (True, 5)


TALK = """
    import os, sys, threading
    from datetime import timedelta
    from torch.distributed import HashStore
    from regraft.core import processes as module

    shared = HashStore()
    module.store = lambda: shared
    first, second = module.Processes(0, 2, 0), module.Processes(1, 2, 1)
    second_waits = threading.Thread(target=lambda: (second.wait("ready"), print("heard"), second.part()))
    second_waits.start()
    first.announce("ready")
    first.part()
    second_waits.join()
    print(second.ending(3), first.ending(4))
    try:
        first.wait("never")
    except module.Ended as ended:
        print("ended", ended.code)
"""


def test_the_first_to_fail_speaks_and_decides_the_code():
    assert run_python(TALK).splitlines() == ["heard", "(True, 3) (False, 3)", "ended 3"]
