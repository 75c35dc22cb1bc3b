"""tokenizer.json, read once: its kind, its tokens and merges, and the bytes that tokens spell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, Unsupported
from regraft.core.jsonio import dump
from regraft.core.verify.structure import TOKENIZER
from regraft.plugins.tokenizer_retrofit.spelling import CONTINUES, SPACE, Spelling, bytes_of
from regraft.plugins.tokenizer_retrofit.well_formed import check_form

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kind = Literal["BPE", "Unigram", "WordPiece"]

_KINDS = ("BPE", "Unigram", "WordPiece")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before the model sees it.

    Args:
        content: verbatim.
        id: its row.
        special: whether it is left out of decoded text.
        single_word: matched only where no letter, digit or _ stands beside it.
        lstrip, rstrip: takes the whitespace before it, or behind it, along.
        normalized: matched, as the normaliser writes it, in normalised text.
    """

    content: str
    id: int
    special: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass(frozen=True, eq=False)
class TokenizerFile:
    """One tokenizer.json.

    Args:
        document: what it says.
        label: how messages name it.
        kind: of its model.
        spelling: how its tokens write bytes.
        vocab: id by token of the model, in order of ids; added tokens are not always among them.
        added: tokens that are matched verbatim, in order of ids.
    """

    document: Mapping[str, Any]
    label: str
    kind: Kind
    spelling: Spelling
    vocab: Mapping[str, int]
    added: tuple[AddedToken, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> TokenizerFile:
        """The one of a checkpoint.

        Raises:
            Unsupported: there is none, or a step before is still to make it; its model is none of BPE, Unigram and
                WordPiece, or cuts by chance or by marks that are no bytes of the text.
            InputError: it is malformed.
        """
        if TOKENIZER not in checkpoint.files:
            raise Unsupported(
                "the tokenizer has no fast form, whose file is tokenizer.json", where=checkpoint.label,
                expected=TOKENIZER, remedy="save it once with transformers: AutoTokenizer.from_pretrained(DIR)"
                ".save_pretrained(DIR)",
            )  # fmt: skip
        if checkpoint.files[TOKENIZER].data == b"":  # of a planned step, which says that there will be one
            raise Unsupported(
                "a step before makes a tokenizer that is known only when it has run", where=TOKENIZER,
                remedy="give the later step a recipe of its own, on the output of this one",
            )  # fmt: skip
        return cls.parse(checkpoint.json(TOKENIZER), f"{checkpoint.label}: {TOKENIZER}")

    @classmethod
    def parse(cls, document: Mapping[str, Any], label: str) -> TokenizerFile:
        """From the JSON object.

        Raises:
            Unsupported, InputError: as `of`.
        """
        model = document.get("model")
        if not isinstance(model, Mapping):
            raise InputError("has no model", where=label, expected='an object "model"', found=type(model).__name__)
        kind = model.get("type") or ("BPE" if "merges" in model else None)
        if kind not in _KINDS:
            raise Unsupported("tokenizers of this kind cannot be changed", where=label,
                              expected=", ".join(_KINDS), found=kind)  # fmt: skip
        check_form(document, label)
        _refuse_settings(model, kind, label)
        vocab = _vocab(model, kind, label)
        added = sorted(_added(document, label), key=lambda token: token.id)
        return cls(document, label, cast(Kind, kind), _spelling(document, kind), vocab, tuple(added))

    @property
    def model(self) -> Mapping[str, Any]:
        """What the file says of the model."""
        return cast(Mapping[str, Any], self.document["model"])

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """Every token with its id: those of the model, and the added ones, whose id the model's wins over."""
        return {**{token.content: token.id for token in self.added}, **self.vocab}

    @cached_property
    def tokens(self) -> Mapping[int, str]:
        """Every id with its token, in order of ids."""
        return {index: token for token, index in sorted(self.ids.items(), key=lambda item: item[1])}

    @property
    def rows(self) -> int:
        """Rows that the tokens need: one more than the largest id, which may be more than there are tokens."""
        return max(self.ids.values(), default=-1) + 1

    @cached_property
    def merges(self) -> tuple[tuple[str, str], ...]:
        """The merges of a BPE model, in order; written as pairs or as two tokens with a space between them."""
        if self.kind != "BPE":
            return ()
        pairs = [entry.split(" ") if isinstance(entry, str) else entry for entry in self.model.get("merges", ())]
        for number, pair in enumerate(pairs):
            if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise InputError("a merge is no pair of tokens", where=f"{self.label}: merge {number}", found=pair)
        return tuple((left, right) for left, right in pairs)

    @cached_property
    def scores(self) -> Mapping[str, float]:
        """Scores of Unigram pieces; empty for other kinds."""
        return {str(piece): float(score) for piece, score in self.model["vocab"]} if self.kind == "Unigram" else {}

    @cached_property
    def unknown(self) -> str | None:
        """The token for what the vocabulary cannot spell; None without."""
        if self.kind == "Unigram":
            return self.tokens.get(self.model.get("unk_id", -1))
        found = self.model.get("unk_token")
        return found if isinstance(found, str) and found else None

    @cached_property
    def verbatim(self) -> frozenset[str]:
        """Tokens that are matched in the text as they stand."""
        return frozenset(token.content for token in self.added)

    @cached_property
    def spans_words(self) -> bool:
        """Whether a token goes on behind the mark of a space that does not begin it."""
        return any(SPACE in token.lstrip(SPACE) for token in self.vocab if token not in self.verbatim)

    def bytes_of(self, token: str) -> bytes | None:
        """The bytes of a token; None if it spells none."""
        if token in self.verbatim:
            return token.encode("utf-8", "surrogatepass")
        return bytes_of(token, self.spelling)

    def joined(self, left: str, right: str) -> str:
        """The token that two tokens side by side make."""
        return left + (right.removeprefix(CONTINUES) if self.spelling == "words" else right)

    def backend(self) -> Tokenizer:
        """It as `tokenizers` runs it: one for all, not to be changed.

        Raises:
            InputError: `tokenizers` does not read it.
        """
        return self._backend

    @cached_property
    def _backend(self) -> Tokenizer:
        return self.new_backend()

    def new_backend(self) -> Tokenizer:
        """One that is the caller's own, and neither pads nor cuts off, which transformers does for each call. Raises as
        `backend`."""
        from tokenizers import Tokenizer

        try:
            made = Tokenizer.from_buffer(dump(self.document))
        except BaseException as error:  # the library raises Exception itself; and where it panics, what is none
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError("the tokenizers library does not read the file", where=self.label, found=error) from None
        made.no_padding()
        made.no_truncation()
        return made

    def stray(self) -> tuple[str, int, int | None] | None:
        """The first token to which `tokenizers` gives another id than the file: it, the file's id, the other one.

        It numbers added tokens that the model lacks from the number of tokens on, whatever the file says.
        """
        found = self.backend().get_vocab(with_added_tokens=True)
        strays = (token for token, index in self.ids.items() if found.get(token) != index)
        token = next(strays, None)
        return None if token is None else (token, self.ids[token], found.get(token))


def _refuse_settings(model: Mapping[str, Any], kind: str, label: str) -> None:
    """Refuse what makes a token's text other than its bytes, and its cut a matter of chance."""
    if model.get("dropout"):
        raise Unsupported("a BPE with dropout cuts the same text in many ways", where=f"{label}: model.dropout",
                          found=model["dropout"], remedy="set it to null")  # fmt: skip
    prefix = model.get("continuing_subword_prefix")
    for key, value, allowed in (
        ("continuing_subword_prefix", prefix, ("", CONTINUES) if kind == "WordPiece" else ("",)),
        ("end_of_word_suffix", model.get("end_of_word_suffix"), ("",)),
    ):
        if value and value not in allowed:
            raise Unsupported("tokens of this kind have marks that are no bytes of the text",
                              where=f"{label}: model.{key}", expected=" or ".join(map(repr, allowed)),
                              found=repr(value))  # fmt: skip


def _vocab(model: Mapping[str, Any], kind: str, label: str) -> dict[str, int]:
    """Id by token, in order of ids."""
    vocab = model.get("vocab")
    if kind == "Unigram" and isinstance(vocab, list):
        found = {str(piece[0]): index for index, piece in enumerate(vocab)}
        if len(found) < len(vocab):
            raise InputError("a token stands in the vocabulary twice", where=label)
        return found
    if not isinstance(vocab, Mapping) or not all(type(index) is int and index >= 0 for index in vocab.values()):
        raise InputError("has no vocabulary", where=label, expected="ids by token", found=type(vocab).__name__)
    if len(set(vocab.values())) < len(vocab):
        raise InputError("two tokens have one id", where=label, remedy="correct the vocabulary")
    return dict(sorted(vocab.items(), key=lambda item: item[1]))


def _added(document: Mapping[str, Any], label: str) -> Iterator[AddedToken]:
    for entry in document.get("added_tokens") or ():
        content, index = (entry.get("content"), entry.get("id")) if isinstance(entry, Mapping) else (None, None)
        if not isinstance(content, str) or type(index) is not int or index < 0:
            raise InputError("an added token has no content or no id", where=label, found=entry)
        special = bool(entry.get("special"))
        flags = {flag: bool(entry.get(flag)) for flag in ("single_word", "lstrip", "rstrip")}
        yield AddedToken(content, index, special, **flags, normalized=bool(entry.get("normalized", not special)))


def _spelling(document: Mapping[str, Any], kind: str) -> Spelling:
    """By what the stages around the model do; byte-level where any of them is."""
    if kind == "WordPiece" and document["model"].get("continuing_subword_prefix", CONTINUES) == CONTINUES:
        return "words"
    stages = [
        stage.get("type") for name in ("pre_tokenizer", "decoder", "normalizer") for stage in stages_of(document, name)
    ]
    return "bytes" if "ByteLevel" in stages else "pieces"


def stages_of(document: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    """The stages of one part of the pipeline, those of a sequence one by one."""
    stage = document.get(name)
    if not isinstance(stage, Mapping):
        return
    nested = next((stage[key] for key in ("pretokenizers", "normalizers", "decoders") if key in stage), None)
    if isinstance(nested, list):
        for one in nested:
            yield from stages_of({name: one}, name)
    else:
        yield stage
