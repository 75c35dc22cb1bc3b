"""Tiny checkpoints that many tests read; a test that changes one takes a copy."""

import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.families import save_tiny

os.environ["REGRAFT_CACHE_SIZE"] = "0"
"""No results of steps from one test in another, nor in the second of two runs that a test compares."""

torch.set_num_threads(1)
"""As in the processes that tests start, whose results they compare with those of this one."""

settings.register_profile("regraft", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("regraft")
"""How fast a busy machine generates inputs says nothing of the code; the deadline of every example stays."""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Called with a family (and options of `save_tiny`), the folder of its tiny checkpoint; made once, read only."""
    made = {}

    def folder(family="llama", **options):
        key = (family, *sorted(options.items()))
        if key not in made:
            settings = {"shards": "60KB", "tokenizer": True, **options}
            made[key] = save_tiny(family, tmp_path_factory.mktemp("tiny") / family, **settings)
        return made[key]

    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny_folder):
    """A current folder with a copy of the tiny llama in `base`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder("llama"), "base")
    return tmp_path
