"""Parameters of `tokenizer-retrofit`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.data.settings import Data
from regraft.core.transformation import Params

Count = Annotated[int, Field(ge=1)]


class TokenizerRetrofitParams(Params):
    """Parameters of `tokenizer-retrofit`."""

    vocabulary: Literal["extend"] = Field(
        "extend",
        description="extend: merges learnt on a corpus are appended, and every old token keeps its id and its row.",
    )
    corpus: Data = Field(description="Texts that the vocabulary is made for.")
    corpus_bytes: Count | None = Field(None, description="Read so many bytes of the corpus. Default: all.")
    size: Count = Field(2048, description="Most tokens that are appended.")
    min_count: Count = Field(3, description="Pairs that stand in the corpus less often are not merged.")
    max_length: Annotated[int, Field(ge=2)] = Field(
        32, description="Characters of a new token, in the alphabet of the vocabulary: bytes where it is byte-level."
    )
    init: Literal["subtoken-mean"] = Field(
        "subtoken-mean", description="Rows of new tokens. subtoken-mean: the mean of the rows that spell the token."
    )
    pad_to_multiple_of: Count = Field(
        1, description="Rows of zeros behind the last token, up to a multiple of this; they are never generated."
    )

    @model_validator(mode="after")
    def _corpus_is_text(self) -> Self:
        if self.corpus.kind not in (None, "text"):
            raise ValueError('a corpus is text: leave kind out, or set kind = "text"')
        return self
