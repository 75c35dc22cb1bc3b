"""Continuations before and after, as a page to read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from regraft.plugins.hyperfitting.figures import Figures
from regraft.plugins.hyperfitting.params import HyperfittingParams


def samples_page(
    tokenizer: Any, contexts: Sequence[Sequence[int]], before: Figures, after: Figures, params: HyperfittingParams
) -> bytes:
    """A Markdown page with every context and its continuations, the same bytes for the same tokens."""
    report = params.report
    legend = (
        f"Greedy, {params.new_tokens} tokens each; end tokens are never chosen. TTR: different tokens among the last "
        f"{report.ttr_window}, divided by their number. Run: most tokens in a row that stand in a training sequence "
        f"too; {report.citation_ngram} or more are a citation."
    )
    lines = [
        f"# Continuations before and after hyperfitting\n\n{legend}\n",
        "| | before | after |\n|---|---|---|",
        f"| mean TTR | {before.type_token_ratio:.3f} | {after.type_token_ratio:.3f} |",
        f"| citation rate | {before.citation_rate:.3f} | {after.citation_rate:.3f} |",
        f"| longest run | {max(before.runs)} | {max(after.runs)} |",
    ]
    for number, context in enumerate(contexts):
        lines.append(f"\n## {number + 1}\n\n{_quoted(tokenizer, context)}")
        for name, figures in (("Before", before), ("After", after)):
            facts = f"TTR {figures.ratios[number]:.3f}, run {figures.runs[number]}"
            lines.append(f"\n{name} ({facts}):\n\n{_quoted(tokenizer, figures.continuations[number])}")
    return ("\n".join(lines) + "\n").encode("utf-8", errors="replace")


def _quoted(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of `ids` between fences that do not occur in it."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
