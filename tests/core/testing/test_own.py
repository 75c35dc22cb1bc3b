"""Our own transformations that work on weights alone conform, with their own examples.

Those that run a model conform too, which takes longer: `regraft plugins check regraft`.
"""

import pytest

from regraft.core.host import host
from regraft.core.testing.conformance.processes import probe
from regraft.core.testing.conformance.subject import Subject
from regraft.core.testing.conformance.suite import CHECKS

NAMES = ("context-extension", "grow", "lora-merge", "patch", "steer", "vlora")


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    kinds = host().transformations()
    made = {
        name: Subject(
            kinds[name], tmp_path_factory.mktemp(name), families=("llama",), neighbours=("steer", "lora-merge")
        )
        for name in NAMES
    }
    probe(list(made.values()))
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_it_conforms(subjects, check, name):
    outcome = check.run(subjects[name])
    if outcome.status == "not applicable":
        pytest.skip(outcome.message)
    assert outcome.status == "passed", outcome.message
