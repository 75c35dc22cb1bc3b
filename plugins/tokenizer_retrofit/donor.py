"""`replace-donor`: the vocabulary and the stages of another model's tokenizer, with the special tokens of our own.

The chat template, the beginning and the end of a text are what the model was taught, so they stay (`special =
"source"`); with `special = "donor"` the donor's come, each with the row of ours that plays the same part.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from regraft.core.errors import InputError
from regraft.core.jsonio import read_object
from regraft.plugins.tokenizer_retrofit.assembly import added_entries, assemble, place
from regraft.plugins.tokenizer_retrofit.spell import Speller
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary, Origin

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_NUMBER = "1234567"
ROLES = ("eos_token", "bos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def open_donor(path: Path) -> TokenizerFile:
    """The tokenizer.json of a folder, or the file itself.

    Raises:
        InputError: there is none, or it is malformed.
        Unsupported: its model is of another kind.
    """
    file = path / TOKENIZER if path.is_dir() else path
    if not file.is_file():
        raise InputError("the donor has no tokenizer.json", where=f"donor: {path}",
                         remedy="name a folder with a tokenizer in the fast format")  # fmt: skip
    return TokenizerFile.parse(read_object(file), str(file))


def donor_roles(path: Path) -> dict[str, str]:
    """Which of the donor's tokens plays which part, from its tokenizer_config.json; empty without one."""
    file = path / TOKENIZER_CONFIG
    return roles(read_object(file)) if path.is_dir() and file.is_file() else {}


def roles(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like of a tokenizer_config.json, as texts."""
    found: dict[str, str] = {}
    for role in ROLES:
        value = config.get(role)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            found[role] = text
    return found


def replace_by_donor(
    old: TokenizerFile,
    donor: TokenizerFile,
    *,
    special: Literal["source", "donor"] = "source",
    our_roles: Mapping[str, str] | None = None,
    their_roles: Mapping[str, str] | None = None,
) -> NewVocabulary:
    """The donor's vocabulary, and the rows of ours that spell it.

    Args:
        old: ours.
        donor: the other one.
        special: whose special tokens and post-processor the result has.
        our_roles, their_roles: tokens by the part that they play, for `special = "donor"`. A token of the donor with
            several parts has the row of our first one, in the order of `ROLES`.
    """
    if special == "donor":
        new = _itself(donor)
        origins = Speller(old).origins(new, new.rows)
        parts = {role: token for role, token in (their_roles or {}).items() if token in new.ids}
        played = {role: token for role, token in (our_roles or {}).items() if token in old.ids}
        for role in reversed(ROLES):
            if role in parts and role in played:
                origins[new.ids[parts[role]]] = Origin(kept=old.ids[played[role]])
        figures = {"tokens": len(new.ids), "special": special}
        return NewVocabulary(new, origins, figures, _other_numbers(old, new), roles=parts)
    ours = added_entries(old)
    special_texts = {token.content for token in donor.added if token.special}
    own = {token.content: token.id for token in old.added}
    plain = [entry for entry in added_entries(donor) if entry["content"] not in special_texts | own.keys()]
    tokens = [token for token in donor.tokens.values() if token not in special_texts]
    if donor.unknown is not None and donor.unknown not in tokens:
        tokens.append(donor.unknown)
    ids = place(own, tokens)
    merges = [pair for pair in donor.merges if {*pair, "".join(pair)} <= ids.keys()]
    own_stages = {key: old.document.get(key) for key in ("post_processor", "padding", "truncation")}
    stages = TokenizerFile.parse({**donor.document, **own_stages}, donor.label)
    new = assemble(stages, ids, merges=merges, scores=donor.scores, added=[*ours, *plain])
    origins = Speller(old).origins(new, len(ids))
    return NewVocabulary(new, origins, {"tokens": len(ids), "special": special}, _other_numbers(old, new))


def _other_numbers(old: TokenizerFile, new: TokenizerFile) -> tuple[str, ...]:
    """A note where the stage before the model cuts digits otherwise, which costs arithmetic more than words."""
    stages = (file.backend().pre_tokenizer for file in (old, new))
    one, other = (
        [_NUMBER] if stage is None else [piece for piece, _ in stage.pre_tokenize_str(_NUMBER)] for stage in stages
    )
    if [piece for piece in one if piece.isdigit()] == [piece for piece in other if piece.isdigit()]:
        return ()
    was, now = ("-".join(pieces) for pieces in (one, other))
    return (f"numbers are cut otherwise than in the model's training, {was} and now {now}: expect worse arithmetic",)


def _itself(donor: TokenizerFile) -> TokenizerFile:
    """The donor with dense ids."""
    ids = {token: index for index, token in enumerate(donor.tokens.values())}
    return assemble(donor, ids, merges=donor.merges, scores=donor.scores, added=added_entries(donor))
