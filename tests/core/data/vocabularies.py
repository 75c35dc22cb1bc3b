"""Small tokenizers of several kinds, each trained on the spot."""

from __future__ import annotations

from functools import cache
from typing import Any

TEXT = (
    "The capital of France is Paris. The capital of Spain is Madrid.\nQ: What is two and two? A: It is four.\n"
    "A king went to the city, and the people of the city came out to him. Élodie said: naïve café, 东京 🙂.\n"
) * 4
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>")
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
KINDS = ("characters", "byte-level", "byte-level-trimmed", "metaspace", "unigram")


@cache
def tokenizer(kind: str, template: str | None = CHAT, bos: bool = True) -> Any:
    """One of `KINDS`, with a chat template; it puts `<s>` before a text unless told not to."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = _backend(kind)
    sequence: list[Any] = (
        [processors.ByteLevel(trim_offsets=kind.endswith("trimmed"))] if kind.startswith("byte-level") else []
    )
    if bos:
        ids = [("<s>", backend.token_to_id("<s>"))]
        sequence.append(processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=ids))
    backend.post_processor = processors.Sequence(sequence)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def _backend(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    options: dict[str, Any] = {"special_tokens": list(SPECIALS), "show_progress": False}
    if kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Metaspace()
        trainer: Any = trainers.UnigramTrainer(vocab_size=160, unk_token="<unk>", **options)
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        size = {"characters": 0}.get(kind, 400)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if kind == "metaspace":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            alphabet = []
        else:
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, **options)
    backend.train_from_iterator([TEXT], trainer)
    return backend
