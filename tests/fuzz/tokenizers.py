"""Targets: tokenizers, and the vectors and dictionaries of their words."""

from __future__ import annotations

import json

from tests.fuzz import mutations
from tests.fuzz.contract import REFUSALS, target
from tests.fuzz.honest import base, document, put, scratch


def tokenizers() -> list[bytes]:
    from tests.core.data.vocabularies import KINDS, tokenizer

    files = [json.loads(tokenizer(kind).backend_tokenizer.to_str()) for kind in KINDS]
    wordpiece = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                 "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1, "##b": 2}}  # fmt: skip
    bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "unk_token": "a"}
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.5]]}
    added = [{"id": 7, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False}]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pipeline = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}, "post_processor": None,
                "pre_tokenizer": byte_level, "decoder": byte_level}  # fmt: skip
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **pipeline}
    return [*(document({**head, "model": model}) for model in (bpe, unigram, wordpiece)), document(files[0])]


@target(mutations.mutated_json, tokenizers)
def tokenizer(data: bytes) -> object:
    """tokenizer.json, as the steps that change vocabularies read it."""
    from regraft.core.jsonio import parse_object
    from regraft.core.verify.structure import token_ids
    from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

    parsed = parse_object(data, "tokenizer.json")
    token_ids(parsed)
    file = TokenizerFile.parse(parsed, "tokenizer.json")
    facts = (file.ids, file.tokens, file.rows, file.merges, file.scores, file.unknown, file.verbatim, file.spans_words)
    return facts, [file.bytes_of(token) for token in file.ids], file.stray()


def tokenizer_configs() -> list[bytes]:
    added = {"0": {"content": "<s>", "special": True}, "5": {"content": "x", "special": False}}
    return [document({"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": {"content": "<s>"},
                      "eos_token": "</s>", "added_tokens_decoder": added, "model_max_length": 128})]  # fmt: skip


@target(mutations.mutated_json, tokenizer_configs)
def tokenizer_config(data: bytes) -> object:
    """tokenizer_config.json, when rows move."""
    from dataclasses import replace

    from regraft.core.checkpoint import FileRef
    from regraft.core.sources import open_checkpoint
    from regraft.plugins.tokenizer_retrofit.donor import roles
    from regraft.plugins.tokenizer_retrofit.metadata import metadata

    checkpoint = open_checkpoint(base())
    checkpoint = replace(checkpoint, files={**checkpoint.files, "tokenizer_config.json": FileRef(data=data)})
    roles(checkpoint.json("tokenizer_config.json"))
    return metadata(checkpoint, 200, {n: n + 1 for n in range(200)}, padding=3)


@target(mutations.mutated_text, lambda: [b"king reine\nroi queen\n", b"3 2\nking 0.5 -1e-3\nqueen 1 2\n# 3 4\n"])
def word_vectors(data: bytes) -> object:
    """fastText's text form, and a dictionary."""
    from regraft.plugins.tokenizer_retrofit.wechsel import read_dictionary, read_vectors

    file = put(scratch() / "words.vec", data)
    try:
        return read_vectors(file, ["king", "queen", "#"])
    except REFUSALS:
        return read_dictionary(file)
