"""Targets: recipes, and what the command line's options hold beside them."""

from __future__ import annotations

from types import MappingProxyType

from tests.fuzz import mutations
from tests.fuzz.contract import target
from tests.fuzz.honest import put, scratch


def recipes() -> list[bytes]:
    from regraft.core.recipe.shipped import shipped_names, shipped_text

    full = b"""schema = 1
name = "all"
seed = 3
[base]
model = "demo:tiny"
trust_remote_code = false
[[steps]]
use = "context-extension"
method = "yarn"
target_length = 8_192
[[steps]]
id = "tuned"
use = "fine-tune"
data = { source = ["rows.jsonl"], columns = { text = 'body' }, max_tokens = 0x40 }
train = { precision = "float32", save_every = 5 }
lr = 1e-4
[output]
path = "out" # a comment
dtype = "bfloat16"
shard_size = "5GB"
"""
    return [full, *(shipped_text(name).encode() for name in shipped_names())]


@target(mutations.mutated_text, recipes)
def recipe(data: bytes) -> object:
    """A recipe, validated against the installed plugins."""
    from regraft.core.host import host
    from regraft.core.recipe.load import load_recipe

    return load_recipe(put(scratch() / "recipe.toml", data), (), host().transformations(), host().broken).resolved()


@target(mutations.mutated_text, lambda: [b"tuned.lr=1e-3", b"output.dtype='float16'", b'steps.0.use="x"', b"seed=1"])
def override(data: bytes) -> object:
    """A value of --set, over a recipe."""
    from regraft.core.host import host
    from regraft.core.recipe.load import load_recipe

    file = scratch() / "overridden.toml"
    if not file.exists():
        file.write_bytes(recipes()[0])
    text = data.decode("utf-8", "surrogateescape")
    return load_recipe(file, [text], host().transformations(), host().broken)


@target(mutations.mutated_text, lambda: [b"perplexity:held-out.txt window=512", b"choices:a.jsonl", b"passkey id=told"])
def task(data: bytes) -> object:
    """A value of `eval --task`."""
    from regraft.core.evaluate.tasks import read_tasks

    return read_tasks([data.decode("utf-8", "surrogateescape")], MappingProxyType({}))


@target(mutations.mutated_text, lambda: [b"bpb > 1.02 * base", b"(a.b < 1 or -c >= 2e3) and base.a != (1 + 2) / 3"])
def condition(data: bytes) -> object:
    """A value of `eval --fail-if`, and what it says of numbers."""
    from regraft.core.evaluate.condition import read_condition

    found = read_condition(data.decode("utf-8", "surrogateescape"))
    return found.holds(dict.fromkeys(found.names, 1.0))
