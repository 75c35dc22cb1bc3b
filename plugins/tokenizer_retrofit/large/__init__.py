"""`large-vocabulary`: tokens by the hundred thousand beside the model, and an index of those that may come next.

Feher, Vulić, Minixhofer (arXiv 2411.18553): a vocabulary of a million tokens, whose rows a hypernetwork predicts, and
an approximate nearest-neighbour search in place of the head. Deviations: a text is cut by the tokenizer, and runs of
its tokens are joined, longest first, where the paper cuts bytes by longest match; rows are searched by inner product,
where the paper searches them by cosine; special tokens are always candidates; the cache is kept from token to token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import Run, Transformation
from regraft.plugins.tokenizer_retrofit.large.params import LargeVocabularyParams


class LargeVocabulary(Transformation[LargeVocabularyParams]):
    """Puts tokens, their rows, an index and a runtime beside weights and tokenizer, which stay as they are."""

    name = "large-vocabulary"
    summary = "Let a checkpoint read and write very many more tokens, found by a search index."
    paper = "Feher et al. 2024, Dynamic Tokenization, arXiv 2411.18553"
    loads_with = "stock transformers; new tokens: runtime.py in the checkpoint, with torch, tokenizers and faiss-cpu"
    Params = LargeVocabularyParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: eight tokens that are learnt on a few sentences.

        Raises:
            NotApplicable: faiss is not installed.
        """
        from regraft.core.errors import UsageError
        from regraft.core.testing.conformance.check import NotApplicable
        from regraft.core.testing.data import texts, write_rows
        from regraft.plugins.tokenizer_retrofit.large.library import check_library

        try:
            check_library()
        except UsageError as missing:
            raise NotApplicable(f"{missing.message}: {missing.remedy}") from None
        rows = write_rows(folder / "texts.jsonl", texts(32))
        return {"corpus": str(rows), "size": 8, "queries": 32, "candidates": 4}

    def check(self, checkpoint: Checkpoint, params: LargeVocabularyParams) -> None:
        """Refuse what cannot be done.

        Raises:
            Unsupported: no tokenizer.json, no causal language model, or tables of more kinds than two.
            UsageError, InputError: the corpus or the list of tokens is not there, or faiss is not installed.
        """
        from regraft.plugins.tokenizer_retrofit.large.rewrite import check

        check(checkpoint, params)

    def plan(self, checkpoint: Checkpoint, params: LargeVocabularyParams) -> Outline:
        """The files that are added; no tensor changes."""
        from regraft.plugins.tokenizer_retrofit.large.rewrite import outline

        return outline(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: LargeVocabularyParams, run: Run) -> Patch:
        """Tokens, rows, index, policy and runtime."""
        from regraft.plugins.tokenizer_retrofit.large.rewrite import apply

        return apply(checkpoint, params, run)
