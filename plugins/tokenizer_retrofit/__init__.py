"""`tokenizer-retrofit`: gives a checkpoint a better vocabulary.

Dynamic Tokenization (Feher, Vulić, Minixhofer, arXiv 2411.18553), frozen to a corpus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import AnyTransformation, Run, Transformation
from regraft.plugins.tokenizer_retrofit.dynamic import DynamicTokenization
from regraft.plugins.tokenizer_retrofit.large import LargeVocabulary
from regraft.plugins.tokenizer_retrofit.params import TokenizerRetrofitParams

regraft_api = ">=1,<2"


class TokenizerRetrofit(Transformation[TokenizerRetrofitParams]):
    """Appends tokens that a corpus asks for, with rows made of the old ones."""

    name = "tokenizer-retrofit"
    summary = "Give a checkpoint a better vocabulary for a corpus."
    paper = "Feher et al. 2024, Dynamic Tokenization, arXiv 2411.18553"
    Params = TokenizerRetrofitParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: one more token."""
        return {"vocabulary": "add-tokens", "add": ["<|think|>"]}

    def check(self, checkpoint: Checkpoint, params: TokenizerRetrofitParams) -> None:
        """Refuse what cannot be done.

        Raises:
            Unsupported: no tokenizer.json, a kind of tokenizer that cannot be changed, or more tables than two.
            InputError: tokenizer and embeddings do not fit.
        """
        from regraft.plugins.tokenizer_retrofit.rewrite import check

        check(checkpoint, params)

    def plan(self, checkpoint: Checkpoint, params: TokenizerRetrofitParams) -> Outline:
        """The most rows that there may be."""
        from regraft.plugins.tokenizer_retrofit.rewrite import outline

        return outline(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: TokenizerRetrofitParams, run: Run) -> Patch:
        """The new vocabulary and its rows."""
        from regraft.plugins.tokenizer_retrofit.rewrite import apply

        return apply(checkpoint, params, run)


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformations of this package."""
    return [TokenizerRetrofit, DynamicTokenization, LargeVocabulary]
