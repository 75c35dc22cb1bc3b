"""A new vocabulary, and where the row of each of its tokens comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile


@dataclass(frozen=True)
class Origin:
    """Where a row comes from.

    Args:
        kept: the old id whose row is copied bit for bit; None for a new token.
        parts: old ids that spell the new token, in order; empty where the old vocabulary cannot spell it.
    """

    kept: int | None = None
    parts: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class NewVocabulary:
    """What a vocabulary source makes.

    Args:
        tokenizer: the new tokenizer.json.
        origins: of the rows 0, 1, 2, ... of the new embeddings that a token or an old padding row stands behind.
        figures: for the report; JSON values.
        notes: for the user.
        taken: by an old token that is gone, the new one that has its id.
        roles: by `bos_token` and the like, the token of a donor whose special tokens come; None where ours stay.
    """

    tokenizer: TokenizerFile
    origins: Sequence[Origin]
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    taken: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] | None = None

    def new_id(self) -> dict[int, int]:
        """The new id of every old one that is kept, the first where there are several."""
        kept = [(origin.kept, index) for index, origin in enumerate(self.origins) if origin.kept is not None]
        return dict(reversed(kept))

    def counts(self) -> dict[str, int]:
        """How many rows are copied, composed, and neither."""
        kinds = Counter(
            "copied" if origin.kept is not None else "composed" if origin.parts else "unspelled"
            for origin in self.origins
        )
        return {kind: kinds[kind] for kind in ("copied", "composed", "unspelled")}

    def id_map(self, rows: int) -> dict[str, Any]:
        """For `id_map.json`: the new id of each old one, null if it is gone, and the old ids that spell new tokens.

        Args:
            rows: of the old embeddings.
        """
        kept = self.new_id()
        composed = {str(index): list(origin.parts) for index, origin in enumerate(self.origins) if origin.kept is None}
        return {"old_to_new": [kept.get(index) for index in range(rows)], "composed_of": composed}
