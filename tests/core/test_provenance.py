"""The lock file and the model card: what they say, and that they name neither this machine nor this moment."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest

from regraft.core.data.settings import Data
from regraft.core.errors import InputError
from regraft.core.provenance import data_digests, environment, model_card, package_version, sha256
from regraft.core.realised import Realised
from regraft.core.recipe.references import DataReference, ModelReference, OutputPath
from regraft.core.transformation import Params
from tests.adapters import write_adapter
from tests.checkpoints import write_checkpoint
from tests.core.test_execute import Toy
from tests.plugin_host import host_with
from tests.running import ABF, done, load_recipe, tree, write_recipe

MERGE = {"use": "lora-merge", "adapter": "adapter"}


def lock_of(folder):
    return json.loads(Path(folder, "regraft.lock.json").read_text())


def test_what_the_lock_says(workplace):
    write_adapter("adapter")
    done("apply", write_recipe(Path("r.toml"), "base", ABF, MERGE, path="out", dtype="bfloat16"))
    lock = lock_of("out")
    assert lock["schema"] == 1
    assert lock["regraft"] == package_version("regraft")
    assert [(step["use"], step["id"]) for step in lock["recipe"]["steps"]] == [
        ("context-extension", "context-extension"),
        ("lora-merge", "lora-merge"),
    ]
    assert lock["recipe"]["steps"][1]["adapter"] == "adapter"
    assert lock["recipe"]["base"]["model"] == "base"
    first, second = lock["steps"]
    assert (first["plugin"], first["plugin_version"], first["version"]) == ("regraft", lock["regraft"], "1")
    assert first["metrics"]["rope_theta"] == 500000.0
    assert set(second["data"]["adapter"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert second["data"]["adapter"]["adapter_config.json"] == sha256(Path("adapter/adapter_config.json"))
    output = lock["output"]["tensors"]["model.norm.weight"]
    assert (output["dtype"], output["shape"]) == ("BF16", [64])
    assert len(lock["base"]["tensors"]) == len(lock["output"]["tensors"]) == 21
    assert lock["non_finite_inputs"] == {}
    assert lock["environment"]["device"] == "cpu"
    assert lock["environment"]["packages"]["safetensors"] == package_version("safetensors")


def test_digests_are_those_of_the_bytes(workplace):
    import xxhash
    from safetensors import safe_open

    done("apply", write_recipe(Path("r.toml"), "base", path="out", dtype="bfloat16"))
    lock = lock_of("out")
    for section, folder in (("base", "base"), ("output", "out")):
        for path in Path(folder).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    stated = lock[section]["tensors"][name]
                    data = file.get_tensor(name).view(dtype_of_bytes()).numpy().tobytes()
                    digest = stated if section == "base" else stated["digest"]
                    assert digest == f"xxh3:{xxhash.xxh3_128(data).hexdigest()}"


def dtype_of_bytes():
    import torch

    return torch.uint8


def test_a_renamed_tensor_keeps_the_digest_of_its_base(workplace):
    from regraft.core.execute import ApplyOptions, apply
    from regraft.core.patch import Patch
    from regraft.core.recipe.load import load_recipe as load
    from regraft.core.transformation import WeightSpace

    one, other = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"

    class Swap(WeightSpace[Params]):
        name, summary, Params = "swap", "Swaps two projections.", Params

        def patch(self, checkpoint, params):
            return Patch(renames={one: other, other: one})

    done("apply", write_recipe(Path("plain.toml"), "base", ABF, path="plain"))
    plugins = host_with(Swap)
    recipe = load(write_recipe(Path("r.toml"), "base", {"use": "swap"}), (), plugins.transformations())
    apply(recipe, Path("out"), plugins, ApplyOptions(durable=False))
    plain, swapped = lock_of("plain"), lock_of("out")
    assert swapped["base"]["tensors"] == plain["base"]["tensors"]
    assert swapped["output"]["tensors"][one]["digest"] == plain["base"]["tensors"][other]
    assert swapped["steps"][0]["plugin"] == "unknown"


@pytest.mark.parametrize("named", ["relative", "absolute", "extended"])
def test_no_path_of_this_machine_and_no_clock(named, workplace, monkeypatch):
    """The same bytes wherever inputs and output lie."""
    write_adapter("adapter")
    Path("base/README.md").write_text("# Base\n")
    write_recipe(Path("r.toml"), "base", ABF, MERGE, path="out")
    done("apply", "r.toml")
    folder = workplace / named
    folder.mkdir()
    prefix = "" if named == "relative" else f"{workplace}/"
    steps = [ABF, {**MERGE, "adapter": f"{prefix}adapter"}]
    if named == "relative":
        shutil.copytree("base", "relative/base")
        shutil.copytree("adapter", "relative/adapter")
    recipe = write_recipe(folder / "r.toml", f"{prefix}base", *steps, path=str(folder / "elsewhere"))
    if named == "extended":
        (folder / "r.toml").write_text('extends = "../parent.toml"\nname = "r"\n')
        write_recipe(Path("parent.toml"), "base", ABF, MERGE, path=str(folder / "elsewhere"))
    monkeypatch.chdir(folder.parent.parent)
    done("apply", recipe)
    once, again = workplace / "out", folder / "elsewhere"
    for name in ("README.md", "regraft.lock.json"):
        text = (again / name).read_text()
        assert str(workplace) not in text
        assert str(Path.home()) not in text
        assert not re.search(r"\b20\d\d-\d\d-\d\d", text)
    if named != "extended":
        assert tree(once) == tree(again)


def test_a_path_inside_a_base_folder_of_another_name_is_its_own(workplace):
    """Only what is on this disk under an absolute name is shortened; other text that begins with a slash stays."""
    from regraft.core.provenance import portable_recipe

    write_recipe(Path("r.toml"), str(workplace / "base"), ABF, path="/nowhere/out")
    recipe = load_recipe(Path("r.toml"))
    assert recipe.resolved()["base"]["model"] == str(workplace / "base")
    portable = portable_recipe(recipe)
    assert portable["base"]["model"] == "base"
    assert "path" not in portable["output"]


def test_the_card(workplace):
    card = "---\nlicense: apache-2.0\nlanguage:\n- en\npipeline_tag: text-generation\ntags: [chat]\n---\n# Base\n"
    Path("base/README.md").write_text(card)
    done("apply", write_recipe(Path("r.toml"), "base", ABF, path="out"))
    text = Path("out/README.md").read_text()
    front, body = text.removeprefix("---\n").split("---\n", 1)
    assert front.splitlines() == [
        "library_name: transformers", "tags:", "- regraft", "license: apache-2.0", "pipeline_tag: text-generation",
    ]  # fmt: skip
    assert body.startswith("\n# r\n\nWritten by regraft from `base`.")
    assert "| context-extension | " in body
    assert "arXiv 2401.07004" in body
    assert "- rope_theta: 500000" in body
    assert "README.base.md" in body
    assert 'from_pretrained("PATH")' in body


def test_the_front_matter_is_yaml_and_cannot_be_broken_by_the_base_s_card(workplace):
    yaml = pytest.importorskip("yaml")
    Path("base/README.md").write_bytes(
        b"---\r\nlicense: mit\r\nlicense_name: a: b\r\nx: |\r\n  license: gpl\r\n---\r\n\xff"
    )
    done("apply", write_recipe(Path("r.toml"), "base", ABF, path="out"))
    front = Path("out/README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["regraft"], "license": "mit"}


def test_a_card_for_code_that_must_be_trusted(workplace):
    extension = {**ABF, "method": "entropy-abf", "export": "remote-code"}
    ran = done("apply", write_recipe(Path("r.toml"), "base", extension, path="out"))
    assert "trust_remote_code=True" in Path("out/README.md").read_text()
    assert 'from_pretrained("out", trust_remote_code=True)' in ran.out
    ran = done("apply", write_recipe(Path("again.toml"), "out", path="again", dtype="bfloat16"))
    assert "trust_remote_code=True" in Path("again/README.md").read_text()
    assert "trust_remote_code=True" in ran.out


def test_data_digests(tmp_path):
    class Files(Params):
        corpus: Path
        folder: Path
        missing: Path | None = None
        corpora: tuple[Path, ...] = ()
        count: int = 3
        log: OutputPath | None = None
        data: Data | None = None
        rows: DataReference | None = None
        vision: ModelReference | None = None
        other: ModelReference | None = None

    (tmp_path / "corpus.txt").write_text("abc")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "a.txt").write_text("a")
    corpora = (tmp_path / "nowhere", tmp_path / "corpus.txt")
    given = {"corpus": tmp_path / "corpus.txt", "folder": tmp_path / "folder", "corpora": corpora}
    data = {"source": ["org/name", str(tmp_path / "corpus.txt")]}
    references = {"rows": str(tmp_path / "corpus.txt"), "vision": str(tmp_path / "folder"), "other": "org/model"}
    found = data_digests(Files(**given, log=tmp_path / "corpus.txt", data=data, **references))
    assert found == {
        "corpora[1]": hashlib.sha256(b"abc").hexdigest(),
        "data.source[0]": hashlib.sha256(b"abc").hexdigest(),
        "corpus": hashlib.sha256(b"abc").hexdigest(),
        "folder": {"inner/a.txt": hashlib.sha256(b"a").hexdigest()},
        "rows": hashlib.sha256(b"abc").hexdigest(),
        "vision": {"inner/a.txt": hashlib.sha256(b"a").hexdigest()},
    }
    with pytest.raises(InputError, match="cannot be read"):
        sha256(tmp_path)


def test_the_environment_names_versions_and_no_machine():
    found = environment("cuda:1")
    assert found["device"] == "cuda"
    assert found["packages"]["torch"] == package_version("torch")
    assert package_version("no-such-package") is None
    assert set(found) == {"python", "packages", "system", "machine", "device"}


def test_the_card_names_a_hub_base(workplace, tiny_folder):
    from dataclasses import replace

    from regraft.core.execute import ApplyOptions, prepare

    plugins = host_with(Toy)
    plan, _ = prepare(load_recipe(write_recipe(Path("r.toml"), "base", ABF)), plugins, ApplyOptions())
    base = replace(plan.base, origin={"source": "hub", "repo": "org/name"})
    recipe = plan.recipe.model_copy(update={"base": plan.recipe.base.model_copy(update={"model": "org/name"})})
    patches = [step.transformation.apply(base, step.params, None) for step in plan.steps]
    card = model_card(replace(plan, base=base, recipe=recipe), patches, plan.result, Realised()).decode()
    assert "base_model: org/name\n" in card
    assert "Written by regraft from `org/name`." in card


def test_a_base_of_plain_tensors_has_a_digest_for_each(tmp_path):
    import torch

    base = write_checkpoint(tmp_path / "base", {"a": torch.ones(3), "b": torch.ones(())}, config={"model_type": "none"})
    done("apply", write_recipe(tmp_path / "r.toml", base, path=str(tmp_path / "out"), dtype="float16"))
    lock = lock_of(tmp_path / "out")
    assert set(lock["base"]["tensors"]) == {"a", "b"}
