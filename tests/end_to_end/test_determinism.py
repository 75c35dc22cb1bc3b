"""The same bytes, lock file and model card included, whatever PYTHONHASHSEED, thread count or place."""

import os
import subprocess
import sys
from shutil import copytree

import pytest

from tests.adapters import write_adapter
from tests.running import ABF, tree, write_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """A recipe with a change of config, a merge and a cast; its embeddings are read in several chunks."""
    folder = tmp_path_factory.mktemp("determinism")
    copytree(tiny_folder("llama", vocab_size=12_000), folder / "base")
    write_adapter(folder / "adapter", modules=("self_attn.q_proj", "self_attn.o_proj"))
    merge = {"use": "lora-merge", "adapter": "adapter"}
    write_recipe(folder / "recipe.toml", "base", ABF, merge, dtype="bfloat16", shard_size="400KB")
    return folder


def apply(place, output, *options, seed):
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    command = [sys.executable, "-m", "regraft", "apply", place / "recipe.toml", "--output", output, "--no-durable"]
    ran = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return tree(output)


@pytest.mark.slow
def test_hash_seeds_threads_and_places(place, tmp_path_factory):
    """Five hash seeds, one and two threads, and one run of copied inputs in another folder."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "deep" / "down"
    copytree(place, elsewhere)
    first = apply(place, place / "out-0", "--threads", "1", seed=0)
    assert len(first) > 10
    assert "regraft.lock.json" in first
    for seed in (1, 2, 3):
        assert apply(place, place / f"out-{seed}", "--threads", str(1 + seed % 2), seed=seed) == first
    assert apply(elsewhere, elsewhere / "out-of-the-way", "--threads", "2", seed=4242) == first
