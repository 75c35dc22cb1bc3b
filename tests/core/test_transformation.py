"""The contract of transformations: seeds of a step, and what a class must define."""

import pytest

from regraft.core.patch import Outline
from regraft.core.transformation import Params, Run, Transformation


def test_a_step_gets_seeds_that_depend_on_seed_step_and_name_alone():
    seeds = {Run(step, seed=seed).seed_for(name) for step in ("a", "b") for seed in (0, 1) for name in ("x", "y")}
    assert len(seeds) == 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert Run("a", seed=1, device="cuda").seed_for("x") == Run("a", seed=1).seed_for("x")
    assert Run("a").tell("a line") is None


def test_a_transformation_must_plan_and_apply():
    class Incomplete(Transformation[Params]):
        def plan(self, checkpoint, params):
            return Outline()

    with pytest.raises(TypeError, match="apply"):
        Incomplete()
