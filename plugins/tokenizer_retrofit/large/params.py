"""Parameters of `large-vocabulary`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, FilePath, model_validator

from regraft.core.data.settings import Data
from regraft.core.transformation import Params
from regraft.plugins.tokenizer_retrofit.params import HypernetSettings, check_texts

Count = Annotated[int, Field(ge=1)]


class LargeVocabularyParams(Params):
    """Parameters of `large-vocabulary`."""

    corpus: Data | None = Field(None, description="Texts that tokens are learnt on, and the index is measured on.")
    corpus_bytes: Count | None = Field(None, description="Read so many bytes of the corpus. Default: all.")
    size: Annotated[int, Field(ge=0)] = Field(
        0, description="Most tokens that are learnt on the corpus, as `extend` of tokenizer-retrofit learns them."
    )
    tokens: FilePath | None = Field(
        None,
        description="In place of size: a text file with a token a line; a blank at the beginning of one counts.",
    )
    min_count: Count = Field(3, description="size: pairs that stand in the corpus less often are left alone.")
    max_length: Annotated[int, Field(ge=2)] = Field(32, description="size: characters of a new token.")
    init: Literal["subtoken-mean", "hypernet"] = Field(
        "subtoken-mean",
        description="Rows of new tokens. subtoken-mean: the mean of the rows that spell the token, which is read, but "
        "never the likeliest to be written. hypernet: predicted by a network.",
    )
    hypernet: HypernetSettings | None = Field(None, description="hypernet: { folder, language }.")
    lists: Count | None = Field(None, description="Parts of the index. Default: the square root of its rows.")
    storage: Literal["float32", "float16", "int8"] = Field(
        "int8", description="How the index keeps rows; candidates are computed from the rows themselves."
    )
    candidates: Count = Field(64, description="Rows that the index finds, whose logits are then computed exactly.")
    probes: Count | None = Field(
        None, description="Parts of the index that are looked through. Default: the fewest that reach `recall`."
    )
    recall: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        0.99, description="How often the likeliest token is to be found, measured on the corpus."
    )
    queries: Count = Field(512, description="Places of the corpus on which the index is measured.")

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        if self.tokens is not None and self.size:
            raise ValueError("give size or tokens, and not both")
        learnt = ("min_count", "max_length")
        strays = [key for key in learnt if getattr(self, key) != type(self).model_fields[key].default]
        if strays and not self.size:
            raise ValueError(f"{strays[0]} is for size: leave it out")
        if self.size and self.corpus is None:
            raise ValueError("size needs a corpus that tokens are learnt on")
        if (self.init == "hypernet") != (self.hypernet is not None):
            raise ValueError('init = "hypernet" and hypernet go together')
        if self.corpus is None and self.probes is None:
            raise ValueError("without a corpus the index cannot be measured: give probes")
        if self.probes is not None and "recall" in self.model_fields_set:
            raise ValueError("give probes or recall, and not both")
        if self.probes is not None and self.lists is not None and self.probes > self.lists:
            raise ValueError("there are more probes than lists")
        check_texts("corpus", self.corpus)
        return self
