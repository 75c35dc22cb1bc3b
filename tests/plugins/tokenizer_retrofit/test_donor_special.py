"""A donor's special tokens under other names than ours: roles, ids in configs, lists, and the chat template."""

import json

import pytest

from regraft.core.errors import TransformationError, Unsupported
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from tests.materialise import materialise
from tests.plugins.tokenizer_retrofit import toys

NAMES = {"<s>": "<BOS>", "</s>": "<EOS>", "<pad>": "<PAD>", "<unk>": "<UNK>"}
ROLES = {"bos_token": "<BOS>", "eos_token": "<EOS>", "pad_token": "<PAD>", "unk_token": "<UNK>"}
VARIABLE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
OPTIONS = {"vocabulary": "replace-donor", "special": "donor", "size": None, "min_count": None}


def edited(folder, name, **values):
    file = folder / name
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **values}))


def base(folder, template=VARIABLE):
    toys.save("llama", folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def donor(folder, roles=ROLES, names=NAMES):
    """The Dutch tokenizer with other names for its special tokens, behind the words."""
    text = toys.backend("byte-bpe-dutch").to_str()
    for ours, theirs in names.items():
        text = text.replace(json.dumps(ours), json.dumps(theirs))
    folder.mkdir()
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


def test_the_donors_special_tokens_play_the_parts_in_every_file(tmp_path):
    from transformers import AutoTokenizer

    folder = base(tmp_path / "base")
    decoder = {str(index): {"content": token, "special": True} for index, token in enumerate(NAMES)}
    edited(folder, "tokenizer_config.json", added_tokens_decoder={**decoder, "9": {"content": "x"}},
           additional_special_tokens=["</s>", "<UNK>"], sep_token="</s>",
           unk_token={"__type": "AddedToken", "content": "<unk>"})  # fmt: skip
    edited(folder, "special_tokens_map.json", bos_token={"content": "<s>", "lstrip": False}, cls_token="<s>")
    before, after, patch = toys.retrofit(folder, None, donor=donor(tmp_path / "donor"), **OPTIONS)
    settings = after.json("tokenizer_config.json")
    assert {role: settings.get(role) for role in (*ROLES, "sep_token")} == {**ROLES, "sep_token": None}
    assert settings["additional_special_tokens"] == ["<UNK>"]
    assert {index: entry["content"] for index, entry in settings["added_tokens_decoder"].items()} == {
        str(entry["id"]): entry["content"] for entry in after.json("tokenizer.json")["added_tokens"]
    }
    assert after.json("special_tokens_map.json") == {"bos_token": "<BOS>"}
    loaded = AutoTokenizer.from_pretrained(materialise(after, tmp_path / "out"))
    assert len(loaded) == after.config["vocab_size"]
    for role, token in ROLES.items():
        index = loaded.convert_tokens_to_ids(token)
        assert getattr(loaded, f"{role}_id") == index
        for config in (after.config, after.generation_config):
            assert config.get(f"{role}_id", index) == index
    chat = loaded.apply_chat_template([{"role": "user", "content": "de"}])["input_ids"]
    assert [chat[0], chat[-1]] == [loaded.bos_token_id, loaded.eos_token_id]
    table, new = (checkpoint.load("model.embed_tokens.weight") for checkpoint in (before, after))
    assert (new[loaded.eos_token_id] == table[2]).all()
    assert patch.metrics["proof"]["model"]


@pytest.mark.parametrize("shared", ["theirs", "ours"])
def test_one_token_in_several_parts_has_the_id_and_the_row_of_each(tmp_path, shared):
    folder = base(tmp_path / "base", "{{ eos_token }}{{ messages[0]['content'] }}")
    roles = ROLES
    if shared == "theirs":
        roles = {"bos_token": "<EOS>", "eos_token": "<EOS>", "unk_token": "<EOS>"}
    else:
        edited(folder, "tokenizer_config.json", bos_token="</s>", pad_token="</s>")
        for name in ("config.json", "generation_config.json"):
            edited(folder, name, bos_token_id=2, eos_token_id=[2], pad_token_id=2)
    if shared == "theirs":
        for name in ("config.json", "generation_config.json"):
            edited(folder, name, pad_token_id=None)
    before, after, _ = toys.retrofit(folder, None, donor=donor(tmp_path / "donor", roles), proof="files", **OPTIONS)
    stock = Run("x").tokenizer(after)
    eos = after.config["eos_token_id"]
    assert (eos[0] if isinstance(eos, list) else eos) == stock.eos_token_id
    assert after.config["bos_token_id"] == stock.bos_token_id
    assert after.config["pad_token_id"] == (stock.pad_token_id if shared == "ours" else None)
    table, new = (checkpoint.load("model.embed_tokens.weight") for checkpoint in (before, after))
    assert (new[stock.eos_token_id] == table[2]).all()


def test_a_chat_template_with_tokens_that_are_gone_is_refused_by_their_names(tmp_path):
    folder = base(tmp_path / "base", "<s>{{ messages[0]['content'] }}")
    theirs = donor(tmp_path / "donor")
    with pytest.raises(Unsupported, match="'<s>'") as refusal:
        toys.retrofit(folder, None, donor=theirs, **OPTIONS)
    assert "</s>" not in str(refusal.value)
    _, after, _ = toys.retrofit(folder, None, donor=theirs, proof="files", **{**OPTIONS, "special": "source"})
    assert Run("x").tokenizer(after).bos_token == "<s>"


def test_tokens_that_only_transformers_knows_fail_the_step(tmp_path, folder):
    """A base may name one that its tokenizer.json lacks: transformers appends it where no row is."""
    given = base(tmp_path / "base")
    edited(given, "tokenizer_config.json", mask_token="<mask>")
    with pytest.raises(TransformationError, match="'<mask>'"):
        toys.retrofit(given, folder / "corpus.txt", proof="files")
    (given / "chat_template.jinja").unlink()
    theirs = donor(tmp_path / "donor", {**ROLES, "sep_token": "<sep>"})
    _, after, _ = toys.retrofit(given, None, donor=theirs, proof="files", **OPTIONS)
    assert "mask_token" not in after.json("tokenizer_config.json")
    assert open_checkpoint(given).json("tokenizer_config.json")["mask_token"] == "<mask>"
