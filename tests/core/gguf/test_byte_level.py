"""Byte-level tokenizers rebuilt from GGUF metadata against the tokenizers that the metadata was taken from."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, trainers

from regraft.core.errors import InputError
from regraft.core.gguf.pretokenizers import SPLITS
from tests.core.gguf.vocabularies import (
    CORPUS,
    PROBES,
    SPECIALS,
    UNUSED,
    USER_DEFINED,
    byte_level_metadata,
    files_of,
    published,
    random_texts,
    rebuilt,
    trained,
)

WHOLE_WORDS = ("llama-bpe", "llama3", "falcon3", "tekken")
MERGED = (
    "gpt-2",
    "smollm",
    "starcoder",
    "refact",
    "deepseek-coder",
    "dbrx",
    "smaug-bpe",
    "qwen2",
    "deepseek-r1-qwen",
    "gpt-4o",
)


@pytest.mark.parametrize("pre", [*WHOLE_WORDS, *MERGED])
def test_byte_level_tokenizer_gives_the_ids_of_the_original(pre):
    split = SPLITS[pre]
    normalizer = normalizers.NFC() if pre == "qwen2" else None
    original = trained(published(pre), normalizer, whole_words=pre in WHOLE_WORDS)
    assert split.whole_words == (pre in WHOLE_WORDS)
    ours = rebuilt(byte_level_metadata(original, pre))
    for probe in PROBES + random_texts(300, "aB 1\n'sé猫.\t-lL"):
        assert ours.encode(probe).ids == original.encode(probe).ids, probe
        assert ours.decode(ours.encode(probe).ids) == original.decode(original.encode(probe).ids)


def test_smollm_splits_single_digits_off():
    corpus = ["\n\n\n\n a \n\n b 12 12 12 12"] * 9
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = published("smollm")
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    values = byte_level_metadata(tokenizer, "smollm")
    assert rebuilt(values).encode("\n\n1").tokens == ["ĊĊ", "1"]
    assert rebuilt({**values, "tokenizer.ggml.pre": "gpt-2"}).encode("\n\n1").tokens == ["Ċ", "Ċ", "1"]
    assert rebuilt(values).encode("12").tokens == ["1", "2"]


def test_deepseek_llm_splits_as_published():
    split = SPLITS["deepseek-llm"]
    steps = {"type": "Sequence", "pretokenizers": split.steps(False)[:-1]}
    shell = json.loads(Tokenizer(models.BPE()).to_str()) | {"pre_tokenizer": steps}
    pre = Tokenizer.from_str(json.dumps(shell)).pre_tokenizer
    pieces = [piece for piece, _ in pre.pre_tokenize_str("Hello мир, x12\n狐狸 don't  ")]
    assert pieces == ["Hello", " мир", ",", " x", "1", "2", "\n", "狐狸", " don", "'", "t", "  "]


def test_cased_letters_of_deepseek_llm_are_letters():
    import re
    import unicodedata

    pattern = SPLITS["deepseek-llm"].patterns[1]
    letters = re.compile(pattern.removeprefix(r"\s?").removesuffix("+"))
    listed = [chr(code) for code in range(0x110000) if letters.match(chr(code))]
    assert len(listed) > 2500
    assert {unicodedata.category(char) for char in listed} == {"Lu", "Ll", "Lt"}
    everyday = "ABCXYZabcxyzßéñøÅçŁőşαβγωΩабвЯжюїґ"
    assert all(letters.match(char) for char in everyday)
    assert not any(letters.match(char) for char in "0_ -'猫あ한ªא")


def test_unnamed_pretokenizer_is_gpt2_and_a_note_says_so():
    original = trained(published("gpt-2"))
    for pre in (None, "default"):
        values = byte_level_metadata(original, pre)
        assert rebuilt(values).encode(CORPUS[0]).ids == original.encode(CORPUS[0]).ids
        assert "pre-tokenizer" in files_of(values)[1][0]
    assert files_of(byte_level_metadata(original, "gpt-2"))[1] == ()


def test_special_and_defined_tokens_are_found_in_text():
    original = trained(published("gpt-2"))
    values = dict(byte_level_metadata(original, "gpt-2"))
    values["tokenizer.ggml.tokens"] = [*values["tokenizer.ggml.tokens"], "<think>", "[PAD604]"]
    values["tokenizer.ggml.token_type"] = [*values["tokenizer.ggml.token_type"], USER_DEFINED, UNUSED]
    count = len(values["tokenizer.ggml.tokens"])
    ours = rebuilt(values)
    assert ours.encode("a<|end|>b<think>").ids[1::2] == [1, count - 2]
    assert ours.decode([count - 2, 1], skip_special_tokens=True) == "<think>"
    assert ours.token_to_id("[PAD604]") is None
    assert ours.get_vocab_size() == count - 1


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (True, False), (False, True), (False, False)])
def test_bos_and_eos_are_added_as_the_flags_say(bos, eos):
    original = trained(published("gpt-2"))
    flags = {"tokenizer__ggml__add_bos_token": bos, "tokenizer__ggml__add_eos_token": eos}
    ours = rebuilt(byte_level_metadata(original, "gpt-2", **flags), bos_token_id=0, eos_token_id=1)
    plain = original.encode("fox").ids
    one = [0] * bos + plain + [1] * eos
    assert ours.encode("fox").ids == one
    assert ours.encode("fox", "fox").ids == one + one
    assert ours.encode("fox", add_special_tokens=False).ids == plain


def test_llama3_begins_with_bos_unless_told_otherwise():
    original = trained(published("llama-bpe"), whole_words=True)
    values = byte_level_metadata(original, "llama-bpe")
    assert rebuilt(values, bos_token_id=0).encode("fox").ids[0] == 0
    assert rebuilt({**values, "tokenizer.ggml.add_bos_token": False}, bos_token_id=0).encode("fox").ids[0] != 0
    assert rebuilt(values).encode("fox").ids == original.encode("fox").ids


def test_transformers_reads_the_files(tmp_path):
    from transformers import AutoTokenizer

    original = trained(published("smollm"))
    template = "{% for message in messages %}<|begin|>{{ message['content'] }}<|end|>{% endfor %}"
    values = byte_level_metadata(
        original, "smollm", tokenizer__ggml__add_bos_token=True, tokenizer__chat_template=template
    )
    files, _ = files_of(values, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    for name, file in files.items():
        (tmp_path / name).write_bytes(file.read())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    raw = Tokenizer.from_str(files["tokenizer.json"].read().decode())
    for probe in PROBES:
        assert loaded(probe)["input_ids"] == raw.encode(probe).ids
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == tuple(SPECIALS)
    assert loaded.model_max_length == 128
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|begin|>hi<|end|>"
    assert json.loads(files["tokenizer_config.json"].read())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_named_chat_templates_stay_in_their_folder():
    original = trained(published("gpt-2"))
    more = {"tokenizer__chat_templates": ["tool_use"], "tokenizer__chat_template__tool_use": "tools"}
    files, _ = files_of(byte_level_metadata(original, "gpt-2", **more))
    assert files["additional_chat_templates/tool_use.jinja"].read() == b"tools"
    more = {"tokenizer__chat_templates": ["../../evil"], "tokenizer.chat_template.../../evil": "x"}
    with pytest.raises(InputError, match="no plain name"):
        files_of(byte_level_metadata(original, "gpt-2", **more))
