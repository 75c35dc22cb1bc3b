"""`replace-donor` with `special = "donor"`: what files say of our special tokens becomes what is true of the donor's.

`bos_token` and the like become the donor's, in configs by id, and tokens of ours that are gone leave the lists. A chat
template of ours that names one would be written as ever and cut into pieces of its text, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.core.checkpoint import TOKENIZER_CONFIG, Checkpoint
from regraft.core.errors import Unsupported
from regraft.plugins.tokenizer_retrofit.assembly import added_entries
from regraft.plugins.tokenizer_retrofit.donor import ROLES, roles
from regraft.plugins.tokenizer_retrofit.reserved import (
    DECODER,
    SPECIAL_LISTS,
    SPECIAL_TOKENS_MAP,
    templates,
    text_of,
    without_id,
)
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary


def check_templates(checkpoint: Checkpoint, old: TokenizerFile, donor: TokenizerFile) -> None:
    """Refuse a chat template that names special tokens which the donor lacks.

    Raises:
        Unsupported: it does.
    """
    text = "\n".join(templates(checkpoint))
    gone = [token.content for token in old.added if token.special and token.content not in donor.ids]
    if named := [token for token in gone if token in text]:
        raise Unsupported(
            "the chat template names special tokens that the donor lacks, so chats would be cut into pieces of them",
            where=f"{checkpoint.label}: chat template", expected="tokens of the donor, or {{ bos_token }} and the like",
            found=", ".join(map(repr, named)),
            remedy='keep them with special = "source", or write the template for the donor\'s',
        )  # fmt: skip


def own_roles(checkpoint: Checkpoint) -> dict[str, str]:
    """Which of our tokens plays which part, as tokenizer_config.json says, or else special_tokens_map.json."""
    return {**roles(checkpoint.json(SPECIAL_TOKENS_MAP)), **roles(checkpoint.json(TOKENIZER_CONFIG))}


def role_ids(checkpoint: Checkpoint, old: TokenizerFile, new: NewVocabulary) -> dict[str, dict[int, int]]:
    """By key of a config, such as `eos_token_id`, the old id of our token in that part and the new one of theirs."""
    ours = own_roles(checkpoint)
    return {
        f"{role}_id": {old.ids[ours[role]]: new.tokenizer.ids[text]}
        for role, text in (new.roles or {}).items()
        if ours.get(role) in old.ids
    }


def adopted(checkpoint: Checkpoint, new: NewVocabulary) -> dict[str, dict[str, Any]]:
    """Merge patches of the files that name special tokens by their text; none where they stay ours."""
    if new.roles is None:
        return {}
    found = {name: _changes(checkpoint.json(name), new) for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)}
    config = checkpoint.json(TOKENIZER_CONFIG)
    found[TOKENIZER_CONFIG] |= {role: text for role, text in new.roles.items() if config.get(role) is None}
    return {name: changes for name, changes in found.items() if changes}


def adoptable(checkpoint: Checkpoint) -> dict[str, set[str]]:
    """By file, the keys whose values `adopted` may change."""
    named = {
        name: {key for key in checkpoint.json(name) if key.endswith("_token") or key in (*SPECIAL_LISTS, DECODER)}
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)
    }
    named[TOKENIZER_CONFIG] |= {*ROLES}
    return {name: keys for name, keys in named.items() if keys}


def _changes(config: Mapping[str, Any], new: NewVocabulary) -> dict[str, Any]:
    """What one file says otherwise; null takes away what names a token that is gone."""
    ids, parts = new.tokenizer.ids, new.roles or {}
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in SPECIAL_LISTS and isinstance(value, list):
            left = [token for token in value if text_of(token) in ids]
            found |= {key: left} if left != value else {}
        elif key in SPECIAL_LISTS and isinstance(value, Mapping):
            gone = [name for name, token in value.items() if text_of(token) not in ids]
            found |= {key: dict.fromkeys(gone)} if gone else {}
        elif key.endswith("_token") and (text := text_of(value)):
            token = parts.get(key, text if text in ids else None)
            found |= {key: token} if token != text else {}
        elif key == DECODER and isinstance(value, Mapping):
            entries = {str(entry["id"]): without_id(entry) for entry in added_entries(new.tokenizer)}
            found[key] = {**dict.fromkeys(value.keys() - entries.keys()), **entries}
    return found
