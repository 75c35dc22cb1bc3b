"""What a step leaves to read: tokens for each word, as a picture and as a table, and a table of bits per byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regraft.core.plots import bar_chart
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.proof import tokens_per_word
from regraft.plugins.tokenizer_retrofit.texts import LABELS
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary

FERTILITY, TABLES = "fertility.png", "retrofit.md"

_SAMPLE_BYTES, _MOST_FILES = 50_000, 24
"""Of the corpus, and of the files that tables and the picture show."""
_STATES = {"before": "before", "initial": "rows as made", "adapted": "learnt"}

Figures = Mapping[str, Mapping[str, float]]
"""By file, by state."""


def fertility_by_file(corpus: Corpus, old: TokenizerFile, new: NewVocabulary) -> dict[str, dict[str, float]]:
    """Tokens for each word of the beginnings of the corpus's files, before and after."""
    tokenizers = {"before": old.backend(), "after": new.tokenizer.backend()}
    return {
        name: {when: tokens_per_word(text, tokenizer) for when, tokenizer in tokenizers.items()}
        for name, text in corpus.by_file(_SAMPLE_BYTES, _MOST_FILES).items()
    }


def picture(words: Figures) -> bytes:
    """Two bars for each file; a PNG."""
    return bar_chart(words, title="fertility", y="tokens for each word")


def untried(why: str) -> dict[str, Any]:
    """For `proof` in the report: that no model was run, and why."""
    return {"model": None, "not_tried": why}


def tables_page(step: str, figures: Mapping[str, Any], words: Figures) -> bytes:
    """`retrofit.md`: what the step did to the vocabulary, in tables.

    Args:
        step: its id.
        figures: of the report.
        words: tokens for each word by file; none without a corpus.
    """
    lines = [f"# {step}: the new vocabulary", "", "| rows | |", "|---|---|"]
    lines += [f"| {kind} | {figures[kind]} |" for kind in ("copied", "composed", "unspelled")]
    if words:
        whole = {when: figures[f"tokens_per_word_{when}"] for when in ("before", "after")}
        lines += ["", "## Tokens for each word", ""]
        lines += _table(["file", "before", "after", "after / before"],
                        ([name, *_numbers(own.values()), _ratio(own["after"], own["before"])]
                         for name, own in [*words.items(), ("the corpus's beginning", whole)]))  # fmt: skip
    lines += ["", "## Tried in the model", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in figures["proof"].items()]
    if (files := figures.get("bpb_by_file")) is not None:
        states = [state for state in _STATES if f"bpb_{state}" in figures]
        together = {state: figures[f"bpb_{state}"] for state in states}
        rows = [*list(files.items())[:_MOST_FILES], (f"all of {len(files)} files", together)]
        lines += ["", f"## Bits per byte of {LABELS[figures['bpb_texts']]}", ""]
        lines += _table(["file", *(_STATES[state] for state in states)],
                        ([name, *_numbers(own[state] for state in states)] for name, own in rows))  # fmt: skip
    return ("\n".join(lines) + "\n").encode()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _numbers(values: Iterable[float]) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.3f}" if other else "-"
