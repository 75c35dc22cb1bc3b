"""Tokens that are added in the places of reserved ones: nothing else changes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from regraft.core.errors import UsageError
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.spell import Speller
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from tests.materialise import materialise
from tests.plugins.tokenizer_retrofit import toys

TOOLS = ["<|tool|>", "<|end tool|>"]
ADD = {"vocabulary": "add-tokens", "add": TOOLS, "size": None, "min_count": None}


def read(folder, name):
    return json.loads((folder / name).read_text())


def write(folder, name, document):
    (folder / name).write_text(json.dumps(document))


def entry(index, content):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}


def llama3(folder, **options):
    """With reserved tokens above the model's vocabulary, two of them in use, and padding rows behind."""
    toys.save("llama", folder, rows=336, **options)
    document = read(folder, "tokenizer.json")
    names = [f"<|reserved_{number}|>" for number in range(8)]
    document["added_tokens"] += [entry(320 + place, name) for place, name in enumerate(names)]
    write(folder, "tokenizer.json", document)
    write(folder, "config.json", {**read(folder, "config.json"), "pad_token_id": 320})
    generation = {**read(folder, "generation_config.json"), "pad_token_id": 320}
    write(folder, "generation_config.json", generation)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("<|reserved_1|>" + template)
    config = read(folder, "tokenizer_config.json")
    flags = [(str(token["id"]), {key: token[key] for key in token if key != "id"})
             for token in document["added_tokens"]]  # fmt: skip
    lists = {"additional_special_tokens": [names[2], names[3], names[4]]}
    write(folder, "tokenizer_config.json", {**config, **lists, "pad_token": names[0], "added_tokens_decoder":
                                            dict(flags)})  # fmt: skip
    write(folder, "special_tokens_map.json", lists)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_have_the_ids_of_reserved_ones_and_all_other_rows_their_bits(tmp_path, tied):
    folder = llama3(tmp_path / "base", tie_word_embeddings=tied)
    before, after, patch = toys.retrofit(folder, None, **ADD, reserved="<|reserved_*|>")
    assert {name: spec.shape for name, spec in after.specs.items()} == {
        name: spec.shape for name, spec in before.specs.items()
    }
    assert after.config == before.config
    assert after.generation_config == before.generation_config
    old, new = TokenizerFile.of(before), TokenizerFile.of(after)
    assert [new.ids[text] for text in TOOLS] == [322, 323]  # 320 pads, 321 stands in the chat template
    assert new.ids.keys() == (old.ids.keys() - {"<|reserved_2|>", "<|reserved_3|>"}) | set(TOOLS)
    assert patch.edits.keys() == {"model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])}
    for name in patch.edits:
        table, made = before.load(name), after.load(name)
        for index in range(336):
            if index in (322, 323):
                parts = list(Speller(old).spell(new.tokens[index].encode()))
                torch.testing.assert_close(made[index], table[parts].mean(0))
            else:
                assert torch.equal(made[index], table[index])
    assert "2 tokens have the ids of reserved ones, <|reserved_2|> first" in patch.notes
    ids = json.loads(patch.reports["id_map.json"].read())
    assert [index for index, now in enumerate(ids["old_to_new"]) if now != index] == [322, 323]
    assert ids["composed_of"].keys() == {"322", "323"}
    stock = Run("x").tokenizer(open_checkpoint(materialise(after, tmp_path / "out")))
    assert stock.get_vocab() == dict(new.ids)
    assert stock("a<|tool|>b", add_special_tokens=False)["input_ids"][1] == 322
    assert 322 not in stock("<|reserved_2|>", add_special_tokens=False)["input_ids"]
    assert stock.decode([322, old.ids["a"]], skip_special_tokens=True) == "a"
    decoder = read(tmp_path / "out", "tokenizer_config.json")["added_tokens_decoder"]
    assert [decoder[index]["content"] for index in ("321", "322", "323", "324")] == [
        "<|reserved_1|>", *TOOLS, "<|reserved_4|>"]  # fmt: skip
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert read(tmp_path / "out", name)["additional_special_tokens"] == [*TOOLS, "<|reserved_4|>"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_input_embeddings().weight, after.load("model.embed_tokens.weight"))


@pytest.mark.parametrize("kind", ["byte-bpe", "piece-bpe", "unigram", "wordpiece"])
def test_entries_of_the_models_own_vocabulary_give_their_places(tmp_path, kind):
    folder = toys.save("llama", tmp_path / "base", kind, rows=400)
    document = read(folder, "tokenizer.json")
    model = document["model"]
    first = len(model["vocab"])
    for place in range(3):
        token = f"[unused{place}]"
        if kind == "unigram":
            model["vocab"].append([token, -50.0])
        else:
            model["vocab"][token] = first + place
    write(folder, "tokenizer.json", document)
    before, after, _ = toys.retrofit(folder, None, **ADD, reserved="[unused*]", add_special=False)
    old, new = TokenizerFile.of(before), TokenizerFile.of(after)
    assert [new.ids[text] for text in TOOLS] == [old.ids["[unused0]"], old.ids["[unused1]"]] == [first, first + 1]
    assert new.ids["[unused2]"] == first + 2
    assert not {"[unused0]", "[unused1]"} & new.ids.keys()
    cut = Run("x").tokenizer(after)("in<|tool|>the", add_special_tokens=False)["input_ids"]
    assert first in cut
    assert new.backend().decode(cut).replace(" ", "") == "in<|tool|>the"


def test_too_few_reserved_tokens_are_counted_and_none_in_use_is_taken(tmp_path):
    folder = llama3(tmp_path / "base")
    more = {**ADD, "add": [f"<|new {number}|>" for number in range(7)]}
    with pytest.raises(UsageError) as refusal:
        toys.retrofit(folder, None, **more, reserved="<|reserved_*|>")
    assert "expected: 7" in str(refusal.value)
    assert "found: 8, 2 of them in use" in str(refusal.value)
    with pytest.raises(UsageError, match="found: 2, 2 of them in use"):
        toys.retrofit(folder, None, **ADD, reserved="<*s>")
    with pytest.raises(UsageError, match="found: 0, 0 of them in use"):
        toys.retrofit(folder, None, **ADD, reserved="<.reserved_[0-9]*")


def test_a_token_with_which_the_file_pads_is_in_use(tmp_path):
    folder = llama3(tmp_path / "base")
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_id": 325, "pad_token": "<|reserved_5|>",
               "pad_type_id": 0, "pad_to_multiple_of": None}  # fmt: skip
    write(folder, "tokenizer.json", {**read(folder, "tokenizer.json"), "padding": padding})
    more = {**ADD, "add": [f"<|new {number}|>" for number in range(6)]}
    with pytest.raises(UsageError, match="found: 8, 3 of them in use"):
        toys.retrofit(folder, None, **more, reserved="<|reserved_*|>")


def test_learnt_rows_are_those_of_the_places_alone(tmp_path):
    text = tmp_path / "chats.txt"
    text.write_text("<|tool|>the word<|end tool|> was with them\n" * 20)
    folder = llama3(tmp_path / "base")
    before, after, patch = toys.retrofit(
        folder, None, **ADD, reserved="<|reserved_*|>", held_out=text,
        adapt={"data": str(text), "steps": 8, "tokens": 32, "lr": 0.02, "warmup_steps": 0},
    )  # fmt: skip
    old, made = before.load("model.embed_tokens.weight"), after.load("model.embed_tokens.weight")
    moved = [index for index in range(336) if not torch.equal(old[index], made[index])]
    assert moved == [322, 323]
    assert patch.metrics["bpb_adapted"] < patch.metrics["bpb_initial"]
