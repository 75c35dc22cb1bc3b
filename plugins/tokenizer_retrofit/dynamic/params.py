"""Parameters of `dynamic-tokenization`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.data.settings import Data
from regraft.core.transformation import Params
from regraft.plugins.tokenizer_retrofit.params import HypernetSettings, check_texts

Count = Annotated[int, Field(ge=1)]


class DynamicTokenizationParams(Params):
    """Parameters of `dynamic-tokenization`."""

    merges: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Merges for each batch or text; 0 leaves the tokenizer's tokens alone."
    )
    reduction: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        None,
        description="In place of merges: of the way from the tokenizer's tokens to merging all that can be merged. "
        "The corpus says how many merges that takes.",
    )
    boundary: Literal["pretoken", "word"] = Field(
        "pretoken", description="What no merge crosses: the tokenizer's pre-tokens, or blanks alone."
    )
    scope: Literal["batch", "example"] = Field(
        "batch", description="Count and merge over a batch, or for each text alone, which does not depend on others."
    )
    min_count: Count = Field(1, description="Pairs that stand in the batch or text less often are left alone.")
    max_token_bytes: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Of a merged token. Default: any number."
    )
    padding: Literal["auto", "left", "right"] = Field(
        "auto", description="auto: left for causal language models, right for the others."
    )
    composer: Literal["mean", "table", "hypernet"] = Field(
        "mean",
        description="Embeddings of merged tokens. mean: of the rows that spell the token. table: rows made for the "
        "corpus's most likely merged tokens, and means for the others. hypernet: predicted by a network from the rows "
        "that spell the token, when it is read.",
    )
    hypernet: HypernetSettings | None = Field(None, description="hypernet: { folder, language }.")
    table_size: Count = Field(4096, description="table: most rows.")
    table_rows: Literal["blend", "focus"] = Field(
        "blend", description="table: how its rows are made; as `init` of tokenizer-retrofit."
    )
    corpus: Data | None = Field(None, description="Texts that reductions are measured on, and a table is made for.")
    corpus_bytes: Count | None = Field(None, description="Read so many bytes of the corpus. Default: all.")
    batch_size: Count = Field(32, description="Texts of a batch when reductions are measured.")

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        if (self.merges is None) == (self.reduction is None):
            raise ValueError("give merges or reduction, and not both")
        if self.corpus is None and self.reduction is not None:
            raise ValueError("reduction is measured on a corpus: give one")
        if self.corpus is None and self.composer == "table":
            raise ValueError('composer = "table" is made for a corpus: give one')
        if self.composer != "table" and {"table_size", "table_rows"} & self.model_fields_set:
            raise ValueError('table_size and table_rows are for composer = "table": leave them out')
        if (self.composer == "hypernet") != (self.hypernet is not None):
            raise ValueError('composer = "hypernet" and hypernet go together')
        check_texts("corpus", self.corpus)
        return self
