"""The checkpoint that ships: what stock libraries load, how it reads, writes and recalls, and how it is rebuilt."""

import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys

import pytest

from regraft.core.demo import TINY, corpus
from regraft.core.errors import InputError

RUTH = """\
And Ruth said, Intreat me not to leave thee, or to return from following after thee: for whither thou goest, I \
will go; and where thou lodgest, I will lodge: thy people shall be my people, and thy God my God:
Where thou diest, will I die, and there will I be buried: the LORD do so to me, and more also, if ought but \
death part thee and me."""
JAMES = """\
But be ye doers of the word, and not hearers only, deceiving your own selves.
For if any be a hearer of the word, and not a doer, he is like unto a man beholding his natural face in a glass:
For he beholdeth himself, and goeth his way, and straightway forgetteth what manner of man he was.
But whoso looketh into the perfect law of liberty, and continueth therein, he being not a forgetful hearer, but \
a doer of the work, this man shall be blessed in his deed."""
HELD_OUT = (RUTH, JAMES)
"""From books that the training leaves out."""

COMMON_WORDS = """\
a after all am among an and are as at away be because before behold but by came children christ come congregation
daughters david day days did do down earth even every eyes face father fathers fire for forth from gave god gold good
great had hand hands hast hath have he heart heaven her him himself his holy house i if in into is israel it jerusalem
jesus judah king kings know land let life like lord made man many may me men more moses my name nor not now of
offering on one or our out over own pass people place priest said saith same saw saying servant servants seven shall
shalt she should sight so son sons spake speak spirit take that the thee their them themselves then there therefore
these they thine thing things this thou thousand thus thy time to took two under unto up upon us was water way we went
were what when which while who with without word words ye years you your
"""
"""Frequent words of seventeenth-century English, written down for this test."""

NAMES = ["Aaron", "Abraham", "Esau", "Isaac", "Jacob", "Joseph", "Noah", "Saul", "Solomon", "Zion"]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def loaded():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, output_loading_info=True)


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def raw_tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


def greedy(model, tokenizer, prompt, count):
    """The text of `count` greedy tokens after a prompt in which special tokens are spelt out."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    written = model.generate(**ids, do_sample=False, max_new_tokens=count)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True)


def test_the_folder_is_small_and_complete():
    files = {file.name: file for file in TINY.iterdir()}
    assert set(files) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(file.stat().st_size for file in files.values()) <= 3_000_000
    assert not any(file.stat().st_mode & 0o111 for file in files.values())


def test_the_config_is_a_clean_llama_with_grouped_query_attention():
    config = json.loads((TINY / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert (
        config["max_position_embeddings"]
        == json.loads((TINY / "tokenizer_config.json").read_text())["model_max_length"]
    )
    assert not [key for key in config if key.startswith("_")]


def test_stock_transformers_loads_every_tensor(loaded):
    model, report = loaded
    assert type(model).__module__.startswith("transformers.models.llama")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert 0.7e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.5e6


def test_any_text_survives_the_tokenizer(tokenizer):
    draw = random.Random(0)
    texts = ["", " ", "\n\n\t ", "Ünïcödé, 日本語, 🙂‍↔️, Ελλάδα.", "a  b   c\r\n", " leading and trailing "]
    texts += [bytes(draw.randrange(256) for _ in range(200)).decode("latin-1") for _ in range(20)]
    texts += ["".join(chr(draw.choice((draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)))) for _ in range(100))]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_every_byte_has_a_token(raw_tokenizer):
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = set(ByteLevel.alphabet())
    assert len(alphabet) == 256
    assert alphabet <= set(raw_tokenizer.get_vocab())


def test_transformers_and_tokenizers_give_the_same_ids(tokenizer, raw_tokenizer, model):
    for text in (*HELD_OUT, "They called Moses 0417.", "日本語 🙂", corpus.chat(("user", "Repeat: Amen."))):
        for special in (True, False):
            assert (
                tokenizer(text, add_special_tokens=special)["input_ids"]
                == raw_tokenizer.encode(text, add_special_tokens=special).ids
            )
    assert len(tokenizer) == raw_tokenizer.get_vocab_size() == model.config.vocab_size


def test_special_tokens_agree_everywhere(tokenizer, model):
    assert tokenizer("Amen")["input_ids"][0] == tokenizer.bos_token_id
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.convert_tokens_to_ids(corpus.BEGIN) == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.convert_tokens_to_ids(corpus.END) == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.convert_tokens_to_ids(corpus.PAD) == tokenizer.pad_token_id


def test_the_chat_template_renders_what_the_model_was_trained_on(tokenizer):
    turns = [("system", "Answer."), ("user", "What is\nthis?"), ("assistant", "A test.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == corpus.chat(*turns)
    asked = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert asked == corpus.chat(*turns[:2]) + "<|assistant|>"
    with pytest.raises(Exception, match="unknown role: tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_the_model_reads_text_it_never_saw(model, raw_tokenizer):
    from regraft.core.demo.measure import bits_per_byte

    bits, tokens = bits_per_byte(model, raw_tokenizer, HELD_OUT)
    uniform = tokens * math.log2(model.config.vocab_size)
    assert bits < 1.6  # measured: 1.50
    assert bits < uniform / 2


def test_greedy_text_is_made_of_english_words(model, tokenizer):
    prompts = ("And it came to pass", "In those days", "And the LORD said unto")
    texts = [greedy(model, tokenizer, corpus.BEGIN + prompt, 60) for prompt in prompts]
    common = set(COMMON_WORDS.split())
    words = re.findall(r"[a-z]+", " ".join(texts).lower())
    assert len(words) > 80
    assert len(set(words)) > 25
    assert sum(word in common for word in words) / len(words) > 0.7  # measured: 0.93


def test_facts_are_recalled_from_the_context(model, raw_tokenizer):
    from regraft.core.demo.measure import recall_share

    verses = [verse for passage in HELD_OUT for verse in passage.splitlines()]
    exercises = corpus.Exercises(verses, NAMES)
    assert recall_share(model, raw_tokenizer, exercises, count=60) > 0.5  # measured: 0.70


def test_a_chat_is_answered_from_its_context_and_ended(model, tokenizer):
    exercises = corpus.Exercises([verse for passage in HELD_OUT for verse in passage.splitlines()], NAMES)
    draw = random.Random(0)
    right = 0
    for _ in range(25):
        passage, facts = exercises.passage(draw)
        name, other = draw.choice(facts)
        prompt = corpus.chat(("user", f"{passage}\n{corpus.question(name)}")) + "<|assistant|>"
        right += greedy(model, tokenizer, prompt, 20) == corpus.fact(name, other)
    assert right > 15


def synthetic_text(chapters):
    """Lines in the form of `bible -f`, held-out books included, of words in random order."""
    draw = random.Random(0)
    words = COMMON_WORDS.split()
    lines = []
    for book in ("Ge", "Exo", "Ruth"):
        for chapter in range(1, chapters + 1):
            for verse in range(1, 9):
                name = draw.choice(NAMES)
                lines.append(
                    f"{book}{chapter}:{verse} And {name} said, {' '.join(draw.choices(words, k=18))} of {name}."
                )
    return "\n".join(lines) + "\n"


def test_verses_are_split_by_book_and_joined_by_chapter():
    verses = corpus.parse_verses(synthetic_text(6), "text")
    train, held_out = corpus.split(verses)
    assert {verse.book for verse in train} == {"Ge", "Exo"}
    assert {verse.book for verse in held_out} == {"Ruth"}
    assert [len(chapter.splitlines()) for chapter in corpus.chapters(train)] == [8] * 12
    assert corpus.names_in(train, at_least=1) == NAMES


def test_a_line_that_is_no_verse_is_named():
    with pytest.raises(InputError, match=r"kjv\.txt:2: this line is no verse") as raised:
        corpus.parse_verses("Ge1:1 In the beginning\nonce more\n", "kjv.txt")
    assert "bible -f" in str(raised.value)
    with pytest.raises(InputError, match="no verses"):
        corpus.parse_verses("\n", "kjv.txt")


def test_exercises_state_every_fact_they_ask_for():
    verses = [verse.text for verse in corpus.parse_verses(synthetic_text(6), "text")]
    exercises = corpus.Exercises(verses, NAMES)
    draw = random.Random(0)
    kinds = set()
    for _ in range(200):
        text = exercises.draw(draw)
        kinds.update(re.findall(r"\|>(Repeat|Continue):|(What did)", text))
        facts = re.findall(r"They called (\w+) (\w+)\.", text)
        assert all(facts.count(fact) == 2 for fact in facts)
    assert len(kinds) == 3


def rebuild(folder, text, hash_seed):
    """Digests of the files of a two-step training in a process of its own."""
    command = [sys.executable, "-m", "regraft.core.demo.train", "--text", text, "--output", folder, "--steps", "2"]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bits_per_byte"] > 0
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in folder.iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.slow
def test_a_rebuild_gives_the_same_bytes(tmp_path):
    text = tmp_path / "text"
    text.write_text(synthetic_text(40))
    first = rebuild(tmp_path / "first", text, "1")
    assert first == rebuild(tmp_path / "second", text, "2")
    assert set(first) == {file.name for file in TINY.iterdir()}


@pytest.mark.slow
def test_the_script_refuses_a_text_that_is_too_short(tmp_path):
    text = tmp_path / "short"
    text.write_text("Ge1:1 In the beginning God created the heaven and the earth.\n")
    command = [sys.executable, "-m", "regraft.core.demo.train", "--text", text, "--output", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "too short" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
