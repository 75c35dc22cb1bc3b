"""A plan is exact to the byte: against what `apply` then writes, for families, steps, casts and shardings."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.core.errors import InputError, PluginError, ResourceError, Unsupported
from regraft.core.execute import ApplyOptions, apply, prepare
from regraft.core.host import host
from regraft.core.operations import Convert, Value
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.plan import compare, memory_bound
from regraft.core.recipe.load import load_recipe as load
from regraft.core.sources import open_checkpoint
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor
from regraft.core.transformation import Params, WeightSpace
from tests.adapters import write_adapter
from tests.plugin_host import host_with
from tests.running import ABF, load_recipe, tree, write_recipe

RECORDS = {"README.md", "regraft.lock.json"}
ROTARY = ["llama", "qwen2", "qwen3_moe", "gemma2", "phi3", "gpt_neox", "glm4", "falcon"]
LEARNED = ["gpt2"]


def applied(recipe, **options):
    """The plan, and the report of the run that followed it."""
    found = load_recipe(recipe)
    plan, _ = prepare(found, host(), ApplyOptions(**options))
    report = apply(found, found.output.path, host(), ApplyOptions(durable=False, **options))
    return plan, report


def written(folder):
    """Size of every file but the records, which are known only after the run."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {name: size for name, size in sizes.items() if not recorded(name)}


def recorded(name):
    """Whether it is a record of the run: lock file, model card, reports of steps."""
    return name in RECORDS or name.partition("/")[0] == "regraft"


def exact(plan, folder):
    """The folder is what the plan said, file by file and tensor by tensor."""
    sizes = {**plan.layout.files, **{name: file.nbytes for name, file in plan.result.files.items()}}
    assert sizes == written(folder)
    assert plan.exact
    assert plan.output_bytes == sum(sizes.values())
    assert plan.weight_bytes == sum(size for name, size in sizes.items() if ".safetensors" in name)
    found = open_checkpoint(folder)
    assert list(found.specs.values()) == list(plan.result.specs.values())
    return found


@pytest.mark.parametrize("family", [*ROTARY, *LEARNED])
def test_every_family(family, tiny_folder, tmp_path):
    """A changed config, every tensor cast, other shards."""
    steps = [ABF] if family in ROTARY else []
    base = tiny_folder(family)
    recipe = write_recipe(
        tmp_path / "r.toml", base, *steps, path=str(tmp_path / "out"), dtype="bfloat16", shard_size="30KB"
    )
    plan, _ = applied(recipe)
    found = exact(plan, tmp_path / "out")
    assert len(set(found.shards.values())) > 3
    assert len(plan.changes["rewritten"]) == len(found.tensors)
    assert {spec.dtype for spec in found.specs.values()} == {"BF16"}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(["llama", "gemma2", "gpt_neox", "phi3"]),
    extended=st.booleans(),
    dtype=st.sampled_from(["keep", "bfloat16", "float16", "float32"]),
    shard_size=st.integers(1, 400_000),
    threads=st.integers(1, 3),
    link=st.booleans(),
)
def test_any_combination_of_settings(tiny_folder, tmp_path_factory, family, extended, dtype, shard_size, threads, link):
    folder = tmp_path_factory.mktemp("any")
    steps, output = [ABF] * extended, {"dtype": dtype, "shard_size": shard_size}
    recipe = write_recipe(folder / "r.toml", tiny_folder(family), *steps, path=str(folder / "out"), **output)
    plan, report = applied(recipe, threads=threads, link=link)
    exact(plan, folder / "out")
    computed = sum(plan.result.specs[name].nbytes for name in plan.changes["rewritten"])
    assert report.written.computed_bytes == computed
    shutil.rmtree(folder)


def test_a_merge_rewrites_its_targets_and_copies_the_rest(workplace):
    write_adapter("adapter", modules=("self_attn.q_proj", "self_attn.o_proj"))
    recipe = write_recipe(Path("r.toml"), "base", {"use": "lora-merge", "adapter": "adapter"}, path="out")
    plan, report = applied(recipe)
    exact(plan, Path("out"))
    names = {f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qo"}
    assert set(plan.changes["rewritten"]) == names
    assert len(plan.changes["copied"]) == len(plan.base.tensors) - 4
    assert report.written.computed_bytes == 4 * 64 * 64 * 4
    before, after = open_checkpoint("base"), open_checkpoint("out")
    differing = {name for name in before.specs if not before.load(name).equal(after.load(name))}
    assert differing == names


def test_what_stands_on_tables_of_a_length_that_data_decide_is_an_upper_bound_too(tmp_path, tiny_folder):
    (tmp_path / "corpus.txt").write_text("a badge\n" * 20)
    (tmp_path / "data.jsonl").write_text('{"text": "a badge"}\n' * 8)
    steps = [
        {"use": "tokenizer-retrofit", "vocabulary": "extend", "corpus": [str(tmp_path / "corpus.txt")], "size": 60},
        {"use": "fine-tune", "data": str(tmp_path / "data.jsonl"), "steps": 1},
        {"use": "grow", "hidden_size": 80},
    ]
    base = tiny_folder("llama", tokenizer=True)
    plan, _ = applied(write_recipe(tmp_path / "r.toml", base, *steps, path=str(tmp_path / "out")))
    assert not plan.exact
    name = "model.embed_tokens.weight"
    found, most = open_checkpoint(tmp_path / "out").specs[name].shape, plan.result.specs[name].shape
    assert found[0] < most[0]
    assert found[1] == most[1] == 80


def test_steps_and_output_settings_together(workplace):
    write_adapter("adapter")
    merge = {"use": "lora-merge", "adapter": "adapter"}
    recipe = write_recipe(Path("r.toml"), "base", ABF, merge, path="out", dtype="float16", shard_size=40_000)
    plan, _ = applied(recipe)
    exact(plan, Path("out"))
    assert all(size <= 40_000 + 4096 for name, size in plan.layout.files.items() if name.endswith(".safetensors"))


def test_links_share_their_bytes(workplace):
    recipe = write_recipe(Path("r.toml"), "base", ABF, path="out")
    plan, report = applied(recipe, link=True)
    exact(plan, Path("out"))
    shards = sorted(Path("out").glob("*.safetensors"))
    assert [path.stat().st_ino for path in shards] == [Path("base", path.name).stat().st_ino for path in shards]
    assert report.written.linked_bytes == sum(path.stat().st_size for path in shards)
    assert report.written.copied_bytes == report.written.computed_bytes == 0


def test_a_saved_patch_gives_the_same_bytes(workplace):
    """ABF and a merge, saved, and reapplied by `patch`: every tensor and file but the records."""
    write_adapter("adapter")
    merge = {"use": "lora-merge", "adapter": "adapter"}
    applied(write_recipe(Path("r.toml"), "base", ABF, merge, path="out"), save_patches=Path("patches"))
    steps = [
        {"use": "patch", "id": name, "path": f"patches/{name}.regraft"} for name in ("context-extension", "lora-merge")
    ]
    plan, _ = applied(write_recipe(Path("again.toml"), "base", *steps, path="again"))
    exact(plan, Path("again"))
    once, again = tree(Path("out")), tree(Path("again"))
    assert {name: digest for name, digest in once.items() if not recorded(name)} == {
        name: digest for name, digest in again.items() if not recorded(name)
    }
    assert sum(path.stat().st_size for path in Path("patches").rglob("*.safetensors")) < 10_000


def test_the_base_s_card_moves_aside(workplace):
    Path("base/README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    plan, _ = applied(write_recipe(Path("r.toml"), "base", ABF, path="out"))
    exact(plan, Path("out"))
    assert Path("out/README.base.md").read_bytes() == Path("base/README.md").read_bytes()
    assert plan.left_behind == {}
    plan, _ = applied(write_recipe(Path("r.toml"), "out", {**ABF, "target_length": 8192}, path="twice"))
    exact(plan, Path("twice"))
    assert Path("twice/README.base.md").read_bytes() == Path("base/README.md").read_bytes()
    assert plan.result.left_behind["README.md"]


def test_compare_names_what_happens_to_each_tensor(tiny_folder):
    import torch

    base = open_checkpoint(tiny_folder("llama"))
    norm, head = "model.norm.weight", "lm_head.weight"
    new = MemoryTensor("new.weight", torch.zeros(3))
    patch = Patch(
        edits={norm: Edit(base.specs[norm], Convert(norm)), "new.weight": Edit(new.spec, Value(new))},
        removals=frozenset({"model.layers.0.input_layernorm.weight"}),
        renames={"embed_out.weight": head},
    )
    changes = compare(base, overlay(base, patch, by="test"))
    assert changes["rewritten"] == (norm,)
    assert changes["added"] == ("new.weight",)
    assert changes["dropped"] == ("model.layers.0.input_layernorm.weight",)
    assert "embed_out.weight" in changes["copied"]
    assert len(changes["copied"]) == len(base.tensors) - 2


def test_memory_depends_on_the_largest_tensor_not_on_the_model(tiny_folder, tmp_path):
    small = open_checkpoint(tiny_folder("llama"))
    large = open_checkpoint(tiny_folder("llama", num_hidden_layers=6))

    def cast(base):
        edits = {name: Edit(TensorSpec(name, "BF16", spec.shape), Convert(name)) for name, spec in base.specs.items()}
        return overlay(base, Patch(edits=edits), by="cast")

    assert memory_bound(small, 2) == memory_bound(large, 2) < 100 << 20
    assert memory_bound(cast(small), 2) == memory_bound(cast(large), 2)
    assert memory_bound(cast(small), 4) > memory_bound(cast(small), 1)


class ToyParams(Params):
    fault: str = ""


class Toy(WeightSpace[ToyParams]):
    name = "toy"
    summary = "Fails as it is told."
    Params = ToyParams

    def check(self, checkpoint, params):
        if params.fault == "unsupported":
            raise Unsupported("not this one", where=checkpoint.label)
        if params.fault == "check":
            raise KeyError("oops")

    def patch(self, checkpoint, params):
        if params.fault == "memory":
            raise MemoryError
        if params.fault == "file":
            Path("corpus.txt").read_text()
        if params.fault == "system":
            raise OSError("no such file")
        if params.fault == "plan":
            raise ValueError("no such head")
        if params.fault == "removal":
            return Patch(removals=frozenset({"nothing"}))
        return Patch()


@pytest.mark.parametrize(
    ("fault", "kind", "code", "words"),
    [
        ("unsupported", Unsupported, 1, "not this one"),
        ("check", PluginError, 5, "KeyError: 'oops'"),
        ("plan", PluginError, 5, "ValueError: no such head"),
        ("file", InputError, 3, "corpus.txt: cannot be read: No such file or directory"),
        ("system", PluginError, 5, "OSError: no such file"),
        ("removal", PluginError, 5, "nothing"),
        ("memory", ResourceError, 4, "memory"),
    ],
)
def test_what_a_transformation_raises(fault, kind, code, words, workplace):
    recipe = write_recipe(Path("r.toml"), "base", {"use": "toy", "fault": fault}, path="out")
    plugins = host_with(Toy)
    with pytest.raises(kind) as caught:
        prepare(load(recipe, (), plugins.transformations()), plugins, ApplyOptions())
    assert caught.value.exit_code == code
    assert words in str(caught.value)
    if fault != "unsupported":
        assert "step toy" in str(caught.value)
