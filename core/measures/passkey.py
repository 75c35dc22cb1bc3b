"""Whether a model tells a key that stood somewhere in a long text: prompts, and what it makes of them.

The idea of hiding one key in filler goes back to Mohtashami and Jaggi (arXiv 2305.16300). Beside the greedy answer we
rank the right key among others by log-probability: a figure that moves before the answer does, and that has a known
level of chance, 1 / choices.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from regraft.core.errors import InputError, Unsupported
from regraft.core.measures.prose import fill, sentences, tokens

if TYPE_CHECKING:
    import torch

KEY = "{key}"
"""What stands for the key in a needle."""

_DIGITS = 5
_MOST_DRAWS = 1000
_CACHE_BYTES = 256 << 20
"""Of copies of a text's keys and values, one for each key that is scored at the same time."""


class Hiding(Protocol):
    """What is hidden and asked for.

    Args:
        text: a file with the text around the key; None makes up English sentences.
        needle: the sentence with the key, written `{key}`.
        question: the end of the text, which the key continues.
        answers: the keys to draw from; None draws numbers of five digits.
        choices: keys among which the right one should be the likeliest.
        depths: of a sweep: where in the text the key stands, 0 at its beginning, 1 at its end.
        samples: of a sweep: prompts of each length and depth.
    """

    @property
    def text(self) -> Path | None: ...  # noqa: D102
    @property
    def needle(self) -> str: ...  # noqa: D102
    @property
    def question(self) -> str: ...  # noqa: D102
    @property
    def answers(self) -> Sequence[str] | None: ...  # noqa: D102
    @property
    def choices(self) -> int: ...  # noqa: D102
    @property
    def depths(self) -> Sequence[float]: ...  # noqa: D102
    @property
    def samples(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Prompt:
    """A text that ends where the key follows.

    Args:
        ids: its tokens.
        keys: [choices] tokens of the keys to choose from; the right one is the first.
        key: the right one.
    """

    ids: Sequence[int]
    keys: Sequence[Sequence[int]]
    key: str


@dataclass(frozen=True)
class Answer:
    """What a model makes of a prompt.

    Args:
        rank: of the right key among all by log-probability, from 1.
        told: whether the greedy continuation holds the key.
    """

    rank: int
    told: bool


@dataclass(frozen=True)
class Passkeys:
    """Prompts of any length and depth; the same seed gives the same.

    Args:
        tokenizer: of the checkpoint.
        settings: templates and keys.
        seed: of keys and filler.
        where: what stands before the names of settings in messages.
    """

    tokenizer: Any
    settings: Hiding
    seed: int
    where: str = ""

    def prompt(self, length: int, depth: float, number: int) -> Prompt:
        """A prompt that takes, with its answer, at most `length` tokens.

        Args:
            length: in tokens.
            depth: share of the filler before the key.
            number: of the sample.

        Raises:
            InputError: the length has no room for needle and question; there are too few keys of as many tokens.
            Unsupported: the tokenizer merges the end of the question with the key.
        """
        key, keys = self._keys(Random(f"{self.seed}/{length}/{depth}/{number}"))
        needle = self.settings.needle.replace(KEY, key)
        room = length - len(keys[0])
        lines = self._filler(Random(f"{self.seed}/{length}/{number}"), needle, room)
        while len(ids := tokens(self.tokenizer, self._text(lines, needle, depth))) > room:
            if not lines:
                raise InputError(
                    "the length has no room for needle and question", where=f"{self.where}lengths",
                    expected=f"at least {len(ids) + len(keys[0])} tokens", found=length,
                    remedy="give greater lengths, or shorter templates",
                )  # fmt: skip
            lines.pop()
        return Prompt(ids, keys, key)

    def _text(self, lines: Sequence[str], needle: str, depth: float) -> str:
        place = round(depth * len(lines))
        return "\n".join([*lines[:place], needle, *lines[place:], self.settings.question])

    def _filler(self, random: Random, needle: str, room: int) -> list[str]:
        def count(lines: Sequence[str]) -> int:
            return len(tokens(self.tokenizer, self._text(lines, needle, 0)))

        return fill(sentences(random, self.settings.text), count, room)

    def _keys(self, random: Random) -> tuple[str, list[list[int]]]:
        """The right key, and the tokens of it and of others that have as many; the first draws that allow it."""
        alike: dict[int, dict[str, list[int]]] = {}
        for key in self._drawn(random):
            ids = self._continuation(key)
            same = alike.setdefault(len(ids), {})
            if ids not in same.values():
                same[key] = ids
            if len(same) == self.settings.choices:
                return next(iter(same)), list(same.values())
        raise InputError(
            "too few keys have as many tokens as one another", where=f"{self.where}answers",
            expected=f"{self.settings.choices} keys of as many tokens",
            found=", ".join(f"{len(same)} of {count}" for count, same in sorted(alike.items())),
            remedy="give more answers of one kind, or lower choices",
        )  # fmt: skip

    def _drawn(self, random: Random) -> Iterator[str]:
        if self.settings.answers is not None:
            yield from random.sample(self.settings.answers, len(self.settings.answers))
            return
        for _ in range(_MOST_DRAWS):
            yield str(random.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))

    def _continuation(self, key: str) -> list[int]:
        """The tokens that `key` adds to the question."""
        question = tokens(self.tokenizer, self.settings.question)
        ids = tokens(self.tokenizer, f"{self.settings.question} {key}")
        if ids[: len(question)] != question or len(ids) == len(question):
            raise Unsupported(
                "the tokenizer does not keep question and key apart",
                where=f"{self.where}question",
                expected="a text whose tokens stay when a space and the key follow",
                found=f"{self.settings.question!r} and {key!r}",
                remedy="end the question with a whole word, and give keys that the tokenizer knows",
            )
        return ids[len(question) :]


def ask(model: Any, tokenizer: Any, prompt: Prompt) -> Answer:
    """The model's answer: the prompt is read once, each key continues a copy of its cache.

    Args:
        model: a causal language model of transformers, in eval mode.
        tokenizer: its own.
        prompt: what to ask.

    Raises:
        ResourceError: out of memory.
    """
    import torch

    from regraft.core.measures.reading import read
    from regraft.core.training.model import memory

    with torch.no_grad(), memory("looking for the passkey"):
        logits, cache = read(model, prompt.ids)
        scores = _log_probs(model, logits, cache, torch.tensor(prompt.keys, device=logits.device)).tolist()
        told = tokenizer.decode(_greedy(model, logits, cache, len(prompt.keys[0])), skip_special_tokens=True)
    rank = 1 + sum(score >= scores[0] for score in scores[1:])
    return Answer(rank, prompt.key in told)


def _log_probs(model: Any, logits: torch.Tensor, cache: Any, keys: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N] of keys [N, T] behind the text in `cache`, in nats; so many at once as memory allows."""
    import torch

    first = logits.float().log_softmax(-1)[keys[:, 0]]
    if keys.shape[1] == 1:
        return first
    parts = []
    for some in torch.split(keys, max(1, _CACHE_BYTES // _bytes_of(cache))):
        copied = copy.deepcopy(cache)
        copied.batch_repeat_interleave(len(some))
        rows = _forward(model, some[:, :-1], copied).logits.float().log_softmax(-1)
        parts.append(rows.gather(2, some[:, 1:, None]).sum((1, 2)))
    return first + torch.cat(parts)


def _bytes_of(cache: Any) -> int:
    """Size of a key-value cache."""
    return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers if layer.is_initialized)


def _greedy(model: Any, logits: torch.Tensor, cache: Any, count: int) -> list[int]:
    cache = copy.deepcopy(cache)
    found = [logits.argmax()]
    for _ in range(count - 1):
        outputs = _forward(model, found[-1].view(1, 1), cache)
        found.append(outputs.logits[0, -1].argmax())
    return [int(one) for one in found]


def _forward(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    return model(input_ids=ids, past_key_values=cache, use_cache=True)
