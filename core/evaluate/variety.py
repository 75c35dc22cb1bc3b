"""Generation metrics: how varied a model's greedy continuations are, how sure it is of them, and what they cite."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from regraft.core.errors import InputError
from regraft.core.evaluate.metric import Measured, Measuring, Metric
from regraft.core.evaluate.quantiles import quantiles
from regraft.core.evaluate.sample import Sample
from regraft.core.transformation import Params

if TYPE_CHECKING:
    from regraft.core.loaded import Loaded

Count = Annotated[int, Field(ge=1)]


class VarietyParams(Params):
    """Texts whose beginnings are continued."""

    data: tuple[str, ...] = Field(description="Text or data files whose texts begin the continuations, with commas.")
    column: str | None = Field(None, description="The column with the text. Default: found by its name.")
    unit: Literal["file", "paragraph", "line"] = Field(
        "paragraph", description="What one text of a .txt or .md file is."
    )
    prompt_tokens: Count = Field(32, description="Tokens of a text that are read; shorter texts are left out.")
    new_tokens: Count = Field(96, description="Tokens of a continuation; none ends earlier.")
    max_texts: Count = Field(64, description="Only the first so many texts.")
    window: Count = Field(96, description="Last tokens that the type-token ratio counts.")
    corpus: tuple[str, ...] | None = Field(None, description="Texts that continuations may cite, with commas.")
    ngram: Count = Field(16, description="So many tokens in a row that stand in the corpus are a citation.")


class Variety(Metric[VarietyParams]):
    """Type-token ratio, predictive entropy and citations of greedy continuations of a forced length."""

    name = "generation"
    summary = "Variety (type-token ratio), entropy and citations of greedy continuations."
    figures = MappingProxyType(
        {
            "type_token_ratio": "different tokens over tokens of a continuation, mean; 1 / window for a single token",
            "entropy": "mean entropy of the predictions along the continuations, in nats",
            "citation_rate": "share of continuations with ngram tokens in a row from the corpus; with corpus alone",
            "longest_citation": "mean longest run of tokens that stands in the corpus; with corpus alone",
        }
    )
    Params = VarietyParams

    def check(self, params: VarietyParams) -> None:
        """Whether the texts are there."""
        from regraft.core.data.load import files_of

        for source in (*params.data, *(params.corpus or ())):
            files_of(source)

    def measure(self, subject: Loaded, params: VarietyParams, measuring: Measuring) -> Measured:
        """Continue the beginning of every text that is long enough."""
        from regraft.core.measures.greedy import greedy
        from regraft.core.measures.tokens import type_token_ratio

        contexts = _contexts(params, subject.tokenizer)
        measuring.tell(f"generation: {len(contexts)} continuations of {params.new_tokens} tokens")
        written = greedy(subject.model, list(contexts.values()), params.new_tokens, batch_size=4 * measuring.batch_size)
        ratios = {key: type_token_ratio(ids, params.window) for key, ids in zip(contexts, written, strict=True)}
        samples = {
            "type_token_ratio": Sample.mean(ratios),
            "entropy": _entropies(subject, contexts, written),
            **_citations(params, subject.tokenizer, contexts, written),
        }
        curve = quantiles(list(ratios.values()), "type-token ratio")
        facts = {"continuations": len(written), "new_tokens": params.new_tokens}
        return Measured(samples, facts, (), {"type-token ratio": curve})


def _contexts(params: VarietyParams, tokenizer: Any) -> dict[str, list[int]]:
    from regraft.core.evaluate.texts import raw_texts

    found: dict[str, list[int]] = {}
    for text, place in raw_texts(params.data, params.column, params.unit):
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        if len(ids) > params.prompt_tokens:
            found[str(place)] = ids[: params.prompt_tokens]
        if len(found) == params.max_texts:
            break
    if not found:
        raise InputError(
            "no text is long enough", where=", ".join(params.data),
            expected=f"a text of more than {params.prompt_tokens} tokens",
            remedy="lower prompt_tokens, or give unit=file",
        )  # fmt: skip
    return found


def _entropies(subject: Loaded, contexts: dict[str, list[int]], written: list[list[int]]) -> Sample:
    """Mean entropy of the predictions of each continuation's tokens."""
    from regraft.core.data.examples import IGNORED, Example, ints
    from regraft.core.data.rows import Place
    from regraft.core.measures.predictions import predictions

    found = {}
    for (key, context), ids in zip(contexts.items(), written, strict=True):
        example = Example(ints([*context, *ids]), ints([IGNORED] * len(context) + ids), Place(key, 1))
        found[key] = predictions(subject.head, [example]).entropy
    return Sample.mean(found)


def _citations(
    params: VarietyParams, tokenizer: Any, contexts: dict[str, list[int]], written: list[list[int]]
) -> dict[str, Sample]:
    from regraft.core.evaluate.texts import raw_texts
    from regraft.core.measures.tokens import longest_shared_runs

    if params.corpus is None:
        return {}
    texts = (text for text, _ in raw_texts(params.corpus, None, "file"))
    corpus = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    runs = dict(zip(contexts, longest_shared_runs(written, corpus), strict=True))
    return {
        "citation_rate": Sample.mean({key: float(run >= params.ngram) for key, run in runs.items()}),
        "longest_citation": Sample.mean({key: float(run) for key, run in runs.items()}),
    }
