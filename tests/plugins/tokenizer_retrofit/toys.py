"""Toy tokenizers of each kind, trained on a few sentences, beside tiny models."""

import json
from pathlib import Path

from regraft.core.patch import overlay
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit import TokenizerRetrofit
from regraft.plugins.tokenizer_retrofit.params import TokenizerRetrofitParams
from tests.families import save_tiny

ENGLISH = (
    "In the beginning was the word, and the word was with the makers.\n\nThe same was in the beginning with them. "
    "All things were made by them; 12 and 345 of them.\nIt's what they'd said: we'll see that it isn't so.\n"
) * 4  # fmt: skip
DUTCH = (
    "De verzekering dekt de kosten van de verzekerde. Gezelligheid kent geen tijd, zei de geïnteresseerde lezer.\n"
    "De verzekeraar betaalt de verzekerde gezelligheid; de kosten zijn geïnteresseerd.\n\nCafé en ideeën: 12 cafés.\n"
) * 6  # fmt: skip
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
KINDS = ("byte-bpe", "piece-bpe", "unigram", "wordpiece")


def backend(kind, size=320):
    """A trained `tokenizers.Tokenizer`: one of `KINDS`, or `byte-bpe-dutch`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind.startswith("byte-bpe"):
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet)
    elif kind == "piece-bpe":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        made.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # for the training alone
        pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=size + 60, special_tokens=[*SPECIALS, *pieces])
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIALS, unk_token="<unk>")
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIALS)
    text = DUTCH if kind.endswith("dutch") else ENGLISH
    made.train_from_iterator([text, "".join(sorted(set(DUTCH)))], trainer)
    if kind == "piece-bpe":
        made.pre_tokenizer = None
        made = Tokenizer.from_str(_without_added(made.to_str()))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def _without_added(text):
    """Byte pieces are tokens of the model, not added ones."""
    document = json.loads(text)
    document["added_tokens"] = document["added_tokens"][: len(SPECIALS)]
    return json.dumps(document)


def save(family, folder, kind="byte-bpe", rows=None, own_class=True, **options):
    """A tiny model and a tokenizer of `kind`, with as many rows as tokens, or `rows`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = backend(kind)
    rows = rows or tokenizer.get_vocab_size()
    save_tiny(family, folder, vocab_size=rows, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template="{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}",
    ).save_pretrained(str(folder))  # fmt: skip
    if family == "qwen2" and own_class:
        # transformers cuts and normalises for this family in a way of its own: the file is to say the same.
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return Path(folder)


def params(corpus, **values):
    given = {"corpus": corpus, "size": 40, "min_count": 2, **values}
    given = {key: value for key, value in given.items() if value is not None}
    return TokenizerRetrofitParams.model_validate_json(json.dumps(given, default=str), strict=True)


def retrofit(folder, corpus, **values):
    """Check, plan, apply: the checkpoint before and after, and the patch, which keeps the plan's word."""
    checkpoint, given, step = open_checkpoint(folder), params(corpus, **values), TokenizerRetrofit()
    step.check(checkpoint, given)
    outline = step.plan(checkpoint, given)
    patch = step.apply(checkpoint, given, Run("retrofit"))
    assert outline.deviations(patch) == []
    return checkpoint, overlay(checkpoint, patch, by="retrofit"), patch
