"""Which device computes."""

import pytest

from regraft.core.devices import check_device, resolve_device
from regraft.core.errors import ResourceError, UsageError


@pytest.mark.parametrize("wish", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CUDA", "", "cuda:0:1", "cuda:99999"])
def test_what_names_no_device(wish):
    with pytest.raises(UsageError) as caught:
        resolve_device(wish)
    assert caught.value.found == wish


@pytest.fixture
def machine(monkeypatch):
    import torch

    def with_devices(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return with_devices


def test_devices_that_are_there(machine):
    machine(2)
    assert [resolve_device(wish) for wish in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda:0", "cpu", "cuda:0", "cuda:1"]
    machine(0)
    assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize(("count", "wish", "found"), [(0, "cuda", "0 CUDA devices"), (1, "cuda:1", "cuda:0 alone")])
def test_devices_that_are_not(count, wish, found, machine):
    check_device(wish)
    machine(count)
    with pytest.raises(ResourceError) as caught:
        resolve_device(wish)
    assert caught.value.found == found


def test_every_process_takes_the_device_of_its_own(machine):
    machine(2)
    assert [resolve_device(wish, own=1) for wish in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(UsageError, match="a device each"):
        resolve_device("cuda:0", own=1)
    with pytest.raises(ResourceError, match="no such device"):
        resolve_device("auto", own=2)
    machine(0)
    assert resolve_device("auto", own=1) == "cpu"
