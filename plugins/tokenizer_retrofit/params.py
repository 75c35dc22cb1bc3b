"""Parameters of `tokenizer-retrofit`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import DirectoryPath, Field, FilePath, model_validator

from regraft.core.data.settings import Data, DataSettings
from regraft.core.transformation import Params

Count = Annotated[int, Field(ge=1)]

_LEARNT = ("extend", "replace-train", "trim")
_USED = {
    "corpus": (*_LEARNT, "replace-donor"),
    "corpus_bytes": (*_LEARNT, "replace-donor"),
    "size": ("extend", "replace-train"),
    "min_count": _LEARNT,
    "donor": ("replace-donor",),
    "add": ("add-tokens",),
    "reserved": ("add-tokens",),
    "keep": ("trim",),
    "repair_bytes": ("extend",),
    "max_length": ("extend", "replace-train"),
    "algorithm": ("replace-train",),
    "special": ("replace-donor",),
    "add_special": ("add-tokens",),
}
_NEEDED = {
    "extend": ("corpus",),
    "replace-train": ("corpus", "size"),
    "replace-donor": ("donor",),
    "add-tokens": ("add",),
    "trim": ("corpus",),
}
_OF_SEQUENCES = ("learn", "end", "max_tokens", "min_tokens", "too_long", "pack", "restart_positions")
"""Keys of data that say how texts become sequences."""


_PACKED = ("learn", "max_tokens", "too_long", "pack")
"""Those that a training on packed texts settles by itself."""


def check_texts(key: str, data: DataSettings | None, without: Sequence[str] = _OF_SEQUENCES) -> None:
    """Whether data that are read as texts alone are given as such; of `max_rows` the first are read.

    Args:
        key: of the parameter.
        data: its value.
        without: keys of data that have no effect.

    Raises:
        ValueError: the rows are to be something else, or a key that a text has no use for is not at its default.
    """
    if data is None:
        return
    if data.kind not in (None, "text"):
        raise ValueError(f'{key} is text: leave kind out, or set kind = "text"')
    strays = [name for name in without if getattr(data, name) != DataSettings.model_fields[name].default]
    if strays:
        raise ValueError(f"{key} is read as texts, which {strays[0]} has no effect on: leave it out")


class WordVectors(Params):
    """Static word vectors of two languages, in fastText's text form.

    Args:
        source: of the language of the old vocabulary.
        target: of that of the new tokens.
        dictionary: pairs of words that mean the same, one pair a line; None where the vectors share a space already.
    """

    source: FilePath
    target: FilePath
    dictionary: FilePath | None = None


class HypernetSettings(Params):
    """A hypernetwork that predicts rows.

    Args:
        folder: with config.json and model.safetensors.
        language: its number, for networks that read one.
    """

    folder: DirectoryPath
    language: Annotated[int, Field(ge=0)] | None = None


class BodySettings(Params):
    """Low-rank factors beside weights of the body (LoRA), with peft's defaults.

    Args:
        rank: of every delta.
        alpha: deltas are multiplied by alpha / rank.
        targets: projections of the layers; one that is stored together with others learns with them.
    """

    rank: Count = 8
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 8.0
    targets: Annotated[
        tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...],
        Field(min_length=1),
    ] = ("q_proj", "v_proj")


class AdaptSettings(Params):
    """Training of the new rows, and of the body where it is asked for.

    Args:
        data: texts; None takes the corpus, as far as `corpus_bytes` goes.
        loss: `clm`, cross-entropy of the texts' tokens; `alm`, the likelihoods that the model gave before the step,
            with its old tokenizer, to the same stretches of text.
        append_space: of `alm`: a stretch counts together with a space, or the like, behind it.
        join_below: of `alm`: a stretch goes on until the old model gives more than this to a space behind it; 0 joins
            none.
        body: low-rank factors that learn too, and are merged into the weights; None leaves the body as it is.
        steps, epochs: the most steps, and passes over the data.
        batch_size: sequences of a step.
        tokens: of a sequence; the texts are packed.
        lr, warmup_steps, schedule: the learning rate.
        precision: of products.
    """

    data: Data | None = None
    loss: Literal["clm", "alm"] = "clm"
    append_space: bool = True
    join_below: Annotated[float, Field(ge=0, lt=1)] = 0.1
    body: BodySettings | None = None
    steps: Count | None = 40
    epochs: Count = 1
    batch_size: Count = 1
    tokens: Annotated[int, Field(ge=2)] = 256
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        own = {key: AdaptSettings.model_fields[key].default for key in ("append_space", "join_below")}
        strays = [key for key, default in own.items() if getattr(self, key) != default]
        if self.loss != "alm" and strays:
            raise ValueError(f'{strays[0]} is not for loss = "{self.loss}": leave it out')
        check_texts("data", self.data, _OF_SEQUENCES if self.loss == "alm" else _PACKED)
        return self


class TokenizerRetrofitParams(Params):
    """Parameters of `tokenizer-retrofit`."""

    vocabulary: Literal["extend", "replace-train", "replace-donor", "add-tokens", "trim"] = Field(
        "extend",
        description="extend: merges learnt on the corpus are appended, and every old token keeps its id and its row. "
        "replace-train: a vocabulary of its own, trained on the corpus. replace-donor: that of another tokenizer. "
        "add-tokens: `add` is matched verbatim. trim: only what the corpus uses stays.",
    )
    corpus: Data | None = Field(None, description="Texts that the vocabulary is made for.")
    corpus_bytes: Count | None = Field(None, description="Read so many bytes of the corpus. Default: all.")
    size: Count | None = Field(
        None, description="extend: most tokens that are appended; default 2048. replace-train: of the vocabulary."
    )
    min_count: Count | None = Field(
        None, description="Pairs (trim: words) that stand in the corpus less often are left alone. Default 3; trim: 1."
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        32,
        description='extend, and boundary = "none": most characters of a new token, in the alphabet of the vocabulary: '
        "bytes where byte-level.",
    )
    repair_bytes: bool = Field(
        False,
        description="extend: append the bytes that a byte-level vocabulary lacks, so that no text is lost; their rows "
        "are the mean of all.",
    )
    algorithm: Literal["bpe", "unigram", "longest-match"] = Field(
        "bpe", description="replace-train: the model of the new vocabulary."
    )
    boundary: Literal["pretoken", "none"] = Field(
        "pretoken",
        description='replace-train with algorithm = "bpe": what no token goes beyond. pretoken: the words that the '
        "base cuts. none: lines, and numbers as the base cuts them; tokens may span words, and the pre-tokenizer is "
        "another one.",
    )
    donor: Path | None = Field(None, description="replace-donor: a folder with a tokenizer.json, or the file.")
    special: Literal["source", "donor"] = Field(
        "source", description="replace-donor: whose special tokens, beginnings and ends of texts the result has."
    )
    add: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), description="add-tokens: texts of the new tokens.")
    reserved: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="add-tokens: take the places of tokens that were kept free for it, such as `[unused*]` (* stands "
        "for any text), the lowest id first. Default: new rows.",
    )
    add_special: bool = Field(True, description="add-tokens: leave them out when text is decoded for reading.")
    keep: tuple[str, ...] = Field((), description="trim: texts whose tokens stay, however rare.")
    init: Literal["subtoken-mean", "blend", "focus", "wechsel", "omp", "hypernet", "mean", "normal"] = Field(
        "subtoken-mean",
        description="Rows of new tokens. subtoken-mean: the mean of the rows that spell the token. focus: a mixture of "
        "kept tokens that stand in like company in the corpus. blend: half of each. wechsel: a mixture of old tokens "
        "that mean the like, by `vectors`. omp: the donor's rows, written in shared tokens. hypernet: predicted by a "
        "network. mean: of all old rows. normal: drawn around it.",
    )
    vectors: WordVectors | None = Field(None, description="wechsel: word vectors of the two languages.")
    hypernet: HypernetSettings | None = Field(None, description="hypernet: { folder, language }.")
    atoms: Count = Field(64, description="omp: shared tokens that a row is written in.")
    pad_to_multiple_of: Count = Field(
        1, description="Rows of zeros behind the last token, up to a multiple of this; they are never generated."
    )
    adapt: AdaptSettings | None = Field(
        None,
        description="Learn the new rows: { data, loss, append_space, join_below, body, steps, epochs, batch_size, "
        "tokens, lr, warmup_steps, schedule, precision }. Default: they stay as made.",
    )
    held_out: Data | None = Field(
        None,
        description="Texts whose bits per byte are measured with the old vocabulary, the new one, and the learnt rows. "
        "Default: the corpus's first passages, or a few built-in texts; no row that is learnt is given up for those.",
    )
    proof: Literal["model", "files"] = Field(
        "model",
        description="model: the step runs the model before and after, and fails unless kept tokens have their logits "
        "and only tokens are written. files: what needs no model alone, in less memory.",
    )
    max_bpb_increase: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="The step fails if bits per byte rise by more. Default: any rise is only told."
    )

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        fields = type(self).model_fields
        given = {key for key in _USED if getattr(self, key) != fields[key].default}
        used = {key for key, kinds in _USED.items() if self.vocabulary in kinds}
        if strays := sorted(given - used):
            raise ValueError(f'{strays[0]} is not for vocabulary = "{self.vocabulary}": leave it out')
        needed = [key for key in _NEEDED[self.vocabulary] if key not in given]
        if needed:
            raise ValueError(f'vocabulary = "{self.vocabulary}" needs {needed[0]}')
        if self.boundary == "none" and (self.vocabulary, self.algorithm) != ("replace-train", "bpe"):
            raise ValueError(
                'boundary = "none" is for vocabulary = "replace-train" with algorithm = "bpe": it needs another '
                "pre-tokenizer, by which the old tokens would cut old texts otherwise"
            )
        if self.vocabulary == "replace-train" and self.boundary != "none" and "max_length" in given:
            raise ValueError('max_length is for vocabulary = "extend" or boundary = "none": leave it out')
        if self.algorithm == "unigram" and "min_count" in given:
            raise ValueError('min_count is not for algorithm = "unigram": leave it out')
        if self.init != "omp" and self.atoms != fields["atoms"].default:
            raise ValueError(f'atoms is not for init = "{self.init}": leave it out')
        if (self.init == "wechsel") != (self.vectors is not None):
            raise ValueError('init = "wechsel" and vectors go together')
        if (self.init == "hypernet") != (self.hypernet is not None):
            raise ValueError('init = "hypernet" and hypernet go together')
        if self.init == "omp" and self.vocabulary != "replace-donor":
            raise ValueError('init = "omp" needs vocabulary = "replace-donor"')
        if self.init in ("focus", "blend") and self.corpus is None:
            raise ValueError(f'init = "{self.init}" learns from a corpus: give one')
        if self.adapt is not None and (self.adapt.data or self.corpus) is None:
            raise ValueError("adapt needs data, since there is no corpus")
        if self.proof == "files" and self.needs_model:
            raise ValueError(f'{self.needs_model[0]} needs the model: leave it or proof = "files" out')
        check_texts("corpus", self.corpus)
        check_texts("held_out", self.held_out)
        return self

    @property
    def needs_model(self) -> tuple[str, ...]:
        """Keys that are given and cannot do without the model."""
        return tuple(key for key in ("held_out", "adapt", "max_bpb_increase") if getattr(self, key) is not None)
