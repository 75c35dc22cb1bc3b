"""Two processes share out the files of an output: the same bytes as one process, whatever the transformation."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from regraft.core.demo import TINY
from regraft.core.layout import Shard, lay_out
from regraft.core.operations import Operation, ScaleRows
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.sources.folder import open_folder
from regraft.core.tensors import MemoryTensor
from regraft.core.together import fingerprint, shares
from tests.adapters import write_adapter
from tests.checkpoints import write_checkpoint
from tests.core.gguf.writing import write_model
from tests.families import save_tiny, tiny
from tests.plugins.vlora.generators import make_generator, save_features
from tests.running import ABF, done, tree, write_recipe

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.cli.each_recipe"]
LORA, STEER = {"use": "lora-merge", "adapter": "adapter"}, {"use": "steer", "vectors": "vectors.safetensors"}
SMALL = {"shard_size": "500KB"}
RECIPES = {
    "config": ([ABF], {}),
    "entropy-abf": ([{**ABF, "method": "entropy-abf"}], {}),
    "lora": ([LORA], {}),
    "lora-stochastic": ([{**LORA, "rounding": "stochastic"}], {}),
    "dora": ([{**LORA, "adapter": "dora"}], {}),
    "steer": ([STEER], {}),
    "prune": ([{"use": "prune", "score": "magnitude", "sparsity": 0.5}], {}),
    "grow": ([{"use": "grow", "layers": 8, "placement": "interpolate", "intermediate_size": 384, "heads": 8}], {}),
    "extend": ([{"use": "tokenizer-retrofit", "corpus": "story.txt", "size": 64, "min_count": 2}], {}),
    "trim": ([{"use": "tokenizer-retrofit", "vocabulary": "trim", "corpus": "story.txt"}], {}),
    "fourier": ([{"use": "fourier-head", "tokens": "0..9", "num_frequencies": 4}], {}),
    "patch": ([{"use": "patch", "path": "saved/steer.regraft"}], {}),
    "float16": ([], {"dtype": "float16"}),
    "float32": ([], {"dtype": "float32"}),
    "nf4": ([], {"quantize": "nf4", "shard_size": "200KB"}),
    "int8": ([], {"quantize": "int8"}),
    "chain": ([LORA, STEER, ABF], {"dtype": "float16"}),
}
"""On demo:tiny, which fits into five files of this size."""
TO_TRAIN = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "vocab_size": 8192,
            "max_position_embeddings": 64}  # fmt: skip
ACCIDENTS = ("full-first", "full-second", "unlike")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with every recipe, applied by one process into `one` and by two into `two`."""
    folder = tmp_path_factory.mktemp("together")
    before = Path.cwd()
    os.chdir(folder)
    try:
        _write(folder)
        names = sorted(path.stem for path in folder.glob("*.toml"))
        for name in names:
            done("apply", f"{name}.toml", "-o", f"one/{name}", "--no-durable")
        for name in ACCIDENTS:
            write_recipe(folder / f"{name}.toml", "demo:tiny", LORA, STEER, **SMALL)
    finally:
        os.chdir(before)
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back at once, so that peaks are those of tensors
    }
    ran = subprocess.run(
        [sys.executable, *TORCHRUN, folder], env=variables, capture_output=True, text=True, timeout=270, check=False
    )
    assert ran.returncode == 0, ran.stderr
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(folder=folder, ranks=ranks)


def _write(folder):
    modules = ("self_attn.q_proj", "self_attn.o_proj")
    write_adapter(folder / "adapter", modules=modules, layers=5, dims=(128, 128))
    write_adapter(folder / "dora", _dora(), use_dora=True)
    random = torch.Generator().manual_seed(1)
    vectors = {f"layers.{layer}.attn_out": 0.1 * torch.randn(128, generator=random) for layer in (1, 3)}
    save_file(vectors, folder / "vectors.safetensors")
    (folder / "story.txt").write_text((TINY.parents[2] / "recipes" / "ruth-and-jonah.txt").read_text())
    steer = write_recipe(folder / "steer.toml", "demo:tiny", STEER, **SMALL)
    done("apply", steer, "-o", "made", "--no-durable", "--save-patches", "saved")
    for name, (steps, output) in RECIPES.items():
        write_recipe(folder / f"{name}.toml", "demo:tiny", *steps, **{**SMALL, **output})
    base = save_tiny("llama", folder / "llama", num_hidden_layers=4)
    make_generator(base, folder / "generator", types="qkvom")
    save_features(folder / "features.safetensors")
    image = {"use": "vlora", "generator": "generator", "features": "features.safetensors", "output": "merged"}
    write_recipe(folder / "vlora.toml", "llama", image, shard_size="60KB")
    done("apply", "nf4.toml", "-o", "packed", "--no-durable")
    write_recipe(folder / "repacked.toml", "packed", {**LORA, "scale": 20}, shard_size="200KB", minimum_cosine=0.1)
    save_tiny("llama", folder / "to-train", dtype=torch.bfloat16, **TO_TRAIN)
    write_model(folder / "model.gguf", tiny("llama"), "Q8_0")
    write_recipe(folder / "gguf.toml", "model.gguf", dtype="float16", shard_size="30KB")


def _dora():
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    return {
        f"{prefix}.lora_A.weight": (2, 128),
        f"{prefix}.lora_B.weight": (128, 2),
        f"{prefix}.lora_magnitude_vector": (128,),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RECIPES, "vlora", "repacked", "gguf"])
def test_two_processes_write_what_one_writes(place, name):
    first, second = (rank[name] for rank in place.ranks)
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    one, two = place.folder / "one" / name, place.folder / "two" / name
    lock = json.loads((two / "regraft.lock.json").read_text())
    assert lock["environment"].pop("processes") == 2
    assert lock == json.loads((one / "regraft.lock.json").read_text())
    trees = [{file: digest for file, digest in tree(folder).items() if file != "regraft.lock.json"}
             for folder in (one, two)]  # fmt: skip
    assert trees[0] == trees[1]
    weights = sorted(file for file in trees[0] if file.endswith(".safetensors") and "/" not in file)
    assert first["made"], "the first process writes"
    assert second["made"], "and so does the second"
    assert sorted(first["made"] + second["made"]) == weights
    assert second["out"] == second["err"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1], ids=["first", "second"])
def test_a_process_without_space_ends_both_with_one_message_and_nothing_left(place, rank):
    name = ("full-first", "full-second")[rank]
    did = [each[name] for each in place.ranks]
    assert [each["code"] for each in did] == [4, 4]
    assert "the disk is full" in did[rank]["err"]
    assert did[rank]["err"].count("error:") == 1
    assert did[1 - rank]["err"] == ""
    assert not [path for path in (place.folder / "two").iterdir() if name in path.name]


@pytest.mark.slow
def test_processes_that_hold_different_values_leave_the_writing_to_the_first(place):
    first, second = (rank["unlike"] for rank in place.ranks)
    assert (first["code"], second["code"]) == (0, 0)
    assert second["made"] == []
    assert first["err"].count("the first one writes alone") == 1
    done("verify", place.folder / "two" / "unlike", "--deep")


@pytest.mark.slow
def test_a_training_takes_the_memory_that_the_plan_says(place):
    """26 million numbers in fp32; the bound counts tensors, and what Python and torch take besides is not in it."""
    (place.folder / "plans").mkdir()
    step = {"use": "fine-tune", "data": str(place.folder / "story.txt"), "batch_size": 2, "micro_batch": 1}
    recipe = write_recipe(place.folder / "plans" / "train.toml", place.folder / "to-train", step)
    planned = done("plan", recipe, "--world-size", 2, "--json").json["per_process"]["step_memory_bytes"]["fine-tune"]
    measured = [rank["training peak"] for rank in place.ranks]
    assert all(0.85 * planned < peak < 1.1 * planned for peak in measured), (planned, measured)


def shard(name, size, source=None):
    return Shard(name, (MemoryTensor("weight", torch.zeros(size, dtype=torch.uint8)),), source)


def names(parts):
    return [sorted(each.name for each in part) for part in parts]


def test_the_largest_file_goes_to_whoever_has_the_fewest_bytes():
    sizes = {"a": 10_000, "b": 50_000, "c": 20_000, "d": 30_000}
    shards = [shard(name, size) for name, size in sizes.items()]
    assert names(shares(shards, 2, link=False)) == [["a", "b"], ["c", "d"]]
    assert names(shares(shards, 4, link=False)) == [["b"], ["d"], ["c"], ["a"]]
    assert names(shares(shards[:1], 3, link=False)) == [["a"], [], []]


def test_linked_files_are_the_first_ones_and_weigh_nothing(tmp_path):
    stored = open_folder(write_checkpoint(tmp_path / "base", {"big": torch.zeros(9000)}), label="base")
    (linked,) = lay_out(stored, 1 << 30).shards
    shards = [linked, shard("a", 10), shard("b", 9)]
    assert names(shares(shards, 2, link=True)) == [["a", linked.name], ["b"]]
    assert names(shares(shards, 2, link=False)) == [[linked.name], ["a", "b"]]


@dataclass(frozen=True)
class Opaque(Operation):
    """Of a plugin: what it holds cannot be told."""

    input: str
    held: object
    inputs = ("weight",)

    def prepare(self, device):
        return lambda start, stop, rows: rows


def layout_with(folder, operation):
    """A file whose tensor `operation` makes."""
    base = open_folder(folder, label="base")
    edit = Edit(base.specs["weight"], operation)
    return lay_out(overlay(base, Patch(edits={"weight": edit}), by="s"), 1 << 30)


def test_the_fingerprint_sees_values_formulas_and_places(tmp_path):
    for name, tensors in {
        "base": {"weight": torch.ones(4)},
        "other": {"a": torch.ones(2), "weight": torch.ones(4)},
    }.items():
        write_checkpoint(tmp_path / name, tensors)

    def scaled(factor, offset=0.0, folder="base"):
        factors = MemoryTensor("factors", torch.full((4,), factor))
        return fingerprint(layout_with(tmp_path / folder, ScaleRows("weight", factors, offset)))

    assert scaled(2.0) == scaled(2.0)
    assert len({scaled(2.0), scaled(2.0000002), scaled(2.0, 1.0), scaled(2.0, folder="other")}) == 4


def test_what_the_fingerprint_cannot_tell_is_like_nothing_else(tmp_path):
    write_checkpoint(tmp_path / "base", {"weight": torch.ones(4)})
    known, unknown = (layout_with(tmp_path / "base", Opaque("weight", held)) for held in (1, object()))
    assert fingerprint(known) == fingerprint(known)
    assert fingerprint(unknown) != fingerprint(unknown)
