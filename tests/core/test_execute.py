"""Running a recipe: what is refused before anything is written, who is blamed, and what is checked afterwards."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from regraft.core.checkpoint import FileRef
from regraft.core.errors import InputError, PluginError, TransformationError, UsageError, VerificationError
from regraft.core.execute import ApplyOptions, Events, apply, inputs_of, prepare
from regraft.core.layout import lay_out
from regraft.core.operations import Value
from regraft.core.patch import Edit, Outline, Patch
from regraft.core.recipe.load import load_recipe
from regraft.core.recipe.references import OutputPath
from regraft.core.sources.folder import open_folder
from regraft.core.tensors import MemoryTensor
from regraft.core.transformation import Params, Transformation
from regraft.core.verify.folder import verify_folder
from tests.adapters import write_adapter
from tests.plugin_host import host_with
from tests.running import ABF, tree, write_recipe

NORM = "model.norm.weight"


class ToyParams(Params):
    mode: str = "keep"
    log: OutputPath | None = None


class Toy(Transformation[ToyParams]):
    """Promises to set the final norm to ones, and does so unless it is told otherwise."""

    name = "toy"
    summary = "Sets the final norm to ones."
    version = "7"
    Params = ToyParams

    def _patch(self, checkpoint, **changes):
        import torch

        spec = checkpoint.specs[NORM]
        ones = MemoryTensor(NORM, torch.ones(spec.shape))
        return Patch(**{"edits": {NORM: Edit(spec, Value(ones))}, "notes": ("all ones",), **changes})

    def plan(self, checkpoint, params):
        return Outline(specs={NORM: checkpoint.specs[NORM]}, notes=("all ones",))

    def apply(self, checkpoint, params, run):
        import torch

        run.tell(f"{run.step} on {run.device}")
        (run.cache / "intermediate").write_text("gone when the run ends")
        match params.mode:
            case "raises":
                raise ZeroDivisionError("of the plugin")
            case "refuses":
                raise TransformationError("the data is too small", where="data.jsonl", remedy="bring more")
            case "other config":
                return self._patch(checkpoint, json={"config.json": {"rope_theta": 1.0}})
            case "other tensors":
                return Patch()
            case "nan":
                bad = MemoryTensor(NORM, torch.full(checkpoint.specs[NORM].shape, float("nan")))
                return self._patch(checkpoint, edits={NORM: Edit(bad.spec, Value(bad))})
            case "metrics":
                return self._patch(checkpoint, metrics={"loss": torch.ones(1)})
            case "nan metrics":
                return self._patch(checkpoint, metrics={"loss": float("nan")})
            case "report":
                return self._patch(checkpoint, reports={"loss.txt": FileRef(data=b"0.5\n")})
            case "odd report":
                return self._patch(checkpoint, reports={"../loss.txt": FileRef(data=b"0.5\n")})
        return self._patch(checkpoint, metrics={"loss": 0.5, "steps": 3})


def run(*steps, plugins=None, events=None, options=None, **output):
    plugins = plugins or host_with(Toy)
    path = write_recipe(Path("recipe.toml"), "base", *steps, path="out", **output)
    recipe = load_recipe(path, (), plugins.transformations())
    return apply(recipe, recipe.output.path, plugins, options or ApplyOptions(durable=False), events)


def test_a_run_and_its_report(workplace):
    said, total, advanced = [], [], []
    events = Events(say=said.append, start=total.append, advance=advanced.append)
    report = run({"use": "toy", "id": "ones"}, events=events)
    assert said == ["ones on cpu"]
    assert total == [sum(spec.nbytes for spec in report.plan.result.specs.values())]
    assert sum(advanced) == total[0]
    assert report.output_bytes == sum(path.stat().st_size for path in Path("out").rglob("*"))
    assert report.verified == "structure"
    assert report.written.computed_bytes == report.plan.result.specs[NORM].nbytes
    lock = json.loads(Path("out/regraft.lock.json").read_text())
    (step,) = lock["steps"]
    assert (step["id"], step["use"], step["version"], step["metrics"]) == (
        "ones",
        "toy",
        "7",
        {"loss": 0.5, "steps": 3},
    )
    assert step["notes"] == ["all ones"]
    card = Path("out/README.md").read_text()
    assert "- all ones" in card
    assert "- loss: 0.5" in card
    assert set(tree(workplace)) == {"base", "out", "recipe.toml", *(f"base/{name}" for name in tree(Path("base"))),
                                    *(f"out/{name}" for name in tree(Path("out")))}  # fmt: skip


def test_reports_of_a_step_stand_in_a_folder_of_their_own_and_are_not_carried_on(workplace):
    run({"use": "toy", "id": "ones", "mode": "report"}, {"use": "toy", "id": "twos", "mode": "report"})
    for step in ("ones", "twos"):
        assert Path("out/regraft", step, "loss.txt").read_bytes() == b"0.5\n"
    lock = json.loads(Path("out/regraft.lock.json").read_text())
    assert "regraft/ones/loss.txt" in lock["output"]["files"]
    assert verify_folder(Path("out")).faults == []
    assert "regraft/ones/loss.txt" in open_folder(Path("out"), label="out").left_behind
    Path("out/regraft/ones/loss.txt").write_text("0.4\n")
    assert [fault.where for fault in verify_folder(Path("out")).faults] == ["out: regraft/ones/loss.txt"]


@pytest.mark.parametrize(
    ("mode", "kind", "code", "words"),
    [
        ("raises", PluginError, 5, ["step toy", "ZeroDivisionError: of the plugin", "--traceback"]),
        ("refuses", TransformationError, 1, ["data.jsonl", "too small", "bring more"]),
        ("other config", TransformationError, 1, ["step toy", "not what the plan said", "json"]),
        ("other tensors", TransformationError, 1, ["step toy", "not what the plan said", "specs"]),
        ("metrics", PluginError, 5, ["step toy", "not JSON", "Tensor"]),
        ("nan metrics", PluginError, 5, ["step toy", "not JSON"]),
        ("odd report", PluginError, 5, ["step toy", "no plain file name", "../loss.txt"]),
    ],
)
def test_a_step_that_does_not_keep_its_word(mode, kind, code, words, workplace):
    before = tree(workplace)
    with pytest.raises(kind) as caught:
        run({"use": "toy", "mode": mode})
    assert caught.value.exit_code == code
    for word in words:
        assert word in str(caught.value)
    assert tree(workplace).keys() == before.keys() | {"recipe.toml"}


@pytest.mark.parametrize("log", ["out/log.jsonl", "out"])
def test_a_log_inside_the_output_is_refused_before_anything_runs(log, workplace):
    with pytest.raises(UsageError, match="inside the output") as caught:
        run({"use": "toy", "mode": "raises", "log": log})
    assert caught.value.where == "step toy: log"
    run({"use": "toy", "log": "logs/log.jsonl"})


def test_a_step_that_works_by_itself_computes_although_it_changes_nothing(workplace):
    class Look(Toy):
        def plan(self, checkpoint, params):
            return Outline(workspace_bytes=1 if params.mode == "looks" else 0)

    plugins = host_with(Look)
    for mode, computes in (("looks", True), ("idle", False)):
        path = write_recipe(Path("recipe.toml"), "base", {"use": "toy", "mode": mode}, path="out")
        assert (
            prepare(load_recipe(path, (), plugins.transformations()), plugins, ApplyOptions())[0].computes is computes
        )


def test_hooks_are_called_around_every_step(workplace):
    calls = []

    def before(step, checkpoint):
        calls.append(("before", step, checkpoint.config["max_position_embeddings"]))

    def after(step, checkpoint, patch):
        calls.append(("after", step, sorted([*patch.edits, *patch.json])))

    plugins = host_with(Toy, regraft_before_step=before, regraft_after_step=after)
    run(ABF, {"use": "toy"}, plugins=plugins)
    assert calls == [
        ("before", "context-extension", 128),
        ("after", "context-extension", ["config.json"]),
        ("before", "toy", 4096),
        ("after", "toy", [NORM]),
    ]


@pytest.mark.parametrize("hook", ["regraft_before_step", "regraft_after_step"])
def test_a_hook_that_raises_stops_the_run(hook, workplace):
    def broken(step):
        raise RuntimeError("no licence")

    with pytest.raises(PluginError, match="RuntimeError: no licence") as caught:
        run(ABF, plugins=host_with(**{hook: broken}))
    assert caught.value.where == "toy"
    assert not Path("out").exists()


def test_a_layout_that_is_not_the_plan_s(workplace, monkeypatch):
    """The bytes that are about to be written are compared with the plan once more."""
    import regraft.core.execute as execute

    monkeypatch.setattr(execute, "layout_of", lambda recipe, output: lay_out(output, 30_000))
    with pytest.raises(TransformationError, match="not what the plan said"):
        run(ABF)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: (out / "stray.txt").write_text("x"), "files that nothing wrote"),
        (lambda out: (out / "model-00003-of-00006.safetensors").unlink(), "cannot be read back"),
        (lambda out: shutil.copy(out / "config.json", out / "model-00003-of-00006.safetensors"), "cannot be read back"),
        (lambda out: _edit_config(out, intermediate_size=1), "contradicts the config"),
        (lambda out: _rename_tensor(out), "not those of the plan"),
    ],
)
def test_the_written_folder_is_verified_before_it_appears(damage, words, workplace, monkeypatch):
    import regraft.core.execute as execute

    records = execute._write_records

    def damaged(plan, ran, layout, written, output, device):
        records(plan, ran, layout, written, output, device)
        damage(output)

    monkeypatch.setattr(execute, "_write_records", damaged)
    with pytest.raises(VerificationError, match=words) as caught:
        run(ABF)
    assert caught.value.exit_code == 1
    assert ".regraft" not in str(caught.value)
    assert not Path("out").exists()
    assert not Path(".out.regraft").exists()


def _edit_config(out, **changes):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changes}))


def _rename_tensor(out):
    for path in out.glob("*.safetensors*"):
        path.write_bytes(path.read_bytes().replace(b"model.norm.weight", b"model.morn.weight"))


def test_a_tokenizer_that_a_step_breaks_is_found(workplace):
    """The tokenizer is parsed again where a step has changed it."""

    class Tokens(Transformation[Params]):
        name, summary, Params = "tokens", "Adds a token without a row.", Params

        def _patch(self, checkpoint):
            token = {"id": 999, "content": "<|x|>", "special": True}
            return Patch(json={"tokenizer.json": {"added_tokens": [token]}})

        def plan(self, checkpoint, params):
            return Outline.of(self._patch(checkpoint))

        def apply(self, checkpoint, params, run):
            return self._patch(checkpoint)

    with pytest.raises(VerificationError, match="ids beyond the embedding") as caught:
        run({"use": "tokens"}, plugins=host_with(Tokens))
    assert "id 999" in str(caught.value)


def test_patches_are_saved_only_when_all_went_well(workplace):
    options = ApplyOptions(durable=False, save_patches=Path("patches"))
    with pytest.raises(PluginError):
        run(ABF, {"use": "toy", "mode": "raises"}, options=options)
    assert not Path("patches").exists()
    run(ABF, {"use": "toy"}, options=options)
    assert sorted(path.name for path in Path("patches").iterdir()) == ["context-extension.regraft", "toy.regraft"]


def test_patches_that_cannot_all_be_saved_are_not_saved(workplace, monkeypatch):
    import regraft.core.patch_folder as patch_folder

    save = patch_folder.save_patch

    def second_fails(patch, below, above, folder):
        if folder.name == "toy.regraft":
            raise UsageError("no")
        save(patch, below, above, folder)

    monkeypatch.setattr(patch_folder, "save_patch", second_fails)
    with pytest.raises(UsageError):
        run(ABF, {"use": "toy"}, options=ApplyOptions(durable=False, save_patches=Path("patches")))
    assert list(Path("patches").iterdir()) == []
    assert not Path("out").exists()


def test_inputs_are_the_base_the_recipe_and_every_path_of_a_step(workplace):
    write_adapter("adapter")
    plugins = host_with()
    path = write_recipe(Path("recipe.toml"), "base", {"use": "lora-merge", "adapter": "adapter"})
    plan, _ = prepare(load_recipe(path, (), plugins.transformations()), plugins, ApplyOptions())
    assert list(inputs_of(plan)) == [Path("base"), Path("recipe.toml"), Path("adapter")]


def test_what_the_source_has_to_say_reaches_the_user(workplace, monkeypatch):
    import regraft.core.execute as execute

    opened = execute.open_base
    monkeypatch.setattr(execute, "open_base", lambda *given: replace(opened(*given), notes=("from the cache",)))
    report = run(ABF)
    assert [str(finding) for finding in report.findings] == ["base: from the cache"]


def test_the_base_is_looked_at_before_its_steps(workplace):
    """A base that contradicts itself is the base's fault, not that of the first step that stumbles over it."""
    _edit_config(Path("base"), num_hidden_layers=5)
    with pytest.raises(InputError, match="missing that the config calls for") as caught:
        run({"use": "toy", "mode": "raises"})
    assert caught.value.exit_code == 3


def test_a_forced_target_is_replaced_whole(workplace):
    Path("out").mkdir()
    Path("out/config.json").write_text("{}")
    Path("out/old.safetensors").write_text("of another model")
    run(ABF, options=ApplyOptions(force=True))
    assert not Path("out/old.safetensors").exists()
    assert Path("out/config.json").is_file()
    before = tree(Path("out"))
    with pytest.raises(PluginError):
        run({"use": "toy", "mode": "raises"}, options=ApplyOptions(force=True))
    assert tree(Path("out")) == before


@pytest.fixture
def trusted(monkeypatch):
    """Whether code was trusted each time that stock transformers would have been asked."""
    asked = []
    monkeypatch.setattr(
        "regraft.core.verify.load.verify_load", lambda folder, depth, *, trust, label: asked.append(trust)
    )
    return asked


CODE = {**ABF, "method": "entropy-abf", "export": "remote-code"}


def test_only_code_of_our_own_is_run_by_verification(workplace, trusted):
    """Neither the base's nor a saved patch's, unless the recipe says so."""
    load = ApplyOptions(durable=False, force=True, verify="load", save_patches=Path("patches"))
    run(ABF, options=load)
    shutil.rmtree("patches")
    run(CODE, options=load)
    assert trusted == [False, True]
    again = ApplyOptions(durable=False, force=True, verify="load")
    run({"use": "patch", "path": "patches/context-extension.regraft"}, options=again)
    assert trusted[2:] == [False]
    (Path("base") / "modeling_other.py").write_text("raise SystemExit")
    run(CODE, options=again)
    assert trusted[3:] == [False]
    text = Path("recipe.toml").read_text().replace("[base]", "[base]\ntrust_remote_code = true")
    Path("recipe.toml").write_text(text)
    plugins = host_with()
    apply(load_recipe(Path("recipe.toml"), (), plugins.transformations()), Path("out"), plugins, again)
    assert trusted[4:] == [True]
