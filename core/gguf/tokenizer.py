"""tokenizer.json, tokenizer_config.json and the chat templates from the metadata of a GGUF file.

Two kinds of vocabulary: `gpt2` (byte-level BPE with merges) and `llama` (SentencePiece BPE: scores and byte tokens).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regraft.core.checkpoint import TOKENIZER_CONFIG, FileRef
from regraft.core.gguf.metadata import Metadata
from regraft.core.gguf.pretokenizers import UNNAMED, byte_level, split_of
from regraft.core.gguf.vocabulary import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    WORD_START,
    Vocabulary,
    derived_merges,
    read_vocabulary,
    written_merges,
)
from regraft.core.jsonio import brief, dump

TOKENIZER, CHAT_TEMPLATE = "tokenizer.json", "chat_template.jinja"

_MODEL = "tokenizer.ggml.model"
_NO_TOKENIZER = frozenset({"", "none", "no_vocab"})
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PHI3_KEEPS_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})


@dataclass(frozen=True)
class Specials:
    """Special tokens by role (`bos_token_id` and so on), and whether bos and eos are added to every text."""

    ids: Mapping[str, int | None]
    add_bos: bool
    add_eos: bool

    def text(self, role: str, vocabulary: Vocabulary) -> str | None:
        """The token in a role, as text; None if nothing has it."""
        id_ = self.ids[f"{role}_token_id"]
        return None if id_ is None or id_ >= len(vocabulary.texts) else vocabulary.texts[id_]


def tokenizer_files(
    meta: Metadata, rows: int, special: Mapping[str, int | None], *, in_order: bool
) -> tuple[dict[str, FileRef], tuple[str, ...]]:
    """The files of the tokenizer, and what a user should know about them.

    Args:
        meta: of the file.
        rows: of the embedding.
        special: ids of the special tokens by role.
        in_order: a SentencePiece vocabulary merges in the order of its tokens rather than by their scores.

    Raises:
        InputError: a kind of tokenizer or of pre-tokenizer that regraft does not know, or a vocabulary that lies.
    """
    kind = meta.text(_MODEL, "")
    if kind in _NO_TOKENIZER:
        return {}, ("the GGUF file has no tokenizer, so the output has none either",)
    if kind not in {"gpt2", "llama"}:
        raise meta.fault(
            _MODEL,
            "is a kind of tokenizer that regraft does not rebuild",
            found=brief(kind),
            expected="gpt2 (byte-level BPE) or llama (SentencePiece BPE)",
            remedy="start from the original safetensors checkpoint, which brings its tokenizer.json",
        )
    vocabulary = read_vocabulary(meta, rows, spaces_marked=kind == "llama")
    byte_level_kind = kind == "gpt2"
    specials = _specials(meta, special, begins=split_of(meta).begins if byte_level_kind else True)
    document = (
        _byte_level(meta, vocabulary) if byte_level_kind else _sentencepiece(meta, vocabulary, specials, in_order)
    )
    document["added_tokens"] = _added_tokens(meta, vocabulary)
    document["post_processor"] = _post_processor(vocabulary, specials, byte_level_kind)
    files = {
        TOKENIZER: FileRef(data=json.dumps(_ordered(document), ensure_ascii=False, indent=1).encode() + b"\n"),
        TOKENIZER_CONFIG: FileRef(data=dump(_tokenizer_config(meta, vocabulary, specials))),
    }
    return files | _templates(meta), _notes(meta) if byte_level_kind else ()


def _notes(meta: Metadata) -> tuple[str, ...]:
    if meta.text("tokenizer.ggml.pre", "") not in UNNAMED:
        return ()
    assumed = "the GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre): GPT-2's is assumed"
    return (f"{assumed}; compare token ids with the original tokenizer before you rely on them",)


def _specials(meta: Metadata, ids: Mapping[str, int | None], *, begins: bool) -> Specials:
    bos, eos = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"
    specials = Specials(ids, meta.flag(bos, begins and ids["bos_token_id"] is not None), meta.flag(eos, False))
    for key, wanted, role in ((bos, specials.add_bos, "bos_token_id"), (eos, specials.add_eos, "eos_token_id")):
        if wanted and ids[role] is None:
            raise meta.fault(key, "asks for a token that the file does not name", expected=f"tokenizer.ggml.{role}")
    return specials


def _byte_level(meta: Metadata, vocabulary: Vocabulary) -> dict[str, Any]:
    split = split_of(meta)
    steps = split.steps(meta.flag("tokenizer.ggml.add_space_prefix", False))
    return {
        "normalizer": {"type": "NFC"} if split.nfc else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level(),
        "model": _bpe(vocabulary, written_merges(meta, vocabulary.ids), ignore_merges=split.whole_words),
    }


def _sentencepiece(meta: Metadata, vocabulary: Vocabulary, specials: Specials, in_order: bool) -> dict[str, Any]:
    merges = written_merges(meta, vocabulary.ids)
    if not merges and in_order:
        merges = derived_merges(vocabulary, {text: -id_ for text, id_ in vocabulary.ids.items()})
    elif not merges:
        scores = meta.sequence("tokenizer.ggml.scores", float, len(vocabulary.texts))
        merges = derived_merges(vocabulary, {text: scores[id_] for text, id_ in vocabulary.ids.items()})
    prefix = meta.flag("tokenizer.ggml.add_space_prefix", True)
    marked = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    plain = {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "}
    before = [{"type": "Prepend", "prepend": WORD_START}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    has_bytes = any(True for _ in vocabulary.of_kind(BYTE))
    unknown = specials.text("unk", vocabulary)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, marked]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [plain, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]},
        "model": _bpe(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes),
    }


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: Any) -> dict[str, Any]:
    defaults = {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {
        "type": "BPE",
        **defaults,
        **options,
        "vocab": dict(vocabulary.ids),
        "merges": [list(pair) for pair in merges],
    }


def _ordered(document: dict[str, Any]) -> dict[str, Any]:
    head = {"version": "1.0", "truncation": None, "padding": None}
    names = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
    return head | {name: document[name] for name in names}


def _added_tokens(meta: Metadata, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are found in text before anything is split: control tokens, and those that the author defined.

    Phi-3's SentencePiece control tokens swallow the white space behind them (llama.cpp too knows this by name).
    """
    phi3 = meta.architecture == "phi3" and meta.text(_MODEL) == "llama"
    return [
        {
            "id": id_,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": phi3 and text not in _PHI3_KEEPS_SPACE,
            "normalized": False,
            "special": vocabulary.kinds[id_] != USER_DEFINED,
        }
        for id_, text in vocabulary.of_kind(UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _post_processor(vocabulary: Vocabulary, specials: Specials, byte_level_kind: bool) -> dict[str, Any] | None:
    bos = specials.text("bos", vocabulary) if specials.add_bos else None
    eos = specials.text("eos", vocabulary) if specials.add_eos else None
    steps: list[dict[str, Any]] = [byte_level()] if byte_level_kind else []
    if bos is not None or eos is not None:
        added = {text: {"id": text, "ids": [vocabulary.ids[text]], "tokens": [text]} for text in (bos, eos) if text}
        single, second = _template("A", 0, bos, eos), _template("B", 1, bos, eos)
        steps.append({"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": added})
    return {"type": "Sequence", "processors": steps} if len(steps) > 1 else (steps[0] if steps else None)


def _template(sequence: str, type_id: int, bos: str | None, eos: str | None) -> list[dict[str, Any]]:
    def special(text: str | None) -> list[dict[str, Any]]:
        return [] if text is None else [{"SpecialToken": {"id": text, "type_id": type_id}}]

    return [*special(bos), {"Sequence": {"id": sequence, "type_id": type_id}}, *special(eos)]


def _tokenizer_config(meta: Metadata, vocabulary: Vocabulary, specials: Specials) -> dict[str, Any]:
    roles = {f"{role}_token": specials.text(role, vocabulary) for role in ("bos", "eos", "unk", "pad")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: text for role, text in roles.items() if text is not None},
        "add_bos_token": specials.add_bos,
        "add_eos_token": specials.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta.integer(meta.hyper("context_length")),
    }


def _templates(meta: Metadata) -> dict[str, FileRef]:
    files = {}
    if meta.has("tokenizer.chat_template"):
        files[CHAT_TEMPLATE] = FileRef(data=meta.text("tokenizer.chat_template").encode())
    for name in meta.sequence("tokenizer.chat_templates", str):
        if not _TEMPLATE_NAME.fullmatch(name):
            raise meta.fault(
                "tokenizer.chat_templates",
                "names a chat template that is no plain name",
                expected="letters, digits, - and _",
                found=brief(name),
            )
        text = meta.text(f"tokenizer.chat_template.{name}")
        files[f"additional_chat_templates/{name}.jinja"] = FileRef(data=text.encode())
    return files
