"""Vocabularies for tests: small byte-level and SentencePiece ones, as metadata and rebuilt."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from regraft.core.gguf.metadata import Metadata
from regraft.core.gguf.tokenizer import tokenizer_files
from tests.core.gguf.writing import metadata

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't care.\n\n1. First item\n2. Second item\n",
    "In 2024 there were 12345 foxes; in 1999 only 17.  They're quick!\n\tdef main(): return 0\r\n",
    "El zorro marrón salta sobre el perro perezoso. 北京的狐狸跳过了懒狗。 Быстрая лиса прыгает.\n" * 2,
    "HTTPServer parseJSON camelCase SHOUTING 3.14159 !!! ??? ... -- ==\n",
] * 4
PROBES = [
    "",
    "a",
    " lead",
    "trail ",
    "\n\n1.",
    "12 345 6789",
    "I'M we'LL don't",
    "x\t\ty",
    "  two  spaces ",
    "猫と犬 лиса marrón",
    "e\u0301",
    "camelCaseHTTP",
    "a\r\n\r\nb",
    "1\n2\n\n3",
    "?!",
    *CORPUS[:4],
]

CONTROL, USER_DEFINED, NORMAL, UNUSED, BYTE, UNKNOWN = 3, 4, 1, 5, 6, 2
SPECIALS = ["<|begin|>", "<|end|>", "<|pad|>"]


def random_texts(count, alphabet, seed=0):
    generator = random.Random(seed)
    return ["".join(generator.choices(alphabet, k=generator.randint(1, 40))) for _ in range(count)]


def trained(pre_tokenizer, normalizer=None, *, whole_words=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def published(name):
    """The pre-tokenizer as the models' own tokenizer.json has it, built with the tokenizers library."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    if name in {"gpt-2", "default"}:
        return gpt2
    if name in {"smollm", "starcoder", "refact"}:
        return pre_tokenizers.Sequence([digits, gpt2])
    if name == "deepseek-coder":
        patterns = ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"]
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        return pre_tokenizers.Sequence([*splits, digits, byte_level])
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    pattern = Regex(GGUF_PRE_TOKENIZER_SPLITS[name])
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])


def byte_level_metadata(tokenizer, pre, **more):
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return metadata(
        tokenizer__ggml__model="gpt2",
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__token_type=[CONTROL if token in SPECIALS else NORMAL for token in tokens],
        tokenizer__ggml__merges=[" ".join(pair) for pair in model["merges"]],
        **({} if pre is None else {"tokenizer__ggml__pre": pre}),
        **more,
    )


def files_of(values, *, rows=None, in_order=False, **ids):
    special = {"bos_token_id": None, "eos_token_id": None, "unk_token_id": None, "pad_token_id": None, **ids}
    rows = rows or len(values["tokenizer.ggml.tokens"])
    return tokenizer_files(Metadata(Path("model.gguf"), values), rows, special, in_order=in_order)


def rebuilt(values, **options):
    return Tokenizer.from_str(files_of(values, **options)[0]["tokenizer.json"].read().decode())
