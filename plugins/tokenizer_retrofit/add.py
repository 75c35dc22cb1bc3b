"""`add-tokens`: texts that are matched verbatim, before the model of the tokenizer sees the rest.

For control tokens. Words of a language do better with `extend`: an added token stops at nothing, not even at the
boundary of a word.
"""

from __future__ import annotations

from collections.abc import Sequence

from regraft.core.errors import UsageError
from regraft.plugins.tokenizer_retrofit.assembly import added_entries, assemble
from regraft.plugins.tokenizer_retrofit.spell import Speller
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary, Origin


def add_tokens(old: TokenizerFile, rows: int, texts: Sequence[str], *, special: bool = True) -> NewVocabulary:
    """The old vocabulary and these tokens behind it.

    Args:
        old: what is extended.
        rows: of the embeddings; those that no token uses are used first.
        texts: of the tokens.
        special: whether they are left out of decoded text.

    Raises:
        UsageError: a token is there already, or named twice.
    """
    for place, text in enumerate(texts):
        if text in old.ids or text in texts[:place]:
            raise UsageError("the vocabulary has such a token already", where="add", found=repr(text),
                             remedy="leave it out")  # fmt: skip
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    new_ids = {text: old.rows + place for place, text in enumerate(texts)}
    entries = [*added_entries(old), *({"id": index, "content": text, **flags} for text, index in new_ids.items())]
    new = assemble(old, {**old.ids, **new_ids}, merges=old.merges, scores=old.scores, added=entries)
    origins = [Origin(kept=index) for index in range(rows)] + [Origin()] * (new.rows - rows)
    speller = Speller(old)
    for text, index in new_ids.items():
        origins[index] = Origin(parts=tuple(speller.spell(text.encode())))
    return NewVocabulary(new, origins, {"added": len(texts)})
