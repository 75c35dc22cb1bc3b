"""Places of reserved tokens, such as Llama 3's `<|reserved_special_token_0|>`, for tokens that are added: no tensor
changes its shape.

What is reserved was never trained, and nothing names it. A token that a config, the post-processor, a chat template or
a merge names is in use, whatever it is called, and stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from regraft.core.checkpoint import TOKENIZER_CONFIG, Checkpoint
from regraft.core.errors import UsageError
from regraft.plugins.tokenizer_retrofit.metadata import token_ids_of
from regraft.plugins.tokenizer_retrofit.params import TokenizerRetrofitParams
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.trim import alphabet

SPECIAL_TOKENS_MAP = "special_tokens_map.json"
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
DECODER = "added_tokens_decoder"

_TEMPLATE = ".jinja"


def reserved_places(checkpoint: Checkpoint, old: TokenizerFile, params: TokenizerRetrofitParams) -> tuple[str, ...]:
    """The tokens whose places `params.add` takes, in order of ids; none where no pattern is given.

    Raises:
        UsageError: fewer tokens than are added are free.
    """
    if params.reserved is None:
        return ()
    pattern = re.compile(".*".join(map(re.escape, params.reserved.split("*"))), re.DOTALL)
    found = [token for token in old.tokens.values() if pattern.fullmatch(token)]
    used = _named(checkpoint, old)
    written = "\n".join(templates(checkpoint))
    free = [token for token in found if token not in used and token not in written]
    if len(free) < len(params.add):
        raise UsageError(
            "too few reserved tokens are free", where=f"reserved: {params.reserved!r}",
            expected=f"{len(params.add)}, one for each token of add",
            found=f"{len(found)}, {len(found) - len(free)} of them in use",
            remedy="give a pattern that more tokens match, or leave reserved out for new rows",
        )  # fmt: skip
    return tuple(free[: len(params.add)])


def renamed(checkpoint: Checkpoint, new: TokenizerFile, taken: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Merge patches of the files that name tokens by their text.

    Args:
        checkpoint: as it was.
        new: the tokenizer with the new tokens.
        taken: the new token in the place of each old one.
    """
    found: dict[str, dict[str, Any]] = {}
    special = {token.content for token in new.added if token.special}
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP):
        config = checkpoint.json(name)
        lists = {key: config[key] for key in SPECIAL_LISTS if isinstance(config.get(key), list)}
        changes: dict[str, Any] = {key: list(_replaced(value, taken, special)) for key, value in lists.items()}
        changes = {key: value for key, value in changes.items() if value != lists[key]}
        decoder = config.get(DECODER)
        if isinstance(decoder, Mapping):
            entries = {str(entry["id"]): entry for entry in new.document["added_tokens"]}
            fresh = {str(new.ids[token]) for token in taken.values()} & decoder.keys()
            changes |= {DECODER: {index: without_id(entries[index]) for index in sorted(fresh)}} if fresh else {}
        if changes:
            found[name] = changes
    return found


def renamable(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """By file, the keys whose values `renamed` may change."""
    keys = (*SPECIAL_LISTS, DECODER)
    named = {name: {*keys} & checkpoint.json(name).keys() for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)}
    return {name: found for name, found in named.items() if found}


def _replaced(tokens: list[Any], taken: Mapping[str, str], special: set[str]) -> Iterator[Any]:
    """A list of special tokens with new ones in the places of old ones; those that are not special are left out."""
    for token in tokens:
        text = text_of(token)
        if text not in taken:
            yield token
        elif taken[text] in special:
            yield {**token, "content": taken[text]} if isinstance(token, Mapping) else taken[text]


def without_id(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `added_tokens` as `added_tokens_decoder` has it."""
    return {key: value for key, value in entry.items() if key != "id"}


def text_of(value: Any) -> str:
    """A token that is named by its text, or by an object; empty where the value names none."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else ""


def _named(checkpoint: Checkpoint, old: TokenizerFile) -> set[str]:
    """Tokens that something needs: ids in configs, parts that tokens play, post-processor, merges, the alphabet."""
    ids = {*token_ids_of(checkpoint.config), *token_ids_of(checkpoint.generation_config)}
    found = {old.tokens[index] for index in ids if index in old.tokens}
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP):
        for key, value in checkpoint.json(name).items():
            if key.endswith("_token"):
                found.add(text_of(value))
            elif key in SPECIAL_LISTS and isinstance(value, Mapping):
                found.update(map(text_of, value.values()))
    found.update(_strings([old.document.get("post_processor"), old.document.get("padding")]))
    found.update(part for left, right in old.merges for part in (left, right, left + right))
    return found | alphabet(old)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def templates(checkpoint: Checkpoint) -> Iterator[str]:
    """Chat templates, in files of their own and in tokenizer_config.json."""
    yield from _strings(checkpoint.json(TOKENIZER_CONFIG).get("chat_template"))
    for name, file in checkpoint.files.items():
        if name.endswith(_TEMPLATE):
            yield file.read().decode("utf-8", "replace")
