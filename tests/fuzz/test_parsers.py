"""Honest files, made hostile: every parser gives a result or a plain refusal. `coverage_guided.py` looks for longer."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS


@cache
def seeds_of(name: str) -> list[bytes]:
    return TARGETS[name].seeds()


@pytest.fixture(autouse=True, scope="module")
def offline() -> Iterator[None]:
    """Names in hostile recipes are looked for in no hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.mark.parametrize("name", TARGETS)
def test_honest_bytes_are_read(name: str) -> None:
    for seed in seeds_of(name):
        TARGETS[name].survives(seed)
    TARGETS[name].read(seeds_of(name)[-1])


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_hostile_bytes_give_a_result_or_a_plain_refusal(name: str, data: st.DataObject) -> None:
    def pick(options: Sequence[Any]) -> Any:
        return options[data.draw(st.integers(0, len(options) - 1))]

    mutated = pick(seeds_of(name))
    for _ in range(pick((1, 2, 3))):
        mutated = TARGETS[name].mutation(mutated, pick)
    TARGETS[name].survives(mutated)
