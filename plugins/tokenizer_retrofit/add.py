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


def add_tokens(
    old: TokenizerFile, rows: int, texts: Sequence[str], *, special: bool = True, places: Sequence[str] = ()
) -> NewVocabulary:
    """The old vocabulary and these tokens behind it, or in the places of reserved ones.

    Args:
        old: what is extended.
        rows: of the embeddings; those that no token uses are used first.
        texts: of the tokens.
        special: whether they are left out of decoded text.
        places: the old token that each takes the id of, and that is gone then; none for ids behind the last.

    Raises:
        UsageError: a token is there already, or named twice.
    """
    for place, text in enumerate(texts):
        if text in old.ids or text in texts[:place]:
            raise UsageError("the vocabulary has such a token already", where="add", found=repr(text),
                             remedy="leave it out")  # fmt: skip
    taken = dict(zip(places, texts, strict=True)) if places else {}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    own = {text: old.ids[place] for place, text in taken.items()}
    new_ids = own or {text: old.rows + place for place, text in enumerate(texts)}
    stay = {token: index for token, index in old.ids.items() if token not in taken}
    entries = [entry for entry in added_entries(old) if entry["content"] not in taken]
    entries += [{"id": index, "content": text, **flags} for text, index in new_ids.items()]
    new = assemble(old, {**stay, **new_ids}, merges=old.merges, scores=old.scores, added=entries)
    origins = [Origin(kept=index) for index in range(rows)] + [Origin()] * (new.rows - rows)
    speller = Speller(old)
    for text, index in new_ids.items():
        origins[index] = Origin(parts=tuple(speller.spell(text.encode())))
    figures = {"added": len(texts), **({"reserved": list(taken)} if taken else {})}
    notes = (f"{len(taken)} tokens have the ids of reserved ones, {places[0]} first",) if taken else ()
    return NewVocabulary(new, origins, figures, notes, taken)
