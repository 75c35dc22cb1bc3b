"""What else names token ids or describes the tokenizer: config.json, generation_config.json, tokenizer_config.json.

Files of other loaders, such as merges.txt, hold the old vocabulary, so they are left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from regraft.core.checkpoint import CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, Checkpoint
from regraft.core.errors import InputError, TransformationError
from regraft.core.jsonio import brief

STALE = (
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "added_tokens.json", "tiktoken.model",
)  # fmt: skip
OWN_CLASS = ("qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text", "siglip2", "hyperclovax_vision_v2")
"""Model types for which transformers 5 always builds a tokenizer class of their own, whatever tokenizer.json says of
the stages around the model (measured on 5.23); vocabulary and merges are taken from the file."""
FAST_CLASS = "PreTrainedTokenizerFast"
"""Loads tokenizer.json as it stands, in transformers 4 and 5."""

_SLOW_ONLY = ("sp_model_kwargs", "legacy", "vocab_file", "merges_file", "spaces_between_special_tokens")
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids", "force_words_ids")


@dataclass(frozen=True)
class Metadata:
    """Changes beside the tensors.

    Args:
        json: merge patches by file.
        dropped: files that are left behind, with the reason.
    """

    json: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)


def metadata(checkpoint: Checkpoint, rows: int, new_id: Mapping[int, int] | None = None, padding: int = 0) -> Metadata:
    """What `rows` rows, and ids that moved, ask of the files.

    Args:
        checkpoint: as it was.
        rows: of the new embeddings.
        new_id: the new id of every old one that is kept; None where all keep theirs.
        padding: rows at the end that no token has; they are never to be generated.

    Raises:
        TransformationError: a config names a token that is gone.
    """
    moved = (lambda index: index) if new_id is None else new_id.get
    config = _joined(_ids(checkpoint.config, CONFIG, moved), _sizes(checkpoint.config, rows))
    found = {
        CONFIG: config,
        GENERATION_CONFIG: _generation(checkpoint, moved, range(rows - padding, rows)),
        TOKENIZER_CONFIG: _tokenizer_config(checkpoint, moved),
    }
    dropped = {name: "holds the old vocabulary" for name in STALE if name in checkpoint.files}
    return Metadata({name: change for name, change in found.items() if change}, dropped)


def movable(checkpoint: Checkpoint, *, padded: bool) -> dict[str, set[str]]:
    """By file, the keys whose values follow the new ids and the number of rows."""
    found = {CONFIG: {"vocab_size", *_sizes(checkpoint.config, 0)}}
    for name, config in ((CONFIG, checkpoint.config), (GENERATION_CONFIG, checkpoint.generation_config)):
        keys = {key for key, value in config.items() if _names_ids(key) or isinstance(value, Mapping)}
        if keys:
            found.setdefault(name, set()).update(keys)
    if padded:
        found.setdefault(GENERATION_CONFIG, set()).update((*_ENDS, "suppress_tokens"))
    if "added_tokens_decoder" in checkpoint.json(TOKENIZER_CONFIG):
        found[TOKENIZER_CONFIG] = {"added_tokens_decoder"}
    return found


def token_ids_of(config: Mapping[str, Any]) -> Iterator[int]:
    """Every token id that a config names."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from token_ids_of(value)
        elif _names_ids(key):
            yield from _flat(value)


def _joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two changes of one object."""
    nested = {key: _joined(one[key], other[key]) for key in one.keys() & other.keys() if isinstance(one[key], Mapping)}
    return {**one, **other, **nested}


def _names_ids(key: str) -> bool:
    return key.endswith(("token_id", "_token_index")) or key in _LISTS


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for one in value:
            yield from _flat(one)
    elif type(value) is int and value >= 0:
        yield value


def _generation(checkpoint: Checkpoint, moved: Any, padding: range) -> dict[str, Any]:
    """The ids of generation_config.json; where it is missing and rows are padded, with the ends of config.json."""
    found = _ids(checkpoint.generation_config, GENERATION_CONFIG, moved)
    if not padding:
        return found
    if GENERATION_CONFIG not in checkpoint.files:
        ends = {key: checkpoint.config.get(key) for key in _ENDS}
        found = {key: _moved(value, moved, CONFIG) for key, value in ends.items() if value is not None}
    suppressed = found.get("suppress_tokens", checkpoint.generation_config.get("suppress_tokens")) or []
    return {**found, "suppress_tokens": [*suppressed, *padding]}


def _sizes(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """`vocab_size` wherever the config has it."""
    found: dict[str, Any] = {"vocab_size": rows} if "vocab_size" in config else {}
    text = config.get("text_config")
    if isinstance(text, Mapping) and "vocab_size" in text:
        found["text_config"] = {"vocab_size": rows}
    return found or {"vocab_size": rows}


def _ids(config: Mapping[str, Any], where: str, moved: Any) -> dict[str, Any]:
    """Every key that holds token ids and whose value changes."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            if nested := _ids(value, f"{where}: {key}", moved):
                found[key] = nested
        elif _names_ids(key):
            new = _moved(value, moved, f"{where}: {key}")
            if new != value:
                found[key] = new
    return found


def _moved(value: Any, moved: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_moved(one, moved, where) for one in value]
    if type(value) is not int or value < 0:
        return value
    new = moved(value)
    if new is None:
        raise TransformationError("names a token that the new vocabulary lacks", where=where, found=f"id {value}",
                                  remedy="keep it: name it in `keep`")  # fmt: skip
    return new


def _tokenizer_config(checkpoint: Checkpoint, moved: Any) -> dict[str, Any]:
    config = checkpoint.json(TOKENIZER_CONFIG)
    found: dict[str, Any] = {key: None for key in _SLOW_ONLY if key in config}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        found |= {"added_tokens_decoder": dict(_decoder(decoder, moved))}
        if not found["added_tokens_decoder"]:
            del found["added_tokens_decoder"]
    if checkpoint.config.get("model_type") not in OWN_CLASS and config.get("tokenizer_class") != FAST_CLASS:
        found["tokenizer_class"] = FAST_CLASS
    return found


def _decoder(decoder: Mapping[str, Any], moved: Any) -> Iterator[tuple[str, Any]]:
    """Entries under their new ids; null takes an old one away."""
    wrong = next((index for index in decoder if not (index.isascii() and index.isdecimal() and len(index) < 20)), None)
    if wrong is not None:
        raise InputError("is no id of a token", where=f"{TOKENIZER_CONFIG}: added_tokens_decoder",
                         expected="ids and their tokens", found=brief(wrong), remedy="correct the file")  # fmt: skip
    new = {str(moved(int(index))): token for index, token in decoder.items() if moved(int(index)) is not None}
    yield from ((index, None) for index in decoder if index not in new)
    yield from ((index, token) for index, token in new.items() if decoder.get(index) != token)
