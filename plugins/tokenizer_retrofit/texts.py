"""The texts whose bits per byte a step measures: held-out ones, or else the first of the corpus, or built-in ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from regraft.core.checkpoint import Checkpoint
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.params import TokenizerRetrofitParams
from regraft.plugins.tokenizer_retrofit.passages import passage_bytes, passages
from regraft.plugins.tokenizer_retrofit.proof import PROBES
from regraft.plugins.tokenizer_retrofit.sources import corpus_of

Kind = Literal["held-out", "corpus", "built-in"]

HELD_OUT_BYTES = 100_000
"""Of the held-out texts that are measured."""
_MOST_FILES, _MOST_PASSAGES = 5, 10
"""Of the corpus."""
LABELS: Mapping[str, str] = {
    "held-out": "the held-out texts",
    "corpus": "the corpus's first passages, which the vocabulary is made for",
    "built-in": "built-in texts",
}


@dataclass(frozen=True, eq=False)
class Texts:
    """What is measured.

    Args:
        kind: where the passages come from.
        passages: by the name of their file.
    """

    kind: Kind
    passages: dict[str, list[str]]

    @property
    def label(self) -> str:
        """What they are, for messages."""
        return LABELS[self.kind]


def texts_of(params: TokenizerRetrofitParams, checkpoint: Checkpoint) -> Texts:
    """Held-out texts where they are given; else the first passages of each of the first files of the corpus.

    Args:
        params: of the step.
        checkpoint: the model, whose positions a passage must not exceed.

    Raises:
        RegraftError: they cannot be read.
    """
    nbytes = passage_bytes(checkpoint)
    if params.held_out is not None:
        return Texts("held-out", _by_file(Corpus(params.held_out, HELD_OUT_BYTES), nbytes))
    corpus = corpus_of(params)
    if corpus is None:
        built_in = [probe for probe in PROBES if probe.strip()]
        return Texts("built-in", {"built-in": passages(built_in, nbytes=nbytes)})
    most = _MOST_PASSAGES * nbytes
    found = {name: passages([text], nbytes=nbytes) for name, text in corpus.by_file(most, _MOST_FILES).items()}
    found = found or _by_file(Corpus(corpus.data, most), nbytes)
    each = max(1, _MOST_PASSAGES // len(found))
    return Texts("corpus", {name: own[:each] for name, own in found.items()})


def _by_file(corpus: Corpus, nbytes: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, text in corpus.named_texts():
        found.setdefault(name, []).extend(passages([text], nbytes=nbytes))
    return found
