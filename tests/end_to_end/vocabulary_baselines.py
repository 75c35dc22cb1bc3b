"""The tool's bits per byte against those of the plainest code, and against what was measured before the tool existed.

The earlier figures are of ten passages of the same manual pages, two a language, that nobody wrote down. So a pool of
passages says how far ten of them scatter, and within what bounds a new vocabulary costs what it costs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import plain_retrofit as plain
from plain_retrofit import Score
from tokenizers import Tokenizer

EARLIER = {"before": 1.746, "replaced": 2.189, "extended": 2.008}
"""Bits per byte over all languages: of the model as it is, with 16384 tokens of its own, with 2048 more."""
PREFIX = 0
"""<|endoftext|>, which texts stood behind then; the tool takes the token that begins texts."""
PASSAGE_BYTES = 700
POOL = 16
"""Passages of each language."""
DRAWS = 4000
NEAR, SAME = 0.05, 0.002
MIN_COUNT, LONGEST = 3, 32

Pool = Mapping[str, Sequence[Score]]


def check_against_plain(root: Path, base: Path, texts: Mapping[str, tuple[str, str]], sizes: Mapping[str, int]) -> None:
    """What the tool made and measured is what the plainest code makes and measures, in every language.

    Args:
        root: with the tool's checkpoints and the texts that it read.
        base: what they were made from.
        texts: to learn from, and to measure, by language.
        sizes: tokens of `replaced`, new tokens of `extended`.
    """
    tokenizer, model = plain.read(base)
    learnt = [both[0] for both in texts.values()]
    held_out = {
        language: plain.passages((root / "held-out" / f"{language}.txt").read_text(), PASSAGE_BYTES)
        for language in texts
    }
    before = measure(tokenizer, model, held_out)
    vocabularies = {
        "replaced": plain.trained(tokenizer, learnt, sizes["replaced"]),
        "extended": plain.extended(tokenizer, learnt, sizes["extended"], MIN_COUNT, LONGEST),
    }
    for name, vocabulary in vocabularies.items():
        mine = measure(vocabulary, plain.with_vocabulary(model, tokenizer, vocabulary), held_out)
        said = json.loads((root / name / "regraft" / "tokenizer-retrofit" / "retrofit_report.json").read_text())
        pairs = {"before": (said["bpb_before"], total(before)), "after": (said["bpb_initial"], total(mine))}
        for language in held_out:
            figures = said["bpb_by_file"][f"{language}.txt"]
            pairs[f"before, {language}"] = figures["before"], plain.per_byte(before[language])
            pairs[f"after, {language}"] = figures["initial"], plain.per_byte(mine[language])
        assert all(abs(one - other) < NEAR for one, other in pairs.values()), pairs
        made = measure(*plain.read(root / name), held_out)
        apart = {language: plain.per_byte(made[language]) - plain.per_byte(mine[language]) for language in held_out}
        assert all(abs(difference) < SAME for difference in apart.values()), apart
        (one, mine_before), (other, mine_after) = pairs["before"], pairs["after"]
        widest = max(abs(one - other) for one, other in pairs.values())
        print(f"{name}: bits per byte {one:.3f} before and {other:.3f} after; by plain code {mine_before:.3f} and "
              f"{mine_after:.3f}, in no language more than {widest:.3f} apart, and {max(map(abs, apart.values())):.4f} "
              "where both stand behind <|endoftext|>")  # fmt: skip


def check_spread(root: Path, base: Path, texts: Mapping[str, tuple[str, str]]) -> None:
    """What the vocabularies cost on more passages, and what two a language can say: the earlier figures among it."""
    chosen = {language: evenly(both[1], POOL) for language, both in texts.items()}
    folders = {"before": base, "replaced": root / "replaced", "extended": root / "extended"}
    pools = {name: measure(*plain.read(folder), chosen) for name, folder in folders.items()}
    samples = {name: list(draws(pool, 2, replace=False)) for name, pool in pools.items()}
    again = {name: list(draws(pool, POOL, replace=True)) for name, pool in pools.items()}
    for name, pool in pools.items():
        low, high = bounds([total(drawn) for drawn in samples[name]], 0.9)
        print(f"{name}: {total(pool):.3f} bits per byte of {POOL} passages a language ("
              + ", ".join(f"{language} {plain.per_byte(scores):.3f}" for language, scores in pool.items())
              + f"); two a language give {low:.3f} to {high:.3f} nine times of ten, and gave {EARLIER[name]}"
              )  # fmt: skip
        assert low < EARLIER[name] < high, (name, low, high)
    for name in ("replaced", "extended"):
        rise, earlier = total(pools[name]) - total(pools["before"]), EARLIER[name] - EARLIER["before"]
        low, high = bounds(rises(again["before"], again[name]), 0.95)
        least, most = bounds(rises(samples["before"], samples[name]), 0.9)
        print(f"{name}: costs {rise:.3f} bits per byte, 95% interval {low:.3f} to {high:.3f}; two passages a language "
              f"say {least:.3f} to {most:.3f} nine times of ten, and said {earlier:.3f}")  # fmt: skip
        assert low > 0, (name, low)
        if name == "replaced":
            assert abs(rise - earlier) < NEAR, (rise, earlier)


def rises(before: Sequence[Pool], after: Sequence[Pool]) -> list[float]:
    """By how much bits per byte differ, sample by sample."""
    return [total(one) - total(other) for other, one in zip(before, after, strict=True)]


def bounds(values: Sequence[float], share: float) -> tuple[float, float]:
    """What the middle share of the values lies between."""
    cuts = quantiles(values, n=round(2 / (1 - share)))
    return cuts[0], cuts[-1]


def evenly(text: str, number: int) -> list[str]:
    """So many passages from places evenly over the text."""
    data = text.encode()
    starts = (len(data) * index // number for index in range(number))
    return [data[start : start + PASSAGE_BYTES].decode(errors="ignore") for start in starts]


def measure(tokenizer: Tokenizer, model: Any, texts: Mapping[str, Sequence[str]]) -> Pool:
    """Bits and bytes of every passage."""
    return {language: plain.bits(tokenizer, model, own, PREFIX) for language, own in texts.items()}


def total(pool: Pool) -> float:
    """Bits per byte of all languages together."""
    return plain.per_byte(score for scores in pool.values() for score in scores)


def draws(pool: Pool, each: int, *, replace: bool) -> Iterator[Pool]:
    """Samples of so many passages of each language: of every pool of the same passages the same ones."""
    generator = random.Random(0)
    for _ in range(DRAWS):
        places = {
            language: generator.choices(range(len(scores)), k=each)
            if replace
            else generator.sample(range(len(scores)), each)
            for language, scores in pool.items()
        }
        yield {language: [pool[language][place] for place in own] for language, own in places.items()}
