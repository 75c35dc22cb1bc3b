"""What a new tokenizer must do, tried out: transformers and `tokenizers` cut alike, and no text is lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, TransformationError
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROBES = (
    "It's 3:45 pm; 1234567.89 + 42 = 1234609.89",
    "\n\n1. First\n\n2. Second\r\n\ttab  two  spaces   three",
    "we'll they've don't I'M",
    "naïve café — “quoted” … déjà vu; A\u030a \u00c5",
    "Привет, мир! Žluťoučký kůň. Ελληνικά.",
    "日本語のテキスト、中文文本。한국어 텍스트",
    "नमस्ते दुनिया สวัสดีชาวโลก مرحبا بالعالم",
    "\U0001f600\U0001f469\u200d\U0001f4bb \U0001f1f3\U0001f1f1 \u00a0nbsp\u200bzero",
    'def f(x):\n    return {"a": [x**2 for _ in range(10)]}  # ok',
    "",
    " ",
)
"""Texts whose tokens are compared: numbers, blank lines, contractions, marks, scripts, emoji, code."""

_SAMPLE_CHARACTERS = 200_000


def prove(
    before: Checkpoint, after: Checkpoint, old: TokenizerFile, new: NewVocabulary, texts: Iterable[str], run: Run
) -> dict[str, Any]:
    """Try the new tokenizer out on probes and on the beginning of the corpus.

    Args:
        before, after: the checkpoint without and with the new vocabulary.
        old: the old tokenizer.
        new: the new vocabulary.
        texts: the corpus.
        run: which loads tokenizers through transformers.

    Returns:
        Tokens for each word of the sample, before and after, if there is a corpus; JSON values.

    Raises:
        TransformationError: a token has another id than the file says; transformers knows tokens that the file lacks,
            or cuts a text otherwise; a text is decoded worse than before; a chat is rendered otherwise but for the
            donor's special tokens, or, where no token is new, cut otherwise.
    """
    if (stray := new.tokenizer.stray()) is not None:
        token, wanted, found = stray
        raise TransformationError(
            "the tokenizers library gives a token another id than tokenizer.json", where=repr(token), expected=wanted,
            found=found,
        )  # fmt: skip
    sample = _sample(texts)
    probes = [*PROBES, *sample[:50]]
    plain, stock = new.tokenizer.backend(), run.tokenizer(after)
    known = stock.get_vocab()
    if others := [token for token, index in new.tokenizer.ids.items() if known.get(token) != index]:
        raise TransformationError(
            "transformers gives a token another id than tokenizer.json", where=repr(others[0]),
            expected=new.tokenizer.ids[others[0]], found=known.get(others[0]),
            remedy="see added_tokens_decoder in tokenizer_config.json",
        )  # fmt: skip
    if strays := sorted(known.keys() - new.tokenizer.ids.keys()):
        raise TransformationError(
            "transformers knows tokens that tokenizer.json lacks, beyond the rows of the embeddings",
            where=", ".join(map(repr, strays[:5])), expected=f"{len(new.tokenizer.ids)} tokens", found=len(known),
            remedy='name none but tokens of tokenizer.json in tokenizer_config.json, or append them first: '
            'vocabulary = "add-tokens"',
        )  # fmt: skip
    for probe in probes:
        _check_stock(probe, plain, stock)
    _check_losses(probes, old.backend(), plain)
    figures = fertility(sample, old.backend(), plain)
    _check_chat(run.tokenizer(before), stock, old.backend(), new)
    return figures


def check_base(before: Checkpoint, old: TokenizerFile, run: Run) -> tuple[str, ...]:
    """Whether the base's own tokenizer is what its tokenizer.json says.

    Returns:
        A note where transformers cuts texts otherwise for the base, because of its class: the result is cut as the
        file says.

    Raises:
        InputError: `tokenizers` gives a token another id than the file, so that it is not known which row is its own.
    """
    if (stray := old.stray()) is not None:
        token, wanted, found = stray
        raise InputError("tokenizers gives a token another id than the file says", where=f"{old.label}: {token!r}",
                         expected=wanted, found=found,
                         remedy="number added tokens from the number of the model's tokens on")  # fmt: skip
    plain, stock = old.backend(), run.tokenizer(before)
    for probe in PROBES:
        if stock(probe, add_special_tokens=False)["input_ids"] != plain.encode(probe, add_special_tokens=False).ids:
            kind = type(stock).__name__
            note = f"transformers, by its class {kind}, cuts {probe[:20]!r} otherwise than the base's tokenizer.json"
            return (f"{note}; the result is cut as the file says",)
    return ()


def fertility(sample: Sequence[str], old: Tokenizer, new: Tokenizer) -> dict[str, Any]:
    """Tokens for each word (what whitespace separates) and bytes for each token, before and after; none of no text."""
    if not sample:
        return {}
    words = sum(len(text.split()) for text in sample)
    size = sum(len(text.encode()) for text in sample)
    found: dict[str, Any] = {}
    for name, tokenizer in (("before", old), ("after", new)):
        count = sum(len(encoded.ids) for encoded in tokenizer.encode_batch(list(sample), add_special_tokens=False))
        found[f"tokens_per_word_{name}"] = round(count / max(1, words), 6)
        found[f"bytes_per_token_{name}"] = round(size / max(1, count), 6)
    return found


def tokens_per_word(text: str, tokenizer: Tokenizer) -> float:
    """How many tokens a word (what whitespace separates) takes."""
    return len(tokenizer.encode(text, add_special_tokens=False).ids) / max(1, len(text.split()))


def _sample(texts: Iterable[str]) -> list[str]:
    """Lines of the corpus's beginning."""
    found, size = [], 0
    for text in texts:
        for line in text.splitlines():
            if line.strip():
                found.append(line)
                size += len(line)
            if size > _SAMPLE_CHARACTERS:
                return found
    return found


def _check_stock(probe: str, plain: Tokenizer, stock: Any) -> None:
    wanted = plain.encode(probe, add_special_tokens=False).ids
    found = stock(probe, add_special_tokens=False)["input_ids"]
    if found != wanted:
        raise TransformationError(
            "transformers cuts a text otherwise than tokenizer.json says", where=repr(probe), expected=wanted[:20],
            found=found[:20], remedy=f"its class is {type(stock).__name__}: see tokenizer_class and model_type",
        )  # fmt: skip


def _check_losses(probes: Sequence[str], old: Tokenizer, new: Tokenizer) -> None:
    for probe in probes:
        before, after = (
            tokenizer.decode(tokenizer.encode(probe, add_special_tokens=False).ids, skip_special_tokens=False)
            for tokenizer in (old, new)
        )
        if after not in (before, probe):
            raise TransformationError("a text is decoded worse than before", where=repr(probe),
                                      expected=repr(before), found=repr(after))  # fmt: skip


def _check_chat(before: Any, after: Any, plain: Tokenizer, new: NewVocabulary) -> None:
    if not before.chat_template:
        return
    chat: list[Mapping[str, str]] = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    one, other = (tokenizer.apply_chat_template(chat, tokenize=False) for tokenizer in (before, after))
    expected = before.apply_chat_template(chat, tokenize=False, **new.roles) if new.roles else one
    if expected != other:
        raise TransformationError("a chat is rendered otherwise than before", expected=repr(expected),
                                  found=repr(other))  # fmt: skip
    if any(origin.kept is None for origin in new.origins):
        return
    moved = new.new_id()
    wanted = [moved.get(index) for index in plain.encode(one, add_special_tokens=False).ids]
    found = new.tokenizer.backend().encode(other, add_special_tokens=False).ids
    if found != wanted:
        raise TransformationError("a chat is cut otherwise than before", where=repr(one), expected=wanted[:20],
                                  found=found[:20], remedy="name its words in `keep`")  # fmt: skip
