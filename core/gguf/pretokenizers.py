r"""How byte-level BPE vocabularies split text before they merge, by the name under `tokenizer.ggml.pre`.

The names are llama.cpp's (src/llama-vocab.cpp), the patterns those that the models' own tokenizer.json publish. The
name decides: with the wrong split a tokenizer yields other tokens than the model was trained on. SmolLM2 splits single
digits off, so that "\n\n1." is ĊĊ 1 .; read with GPT-2's split alone it would be Ċ Ċ 1 .
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regraft.core.gguf.metadata import Metadata
from regraft.core.jsonio import brief

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"

LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}[\r\n]*|{_SPACES}"
QWEN2 = rf"{_WORDS}|\p{{N}}|{_SYMBOLS}[\r\n]*|{_SPACES}"
SEED_CODER = rf"{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_TAIL = rf"{_SYMBOLS}[\r\n/]*|{_SPACES}"
TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_TAIL}"
GPT4O = rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_TAIL}"

_CASED = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5
3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15
1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC
1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D
212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B
A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB
10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""
"""Letters that have case, as deepseek-llm's tokenizer.json lists them; by number, because editors normalise some."""

_WIDE_SYMBOLS = "FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"
_EAST_ASIAN = "4E00-9FA5 800-4E00 AC00-D7FF"


def _ranges(numbers: str) -> str:
    """The inside of a character class, for ranges of code points in hexadecimal."""
    return "".join("-".join(chr(int(end, 16)) for end in part.split("-")) for part in numbers.split())


@dataclass(frozen=True)
class Split:
    """One way of splitting.

    Args:
        patterns: applied one after the other, each match a piece of its own.
        digits: whether every digit is a piece of its own, after the patterns.
        gpt2: whether GPT-2's pattern, which is built into the byte-level step, comes last.
        nfc: whether text is brought to Unicode's composed form first.
        whole_words: a piece that is in the vocabulary is taken whole, without merging.
        begins: whether text begins with the bos token unless the file says otherwise.
    """

    patterns: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    nfc: bool = False
    whole_words: bool = False
    begins: bool = False

    def steps(self, add_prefix_space: bool) -> list[dict[str, Any]]:
        """The pre-tokenizers, in tokenizer.json's form."""
        steps: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        return [*steps, byte_level(add_prefix_space=add_prefix_space, use_regex=self.gpt2)]


def byte_level(*, add_prefix_space: bool = False, use_regex: bool = True) -> dict[str, Any]:
    """The byte-level step, in the form that pre-tokenizer, decoder and post-processor share."""
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}


GPT2 = Split(gpt2=True)
_LLAMA3 = Split((LLAMA3,), whole_words=True, begins=True)
_QWEN2 = Split((QWEN2,), nfc=True)
_SINGLE_DIGITS = Split(digits=True, gpt2=True)

SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2"), GPT2),
    **dict.fromkeys(("mpt", "olmo"), Split(gpt2=True, nfc=True)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "midm-2.0"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Split((LLAMA3,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _SINGLE_DIGITS),
    **dict.fromkeys(("qwen2", "megrez"), _QWEN2),
    "deepseek-r1-qwen": Split((QWEN2,)),
    "deepseek-llm": Split(
        (
            "[\r\n]",
            rf"\s?[{_ranges(_CASED)}]+",
            rf"\s?[!-/:-~{_ranges(_WIDE_SYMBOLS)}]+",
            r"\s+$",
            f"[{_ranges(_EAST_ASIAN)}]+",
        ),
        digits=True,
    ),
    "deepseek-coder": Split(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{_ranges(_EAST_ASIAN)}]+"), digits=True),
    "seed-coder": Split((SEED_CODER,)),
    "tekken": Split((TEKKEN,), whole_words=True, begins=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Split((GPT4O,))),
}
"""By name. Not among them: splits that only architectures use which regraft does not read from GGUF."""

UNNAMED = frozenset({"", "default"})
"""What files have that were converted without knowing the split."""


def split_of(meta: Metadata) -> Split:
    """The split of a byte-level vocabulary; GPT-2's where the file names none.

    Raises:
        InputError: a name that regraft does not know.
    """
    name = meta.text("tokenizer.ggml.pre", "")
    if name in UNNAMED:
        return GPT2
    if name not in SPLITS:
        raise meta.fault(
            "tokenizer.ggml.pre",
            "is a pre-tokenizer that regraft does not know",
            found=brief(name),
            expected=f"one of {', '.join(sorted(SPLITS))}",
            remedy="start from the original safetensors checkpoint, which brings its tokenizer.json",
        )
    return SPLITS[name]
