"""Every parser of files that strangers make, as a function of bytes: see `contract` for what each promises."""

from __future__ import annotations

from tests.fuzz import adapters, checkpoints, data, recipes, records, tokenizers
from tests.fuzz.contract import Target

FAMILIES = (checkpoints, recipes, adapters, tokenizers, data, records)

TARGETS = {one.name: one for family in FAMILIES for one in vars(family).values() if isinstance(one, Target)}
"""By name of the format."""
