"""Config against tensors, tied heads, vocabularies: what is a fault, what a note, and what nothing at all."""

import json

import pytest

from regraft.core.errors import InputError, VerificationError
from regraft.core.sources import open_checkpoint
from regraft.core.verify import Finding, check_structure, raise_findings, same_vocabulary
from regraft.core.verify.load import verify_load
from regraft.core.verify.structure import token_ids
from tests.checkpoints import read_all, write_checkpoint
from tests.families import CONFIGS, FAMILIES, save_tiny

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def remade(tiny_folder, tmp_path):
    """Called with a change of tensors and of the config, a checkpoint like the tiny llama but for these."""

    def folder(change=lambda tensors: None, files=None, **config):
        base = tiny_folder("llama")
        tensors = read_all(base)
        change(tensors)
        settings = {**json.loads((base / "config.json").read_text()), **config}
        side = {"tokenizer.json": (base / "tokenizer.json").read_text(), **(files or {})}
        return open_checkpoint(write_checkpoint(tmp_path / "remade", tensors, config=settings, files=side))

    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_in_order(family, tiny_folder):
    assert check_structure(open_checkpoint(tiny_folder(family))) == []


def test_a_missing_tensor(remade):
    (found,) = check_structure(remade(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")))
    assert found.fatal
    assert "model.layers.1.mlp.up_proj.weight" in found.where
    assert found.expected == "shape [96, 64]"


def test_a_missing_bias_is_missed_and_one_too_many_is_noted(remade):
    import torch

    found = check_structure(remade(attention_bias=True))
    assert len([finding for finding in found if finding.fatal]) == 2 * 4
    name = "model.layers.0.self_attn.q_proj.bias"
    (note,) = check_structure(remade(lambda tensors: tensors.update({name: torch.zeros(64)})))
    assert not note.fatal
    assert name in note.found


def test_another_shape(remade):
    import torch

    found = check_structure(remade(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)})))
    assert [(finding.expected, finding.found) for finding in found] == [("[64]", "[65]")]


def test_unknown_tensors_are_one_note(remade):
    import torch

    added = {f"extra.{number}.weight": torch.zeros(1) for number in range(5)}
    (note,) = check_structure(remade(lambda tensors: tensors.update(added)))
    assert not note.fatal
    assert note.message.startswith("5 tensors are unknown to the config")
    assert note.found == "extra.0.weight, extra.1.weight, extra.2.weight, ..."


def test_buffers_that_every_loader_ignores_are_not_worth_a_note(remade):
    import torch

    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    assert check_structure(remade(lambda tensors: tensors.update(old))) == []


def test_tensors_beside_the_text_model_are_known(tmp_path):
    """Gemma 3 with its vision tower."""
    assert check_structure(open_checkpoint(save_tiny("gemma3", tmp_path / "gemma3"))) == []


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_under_a_tied_config(remade, equal):
    def head(tensors):
        tensors[HEAD] = tensors[EMBEDDING].clone()
        if not equal:
            tensors[HEAD][3, 5] += 1e-3

    (found,) = check_structure(remade(head, tie_word_embeddings=True))
    assert found.fatal is not equal
    assert found.where.endswith(f": {HEAD}")
    assert ("stored a second time" if equal else "another head is stored") in found.message


def test_a_tied_head_that_is_not_stored(remade):
    assert check_structure(remade(lambda tensors: tensors.pop(HEAD), tie_word_embeddings=True)) == []


def test_an_untied_config_without_a_head(remade):
    (found,) = check_structure(remade(lambda tensors: tensors.pop(HEAD)))
    assert found.fatal
    assert HEAD in found.where


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_a_classifier_needs_no_head_over_the_vocabulary(task, tmp_path):
    import transformers

    stock = getattr(transformers, f"LlamaFor{task}")
    config = transformers.AutoConfig.for_model("llama", **{**CONFIGS["llama"], "num_labels": 3})
    stock(config).save_pretrained(tmp_path)
    (finding,) = check_structure(open_checkpoint(str(tmp_path)))
    assert not finding.fatal
    assert "score.weight" in finding.found
    report = verify_load(tmp_path, "forward", trust=False)
    assert report["class"] == f"LlamaFor{task}"
    assert report["finite"]


def test_the_head_of_gpt_neox_has_another_name(tiny_folder, tmp_path):
    tensors = read_all(tiny_folder("gpt_neox"))
    config = json.loads((tiny_folder("gpt_neox") / "config.json").read_text())
    tied = {**config, "tie_word_embeddings": True}
    (found,) = check_structure(open_checkpoint(write_checkpoint(tmp_path / "neox", tensors, config=tied)))
    assert found.fatal
    assert found.where.endswith(": embed_out.weight")


def tokenizer(*, vocab=None, added=None, kind="BPE"):
    return json.dumps({"model": {"type": kind, "vocab": vocab}, "added_tokens": added})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (tokenizer(vocab={"a": 127}), False),
        (tokenizer(vocab={"a": 128}), True),
        (tokenizer(vocab={"a": 0}, added=[{"id": 128, "content": "<x>"}]), True),
        (tokenizer(vocab=[["a", -1.0]] * 128, kind="Unigram"), False),
        (tokenizer(vocab=[["a", -1.0]] * 129, kind="Unigram"), True),
        (tokenizer(vocab=None, added=7), False),
        (json.dumps({}), False),
    ],
)
def test_tokenizers_and_rows(text, fault, remade):
    """Rows beyond the tokenizer are padding and fine; ids beyond the rows are not."""
    found = check_structure(remade(files={"tokenizer.json": text}))
    assert [finding.fatal for finding in found] == [True] * fault


def test_a_tokenizer_that_is_not_json_is_the_checkpoint_s_fault(remade):
    with pytest.raises(InputError, match="is not JSON"):
        check_structure(remade(files={"tokenizer.json": "{"}))


def test_token_ids_of_a_real_tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    folder = tiny_folder("llama")
    ids = token_ids(json.loads((folder / "tokenizer.json").read_text()))
    assert ids == AutoTokenizer.from_pretrained(folder).get_vocab()


def test_a_family_outside_the_table_is_a_note(remade):
    (note,) = check_structure(remade(model_type="florence2"))
    assert not note.fatal
    assert "not in regraft's table" in note.message
    assert note.where.endswith("config.json: model_type")


def test_a_config_that_is_no_config_is_a_fault(remade):
    (fault,) = check_structure(remade(num_hidden_layers="two"))
    assert fault.fatal
    assert fault.where.endswith("config.json: num_hidden_layers")


def test_the_same_vocabulary(remade, tiny_folder):
    base = open_checkpoint(tiny_folder("llama"))
    assert same_vocabulary(base, base)
    assert not same_vocabulary(base, open_checkpoint(tiny_folder("qwen2")))
    assert not same_vocabulary(base, remade())  # another file, even if it says the same


def test_the_first_fault_is_raised_with_the_number_of_the_others():
    note, first, second = (Finding("m", "w", "e", "f", "r", fatal=fatal) for fatal in (False, True, True))
    raise_findings([note], VerificationError)
    with pytest.raises(VerificationError) as caught:
        raise_findings([note, first, second], VerificationError)
    assert caught.value.as_json() == {
        "error": "VerificationError", "exit_code": 1, "message": "m (and 1 more)", "where": "w",
        "expected": "e", "found": "f", "remedy": "r",
    }  # fmt: skip
    assert str(first) == "w: m (expected e, found f)"
