"""A generator learns what pictures say; the language model stays, or learns too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from regraft.core.architectures import architecture_of
from regraft.core.data.batches import collate
from regraft.core.data.encode import Encoder
from regraft.core.data.records import Completion
from regraft.core.data.rows import Place
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.sources.open import open_checkpoint
from regraft.core.training.footprint import shared_bytes
from regraft.core.training.model import materialise_model, materialise_tokenizer
from regraft.core.training.sharding import sharable
from regraft.plugins.vlora import train_fit
from regraft.plugins.vlora.train import VloraTrain
from regraft.plugins.vlora.train_attach import Attached
from regraft.plugins.vlora.train_own import OWN_WEIGHTS, own_generator, own_settings
from regraft.plugins.vlora.vision import open_tower
from tests.checkpoints import same_bits
from tests.helpers import names
from tests.plugins.vlora.train_ranks import both_stages
from tests.plugins.vlora.train_support import (
    NEW,
    WORDS,
    draw,
    learn,
    loaded,
    make_tower,
    params,
    rows,
    write,
    write_features,
)
from tests.running import done, regraft, write_recipe

ROOT = Path(__file__).parents[3]


@pytest.fixture
def lesson(tmp_path):
    """A folder with rows and features."""
    write(tmp_path / "rows.jsonl", rows())
    write_features(tmp_path / "features.safetensors")
    return tmp_path


@pytest.fixture
def llama(tiny_folder):
    return tiny_folder("llama")


def answers(checkpoint, pictures):
    """For each word, whether the model says it where it sees that word's picture."""
    found, tokenizer = own_generator(checkpoint), materialise_tokenizer(checkpoint)
    generator, model = found.load(), materialise_model(checkpoint)
    examples = [Encoder(tokenizer).encode(Completion("colour?", word), Place("x", 1)) for word in WORDS]
    batch = collate(examples, (0, 1, 2))
    keys = [(kind, layer) for kind in found.settings.types for layer in found.settings.active_layers]
    attached = Attached(model, architecture_of(checkpoint.config, checkpoint.specs), keys, generator.scale)
    with torch.no_grad(), attached.attached():
        attached.see(generator(pictures), torch.arange(len(pictures)))
        said = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].argmax(-1)
    labels = batch.labels[:, 1:]
    return ((said == labels) | (labels < 0)).all(1).tolist()


def test_the_generator_learns_to_tell_pictures_apart_and_nothing_else_changes(llama, lesson):
    patch, result = learn(llama, params(lesson, epochs=150))
    assert patch.edits == {}
    assert list(patch.files) == [OWN_WEIGHTS]
    assert patch.metrics["first_loss"] > 5
    assert patch.metrics["learnt_numbers"] == patch.metrics["generator_numbers"]
    features = [own_features(lesson, word) for word in WORDS]
    assert answers(result, torch.stack(features)) == [True] * 3
    assert answers(result, torch.stack(features[1:] + features[:1])) == [False] * 3, "not by the question"


def own_features(folder, word):
    return load_file(folder / "features.safetensors")[word]


def test_in_the_first_stage_the_generator_alone_learns_and_in_the_second_all(llama, lesson):
    base = open_checkpoint(llama)
    patch, seeing = learn(llama, params(lesson, held_out={"source": str(lesson / "rows.jsonl")}))
    assert same_bits(loaded(seeing), loaded(base))
    generator = own_generator(seeing).load().state_dict()
    assert patch.metrics["held_out"]["loss_after"] < patch.metrics["held_out"]["loss_before"]
    both, result = learn(seeing, params(lesson, new=None, train="both", lr=1e-3))
    assert "goes on" in both.notes[0]
    assert both.metrics["first_loss"] == pytest.approx(patch.metrics["held_out"]["loss_after"], rel=1e-5)
    assert set(both.edits) == set(base.specs)
    moved = [name for name, value in loaded(result).items() if not torch.equal(value, base.load(name))]
    assert set(moved) == set(base.specs), "embeddings and norms too"
    later = own_generator(result).load().state_dict()
    assert not any(torch.equal(later[name], generator[name]) for name in generator if not name.endswith("in_proj_bias"))


def test_text_alone_teaches_a_generator_nothing(llama, lesson):
    write(lesson / "text.jsonl", [{"prompt": "1+1=", "answer": "2"}] * 4)
    fresh, _ = learn(llama, params(lesson, lr=0.0, steps=1))
    patch, _ = learn(llama, params(lesson, data=lesson / "text.jsonl"))
    assert patch.files[OWN_WEIGHTS].data == fresh.files[OWN_WEIGHTS].data
    assert patch.metrics["data"]["sequences_without_picture"] == 4
    assert patch.metrics["final_loss"] == patch.metrics["first_loss"]


def test_how_a_step_is_computed_does_not_matter(llama, lesson):
    whole, _ = learn(llama, params(lesson))
    for other in ({"micro_batch": 1}, {"learning": {"gradient_checkpointing": True}}):
        same, _ = learn(llama, params(lesson, **other))
        assert same.metrics["final_loss"] == pytest.approx(whole.metrics["final_loss"], rel=1e-4)


@pytest.mark.parametrize("stage", ["generator", "both"])
def test_a_training_that_was_broken_off_ends_with_the_same_bytes(stage, llama, lesson, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killing(tell):
        def listen(progress):
            if progress.step == 3:
                raise Killed

        return listen

    given = params(lesson, train=stage, learning={"save_every": 2})
    whole, expected = learn(llama, given)
    with monkeypatch.context() as patched:
        patched.setattr("regraft.plugins.vlora.train_fit.telling", killing)
        with pytest.raises(Killed):
            learn(llama, given, state=tmp_path / "state")
    assert list((tmp_path / "state").rglob("state.safetensors"))
    resumed, result = learn(llama, given, state=tmp_path / "state")
    assert resumed.files[OWN_WEIGHTS].data == whole.files[OWN_WEIGHTS].data
    assert same_bits(loaded(result), loaded(expected))
    assert resumed.reports["losses.jsonl"] == whole.reports["losses.jsonl"]
    write(lesson / "rows.jsonl", rows()[::-1])
    with pytest.raises(UsageError, match="the saved state belongs to another training"):
        learn(llama, given, state=tmp_path / "state")


def test_a_generator_of_a_folder_goes_on(llama, lesson, tmp_path):
    first, _ = learn(llama, params(lesson, held_out={"source": str(lesson / "rows.jsonl")}))
    second, _ = learn(llama, params(lesson, generator=save_own(first, tmp_path / "out")))
    assert second.metrics["first_loss"] == pytest.approx(first.metrics["held_out"]["loss_after"], rel=1e-5)


def save_own(patch, folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(patch.files[OWN_WEIGHTS].data)
    (folder / "config.json").write_text(json.dumps(patch.json["vlora/config.json"]))
    return folder


def test_a_generator_says_which_hidden_state_it_learnt_from_last(llama, gallery, tmp_path):
    images = {"data": gallery / "images.jsonl", "vision": gallery / "tower", "features": None}
    first, _ = learn(llama, params(gallery, select_layer=-1, **images, steps=1))
    folder = save_own(first, tmp_path / "first")
    assert first.json["vlora/config.json"]["select_layer"] == -1
    same, _ = learn(llama, params(gallery, generator=folder, **images, steps=1))
    assert same.json["vlora/config.json"]["select_layer"] == -1
    other, _ = learn(llama, params(gallery, generator=folder, select_layer=0, **images, steps=1))
    assert other.json["vlora/config.json"]["select_layer"] == 0
    assert other.files[OWN_WEIGHTS].data != same.files[OWN_WEIGHTS].data
    read, _ = learn(llama, params(gallery, select_layer=-1, steps=1))
    assert read.json["vlora/config.json"]["select_layer"] == -1, "of which the features are, the recipe says"


def test_a_state_of_another_encoder_is_refused(llama, gallery, tmp_path):
    given = params(gallery, data=gallery / "images.jsonl", vision=gallery / "tower", features=None)
    learn(llama, given, state=tmp_path / "state")
    weights = gallery / "tower" / "model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="the saved state belongs to another training"):
        learn(llama, given, state=tmp_path / "state")


def test_a_generator_for_another_model_is_refused(llama, lesson, tiny_folder):
    _, seeing = learn(llama, params(lesson, steps=1))
    other = open_checkpoint(tiny_folder("llama-wide-heads"))
    files = {**other.files, **{name: file for name, file in seeing.files.items() if name.startswith("vlora/")}}
    other.__dict__["files"] = files
    with pytest.raises(InputError, match="was made for another model"):
        learn(other, params(lesson, new=None))


@pytest.fixture
def gallery(lesson):
    """The folder with rows that name pictures, and a vision tower."""
    make_tower(lesson / "tower")
    draw(lesson)
    told = [{"prompt": "<image>\ncolour?", "answer": word, "image": f"{word}.png"} for word in WORDS]
    write(lesson / "images.jsonl", [*told, rows()[3]])
    return lesson


def test_images_teach_what_their_features_teach(llama, gallery):
    seen, result = learn(llama, params(gallery, data=gallery / "images.jsonl", vision=gallery / "tower", features=None))
    encoder = open_tower(str(gallery / "tower")).load()
    save_file({word: encoder(gallery / f"{word}.png") for word in WORDS}, gallery / "of-tower.safetensors")
    read, _ = learn(llama, params(gallery, features=gallery / "of-tower.safetensors"))
    assert own_settings(result).vision_tower is None, "no path of this machine"
    assert seen.metrics["data"]["digest"] == read.metrics["data"]["digest"], "the placeholder is gone"
    assert seen.files[OWN_WEIGHTS].data == read.files[OWN_WEIGHTS].data


def test_pictures_that_cannot_be_seen_are_refused(llama, gallery, tmp_path):
    given = {"data": gallery / "images.jsonl", "features": None}
    with pytest.raises(UsageError, match="needs something to see with"):
        learn(llama, params(gallery, **given))
    with pytest.raises(UsageError, match="the step has nothing to see it with"):
        learn(llama, params(gallery, data=gallery / "images.jsonl"))
    _, seeing = learn(llama, params(gallery, steps=1))
    with pytest.raises(UsageError, match="features of another size than this vision encoder gives"):
        learn(seeing, params(gallery, **given, new=None, vision=gallery / "tower"))
    save_file({word: torch.zeros(3, 6) for word in WORDS}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="the generator reads features of another size"):
        learn(seeing, params(gallery, new=None, features=tmp_path / "other.safetensors"))
    (gallery / "red.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"images.jsonl:1: .*is no image"):
        learn(llama, params(gallery, **given, vision=gallery / "tower"))


def test_rows_without_answers_are_refused(llama, lesson):
    write(lesson / "texts.jsonl", [{"text": "red", "features": "red"}])
    with pytest.raises(UsageError, match="the rows have no answers"):
        learn(llama, params(lesson, data=lesson / "texts.jsonl"))
    for key, value in (("pack", True), ("learn", "all"), ("kind", "text")):
        with pytest.raises(ValidationError, match=f"data.{key}"):
            params(lesson, data={"source": lesson / "rows.jsonl", key: value})


def test_a_new_generator_has_the_types_that_can_be_merged(lesson, tiny_folder):
    sizes = {key: value for key, value in NEW.items() if key != "types"}
    for family, types in (("llama", "qkvom"), ("qwen3", "qkvo")):
        outline = VloraTrain().plan(open_checkpoint(tiny_folder(family)), params(lesson, new=sizes))
        assert outline.json["vlora/config.json"]["types"] == types
    outline = VloraTrain().plan(open_checkpoint(tiny_folder("qwen3")), params(lesson, new=NEW))
    assert 'output = "attached" alone' in outline.notes[1]
    with pytest.raises(Unsupported, match="experts"):
        VloraTrain().plan(open_checkpoint(tiny_folder("mixtral")), params(lesson, new=NEW))


@pytest.mark.parametrize("stage", ["generator", "both"])
def test_the_plan_knows_what_two_processes_share_out(stage, llama, lesson, monkeypatch):
    """All that learns but the few numbers that stand in a single row."""
    settings, given = params(lesson, train=stage), []
    monkeypatch.setattr(train_fit, "train", lambda *values, **_: given.extend(values) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learn(llama, settings)
    model, *_, learns = given
    outline = VloraTrain().plan(open_checkpoint(llama), settings)
    rows = [one for one in learns.values() if one.parameter.shape[0] == 1]
    numbers = sum(one.parameter.numel() for one in [*sharable(model, learns, 2).values(), *rows])
    assert outline.shared_bytes == shared_bytes(numbers) < outline.workspace_bytes


def chain(lesson, base, *more, **sizes):
    """A recipe that trains a generator, one step long."""
    data, features = str(lesson / "rows.jsonl"), str(lesson / "features.safetensors")
    new = {f"new.{key}": value for key, value in {**NEW, **sizes}.items()}
    first = {"use": "vlora-train", "data": data, "features": features, "batch_size": 4, "steps": 1, **new}
    return write_recipe(lesson / "r.toml", base, first, *more, path=str(lesson / "out"))


def test_a_rank_larger_than_a_dimension_is_refused(lesson, tiny_folder):
    ran = regraft("apply", chain(lesson, tiny_folder("llama"), rank=65))
    assert ran.code == 2
    assert "rank: 65 is larger than a dimension: inputs of q is 64" in ran.err
    assert not (lesson / "out").exists()


def test_a_generator_that_is_trained_and_used_in_one_recipe_leaves_an_adapter(lesson, tiny_folder):
    sees = {"use": "vlora", "features": str(lesson / "features.safetensors"), "names": ["red"]}
    done("apply", chain(lesson, tiny_folder("llama"), sees, types="qkvo"))
    kept = {path.name for path in (lesson / "out").iterdir()}
    assert kept == {"README.md", "adapter_config.json", "adapter_model.safetensors", "regraft", "regraft.lock.json"}


BAD_ROWS = {
    "no such image": ({"prompt": "a", "answer": "b", "image": "none.png"}, InputError, "rows.jsonl:5.*no such image"),
    "outside": ({"prompt": "a", "answer": "b", "image": "../x.png"}, InputError, "outside of the folder of images"),
    "two": ({"prompt": "a", "answer": "b", "image": "x", "features": "red"}, InputError, "both an image and features"),
    "list": ({"prompt": "a", "answer": "b", "image": ["x"]}, InputError, "the path of one image"),
    "no such features": ({"prompt": "a", "answer": "b", "features": "pink"}, InputError, "no such features"),
    "no answer": ({"prompt": "a", "features": "red"}, InputError, "rows.jsonl:5.*answer is missing"),
}


@pytest.mark.parametrize(("row", "kind", "words"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named(row, kind, words, llama, lesson):
    write(lesson / "rows.jsonl", [*rows(), row])
    with pytest.raises(kind) as caught:
        learn(llama, params(lesson, steps=1))
    assert_words(words, caught.value)
    patch, _ = learn(llama, params(lesson, steps=1, data={"source": lesson / "rows.jsonl", "max_bad_rows": 1}))
    assert patch.metrics["data"]["bad_rows"] == 1


def assert_words(pattern, error):
    import re

    assert re.search(pattern, str(error).replace("\n", " ")), str(error)


def test_two_processes_learn_what_one_learns(llama, lesson, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [str(llama), str(lesson), str(tmp_path)]
    done = subprocess.run([*command, "-m", "tests.plugins.vlora.train_ranks", *arguments], env=variables, cwd=ROOT,
                          capture_output=True, text=True, timeout=240, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for stage, alone in both_stages(llama, lesson).items():
        assert same_bits(one[stage]["weights"], other[stage]["weights"])
        assert one[stage]["losses"] == other[stage]["losses"]
        for name, value in alone["weights"].items():
            torch.testing.assert_close(one[stage]["weights"][name], value, rtol=0, atol=2e-4)


def test_steps_behind_it_and_later_recipes_take_its_generator(llama, lesson, monkeypatch):
    monkeypatch.chdir(lesson)
    common = {"use": "vlora-train", "data": "rows.jsonl", "features": "features.safetensors", "batch_size": 4,
              "lr": 1e-3}  # fmt: skip
    first = {**common, "id": "first", **{f"new.{key}": value for key, value in {**NEW, "types": "qkvo"}.items()}}
    second = {**common, "id": "second", "train": "both"}
    baked = {"use": "vlora", "features": "features.safetensors", "names": ["red"], "output": "merged"}
    done("apply", write_recipe(lesson / "three.toml", llama, first, second, baked), "-o", "three")
    done("apply", write_recipe(lesson / "two.toml", llama, first, second), "-o", "two")
    done("verify", "two", "--deep")
    done("apply", write_recipe(lesson / "late.toml", "two", {**baked, "generator": "two/vlora"}), "-o", "late")
    assert same_bits(loaded(open_checkpoint("three")), loaded(open_checkpoint("late")))
    assert not same_bits(loaded(open_checkpoint("three")), loaded(open_checkpoint("two")))
    assert names(Path("two/vlora")) == ["config.json", "model.safetensors"]
    assert not Path("three/vlora").exists()
    done("apply", write_recipe(lesson / "found.toml", "two", baked), "-o", "found")
    assert same_bits(loaded(open_checkpoint("three")), loaded(open_checkpoint("found")))
    assert not Path("late/vlora").exists()
    assert not Path("found/vlora").exists()
    beside = {**baked, "generator": "two/vlora", "output": "adapter"}
    done("apply", write_recipe(lesson / "beside.toml", "two", beside), "-o", "beside")
    assert Path("beside/adapter_model.safetensors").is_file()
    again = {key: value for key, value in second.items() if key != "id"}
    assert (
        "the generator of an earlier step goes on" in done("plan", write_recipe(lesson / "on.toml", "two", again)).out
    )
    Path("two/vlora/model.safetensors").unlink()
    refused = regraft("plan", write_recipe(lesson / "again.toml", "two", again))
    assert refused.code == 2
    assert "the base was made together with a generator" in refused.err
