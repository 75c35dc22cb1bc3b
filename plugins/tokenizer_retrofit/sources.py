"""The five sources of a vocabulary: which one, with what, and how many rows it may come to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.data.load import check_sources
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.donor import donor_roles, open_donor, replace_by_donor
from regraft.plugins.tokenizer_retrofit.donor_special import own_roles
from regraft.plugins.tokenizer_retrofit.metadata import token_ids_of
from regraft.plugins.tokenizer_retrofit.params import TokenizerRetrofitParams
from regraft.plugins.tokenizer_retrofit.tables import Tables
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary

EXTENSION = 2048
"""Tokens that `extend` appends where no size is given."""


def check_source(params: TokenizerRetrofitParams) -> None:
    """Whether corpus, held-out texts and donor are there.

    Raises:
        UsageError, InputError: they are not, or the donor's tokenizer.json is malformed.
        Unsupported: the donor's tokenizer is of a kind that cannot be used.
    """
    for data in (params.corpus, params.held_out, params.adapt.data if params.adapt is not None else None):
        if data is not None:
            check_sources(data)
    if params.donor is not None:
        open_donor(params.donor)


def most_rows(old: TokenizerFile, tables: Tables, params: TokenizerRetrofitParams) -> int:
    """An upper bound of the rows of the new embeddings, before padding.

    Raises:
        Unsupported: as `missing_bytes`.
    """
    if params.vocabulary == "trim":
        return tables.rows
    if params.vocabulary == "replace-train":
        return int(params.size or 0)
    if params.vocabulary == "replace-donor":
        assert params.donor is not None
        return len(old.added) + open_donor(params.donor).rows + 1
    new = len(params.add) if params.vocabulary == "add-tokens" else params.size or EXTENSION
    if params.reserved is not None:
        return tables.rows
    if params.repair_bytes:
        from regraft.plugins.tokenizer_retrofit.extend import missing_bytes

        new += len(missing_bytes(old))
    return max(tables.rows, old.rows + new)


def make_vocabulary(
    checkpoint: Checkpoint, old: TokenizerFile, tables: Tables, params: TokenizerRetrofitParams, run: Run
) -> NewVocabulary:
    """The vocabulary that the parameters ask for.

    Raises:
        RegraftError: as the source's own function.
    """
    maker: Callable[..., NewVocabulary] = _MAKERS[params.vocabulary]
    return maker(checkpoint, old, tables, params, run)


def corpus_of(params: TokenizerRetrofitParams) -> Corpus | None:
    """The corpus, if there is one."""
    return None if params.corpus is None else Corpus(params.corpus, params.corpus_bytes)


def _texts(params: TokenizerRetrofitParams) -> Iterator[str]:
    corpus = corpus_of(params)
    assert corpus is not None
    return corpus.texts()


def _extend(
    checkpoint: Checkpoint, old: TokenizerFile, tables: Tables, params: TokenizerRetrofitParams, run: Run
) -> NewVocabulary:
    from regraft.plugins.tokenizer_retrofit.extend import extend

    del checkpoint
    return extend(
        old, tables.rows, _texts(params), size=params.size or EXTENSION, min_count=params.min_count or 3,
        max_length=params.max_length, repair_bytes=params.repair_bytes, tell=run.tell,
    )  # fmt: skip


def _train(
    checkpoint: Checkpoint, old: TokenizerFile, tables: Tables, params: TokenizerRetrofitParams, run: Run
) -> NewVocabulary:
    from regraft.plugins.tokenizer_retrofit.train import train

    del checkpoint, tables
    return train(
        old, _texts(params), size=params.size or 0, algorithm=params.algorithm, min_count=params.min_count or 3,
        boundary=params.boundary, max_length=params.max_length, tell=run.tell,
    )  # fmt: skip


def _donor(
    checkpoint: Checkpoint, old: TokenizerFile, tables: Tables, params: TokenizerRetrofitParams, run: Run
) -> NewVocabulary:
    del tables, run
    assert params.donor is not None
    ours, theirs = own_roles(checkpoint), donor_roles(params.donor)
    return replace_by_donor(old, open_donor(params.donor), special=params.special, our_roles=ours, their_roles=theirs)


def _add(
    checkpoint: Checkpoint, old: TokenizerFile, tables: Tables, params: TokenizerRetrofitParams, run: Run
) -> NewVocabulary:
    from regraft.plugins.tokenizer_retrofit.add import add_tokens
    from regraft.plugins.tokenizer_retrofit.reserved import reserved_places

    del run
    places = reserved_places(checkpoint, old, params)
    return add_tokens(old, tables.rows, params.add, special=params.add_special, places=places)


def _trim(
    checkpoint: Checkpoint, old: TokenizerFile, tables: Tables, params: TokenizerRetrofitParams, run: Run
) -> NewVocabulary:
    from regraft.plugins.tokenizer_retrofit.trim import trim

    del tables
    named = {*token_ids_of(checkpoint.config), *token_ids_of(checkpoint.generation_config)}
    known = sorted(index for index in named if index in old.tokens)
    return trim(
        old, _texts(params), keep=[*params.keep, *_chats(checkpoint, run)], keep_ids=known,
        min_count=params.min_count or 1,
    )  # fmt: skip


def _chats(checkpoint: Checkpoint, run: Run) -> list[str]:
    """The chat template, and a chat as it renders it."""
    tokenizer: Any = run.tokenizer(checkpoint)
    if not tokenizer.chat_template:
        return []
    template = tokenizer.chat_template
    written = [template] if isinstance(template, str) else list(template.values())
    chat = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    return [*written, tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)]


_MAKERS = {
    "extend": _extend,
    "replace-train": _train,
    "replace-donor": _donor,
    "add-tokens": _add,
    "trim": _trim,
}
