"""What else names token ids or describes the tokenizer: config.json, generation_config.json, tokenizer_config.json.

Files of other loaders, such as merges.txt, hold the old vocabulary, so they are left behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
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
_BARRED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
"""Lists of what is never to be generated, which needs no entry for a token that is gone."""
_LISTS = (*_BARRED, "forced_decoder_ids", "force_words_ids", "sequence_bias")

Move = Callable[[str, int], int | None]
"""The new id of an old one under a key of a config; None where the token is gone."""


@dataclass(frozen=True)
class Metadata:
    """Changes beside the tensors.

    Args:
        json: merge patches by file.
        dropped: files that are left behind, with the reason.
    """

    json: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)


def metadata(
    checkpoint: Checkpoint,
    rows: int,
    new_id: Mapping[int, int] | None = None,
    padding: int = 0,
    roles: Mapping[str, Mapping[int, int]] | None = None,
) -> Metadata:
    """What `rows` rows, and ids that moved, ask of the files.

    Args:
        checkpoint: as it was.
        rows: of the new embeddings.
        new_id: the new id of every old one that is kept; None where all keep theirs.
        padding: rows at the end that no token has; they are never to be generated.
        roles: by key, such as `eos_token_id`, new ids of old ones that win over `new_id`.

    Raises:
        TransformationError: a config names a token that is gone, other than to keep it from being generated.
    """

    def moved(key: str, index: int) -> int | None:
        own = (roles or {}).get(key, {})
        return own.get(index, index if new_id is None else new_id.get(index))

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


def token_ids_of(config: Mapping[str, Any]) -> set[int]:
    """Every token id that a config names."""
    found: set[int] = set()

    def seen(key: str, index: int) -> int:
        found.add(index)
        return index

    _ids(config, "", seen)
    return found


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


def _generation(checkpoint: Checkpoint, moved: Move, padding: range) -> dict[str, Any]:
    """The ids of generation_config.json; where it is missing and rows are padded, with the ends of config.json."""
    found = _ids(checkpoint.generation_config, GENERATION_CONFIG, moved)
    if not padding:
        return found
    if GENERATION_CONFIG not in checkpoint.files:
        ends = {key: checkpoint.config.get(key) for key in _ENDS}
        found = {key: _new_value(key, value, moved, CONFIG) for key, value in ends.items() if value is not None}
    suppressed = found.get("suppress_tokens", checkpoint.generation_config.get("suppress_tokens")) or []
    return {**found, "suppress_tokens": [*suppressed, *padding]}


def _sizes(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """`vocab_size` wherever the config has it."""
    found: dict[str, Any] = {"vocab_size": rows} if "vocab_size" in config else {}
    text = config.get("text_config")
    if isinstance(text, Mapping) and "vocab_size" in text:
        found["text_config"] = {"vocab_size": rows}
    return found or {"vocab_size": rows}


def _ids(config: Mapping[str, Any], where: str, moved: Move) -> dict[str, Any]:
    """Every key that holds token ids and whose value changes; null takes away one that has nothing left to say."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == "sequence_bias" and isinstance(value, Mapping):
            if nested := _bias_by_text(key, value, moved, f"{where}: {key}"):
                found[key] = nested
        elif isinstance(value, Mapping):
            if nested := _ids(value, f"{where}: {key}", moved):
                found[key] = nested
        elif _names_ids(key):
            new = _new_value(key, value, moved, f"{where}: {key}")
            if new != value:
                found[key] = new
    return found


def _new_value(key: str, value: Any, moved: Move, where: str) -> Any:
    """A value with the new ids. What stands beside ids, the positions of some and the biases of others, stays."""
    if key in _BARRED and isinstance(value, list):
        left = [one for one in value if all(moved(key, index) is not None for index in _flat(one))]
        return [_moved(key, one, moved, where) for one in left] if left or not value else None
    if key == "forced_decoder_ids" and isinstance(value, list):
        return [[*pair[:1], *_moved(key, pair[1:], moved, where)] if isinstance(pair, list) else pair for pair in value]
    if key == "sequence_bias" and isinstance(value, list):
        return [[*_moved(key, pair[:1], moved, where), *pair[1:]] if isinstance(pair, list) else pair for pair in value]
    return _moved(key, value, moved, where)


def _bias_by_text(key: str, value: Mapping[str, Any], moved: Move, where: str) -> dict[str, Any]:
    """The change of an object whose keys are tuples of ids as text, such as "(5, 9)"."""
    new = {
        re.sub(r"\b[0-9]{1,18}\b", lambda found: str(_moved(key, int(found[0]), moved, where)), text): bias
        for text, bias in value.items()
    }
    return {} if new == value else {**dict.fromkeys(value.keys() - new.keys()), **new}


def _moved(key: str, value: Any, moved: Move, where: str) -> Any:
    if isinstance(value, list):
        return [_moved(key, one, moved, where) for one in value]
    if type(value) is not int or value < 0:
        return value
    new = moved(key, value)
    if new is None:
        raise TransformationError("names a token that the new vocabulary lacks", where=where, found=f"id {value}",
                                  remedy="keep it (`keep` of trim), or take it out of the file")  # fmt: skip
    return new


def _tokenizer_config(checkpoint: Checkpoint, moved: Move) -> dict[str, Any]:
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


def _decoder(decoder: Mapping[str, Any], moved: Move) -> Iterator[tuple[str, Any]]:
    """Entries under their new ids; null takes an old one away."""
    wrong = next((index for index in decoder if not (index.isascii() and index.isdecimal() and len(index) < 20)), None)
    if wrong is not None:
        raise InputError("is no id of a token", where=f"{TOKENIZER_CONFIG}: added_tokens_decoder",
                         expected="ids and their tokens", found=brief(wrong), remedy="correct the file")  # fmt: skip
    ids = {index: moved("added_tokens_decoder", int(index)) for index in decoder}
    new = {str(ids[index]): token for index, token in decoder.items() if ids[index] is not None}
    yield from ((index, None) for index in decoder if index not in new)
    yield from ((index, token) for index, token in new.items() if decoder.get(index) != token)
