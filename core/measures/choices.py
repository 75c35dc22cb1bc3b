"""Classification and multiple choice: rows of prompt, options and answer, and what a model makes of them.

A row is `{"prompt": "Fire is", "options": [" hot", " cold"], "answer": 0}`. An option is what follows the prompt, with
its space; the answer is its number from 0, or its text. For a classification the options are the labels, the same in
every row.

An option's score is the log-probability of its tokens behind the prompt, all of them given (teacher-forced): it moves
smoothly with the model where accuracy jumps. Prompt and option are tokenised as one text; a token that holds the end of
the prompt and the beginning of the option belongs to the option.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from regraft.core.data.readers import read_file
from regraft.core.data.rows import BadRows, Place, Row
from regraft.core.errors import InputError
from regraft.core.jsonio import brief

if TYPE_CHECKING:
    import torch

Normalise = Literal["none", "tokens", "characters"]

_COLUMNS = ("prompt", "options", "answer")
_REMEDY = 'write {"prompt": "...", "options": ["...", "..."], "answer": 0}, with the answer counted from 0'


@dataclass(frozen=True, slots=True)
class Choice:
    """One row.

    Args:
        prompt: what is read first; it may be empty.
        options: at least two texts that may follow, all different.
        answer: which of them is right, from 0.
        place: where the row stands.
    """

    prompt: str
    options: tuple[str, ...]
    answer: int
    place: Place


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model makes of a choice.

    Args:
        choice: what was asked.
        log_probs: of each option, the sum over its tokens, in nats.
        tokens: how many each has.
        scores: what decides: `log_probs`, or those per token or per character.
    """

    choice: Choice
    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    scores: tuple[float, ...]

    @property
    def chosen(self) -> int:
        """The option with the highest score; of equal ones the first."""
        return max(range(len(self.scores)), key=lambda index: self.scores[index])

    @property
    def correct(self) -> bool:
        """Whether the right option is chosen."""
        return self.chosen == self.choice.answer

    @property
    def answer_log_prob(self) -> float:
        """Log-probability of the right option among the options alone, by their scores; in nats, at most 0."""
        highest = max(self.scores)
        total = math.fsum(math.exp(score - highest) for score in self.scores)
        return self.scores[self.choice.answer] - highest - math.log(total)


def accuracy(scored: Sequence[Scored]) -> float:
    """The share that is right."""
    return sum(one.correct for one in scored) / len(scored)


def read_choices(path: Path) -> list[Choice]:
    """The rows of a file: JSON lines, or another format of `core.data.readers` whose rows have the three columns.

    Raises:
        InputError: it cannot be read; a row is not of that form; there is none; or all rows have the same options and
            the same answer, so that a model that always gives it would be perfect.
        UsageError: no reader for a file of this kind.
    """
    try:
        bad = BadRows()
        choices = [one for row in read_file(path, str(path), bad) if (one := _choice(row, bad)) is not None]
    except InputError as error:
        error.remedy = _REMEDY if error.remedy and "max_bad_rows" in error.remedy else error.remedy
        raise
    if not choices:
        raise InputError("the file has no rows", where=path, expected="a question a line", remedy=_REMEDY)
    _check_classes(path, choices)
    return choices


def score_choices(
    model: Any,
    tokenizer: Any,
    choices: Sequence[Choice],
    *,
    batch_size: int = 8,
    normalise: Normalise = "none",
    precision: str = "float32",
) -> list[Scored]:
    """The options' scores, in the order of `choices`.

    Options of one token each share one reading of the prompt. Logits exist only behind the tokens that are asked for.

    Args:
        model: a causal language model of transformers, in eval mode.
        tokenizer: its own.
        choices: at least one.
        batch_size: texts of a forward pass, padded on the right and masked.
        normalise: what the sum of an option is divided by: nothing, its number of tokens, or of characters.
        precision: `float32` or `bfloat16`; log-probabilities are fp32 or wider.

    Raises:
        InputError: a text is longer than the model's window, or an option has no tokens.
        ResourceError: out of memory.
    """
    from regraft.core.measures.greedy import window_tokens
    from regraft.core.training.model import memory
    from regraft.core.training.modes import computing, without_dropout

    device = next(model.parameters()).device
    readings = readings_of(tokenizer, choices, window=window_tokens(model))
    log_probs = [[0.0] * len(choice.options) for choice in choices]
    with without_dropout(model), memory("scoring choices"):
        for batch in batches_of(readings, batch_size, device):
            with computing(device.type, precision):
                told = score_batch(model, batch)
            for (choice, option), value in told.items():
                log_probs[choice][option] = value
    lengths = [[0] * len(choice.options) for choice in choices]
    for reading in readings:
        for ask in reading.asks:
            lengths[ask.choice][ask.option] = len(ask.targets)
    return [_scored(*one, normalise) for one in zip(choices, log_probs, lengths, strict=True)]


@dataclass(frozen=True, slots=True)
class Ask:
    """An option that a text tells: `targets` [n] are the ids behind the tokens from `first` on."""

    choice: int
    option: int
    first: int
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reading:
    """A text that the model reads once, and what is asked of it.

    Args:
        ids: [T]; the last token of an option is predicted, and not read.
        asks: at least one.
    """

    ids: tuple[int, ...]
    asks: tuple[Ask, ...]


@dataclass(frozen=True)
class ChoiceBatch:
    """Readings side by side.

    Args:
        readings: [B].
        ids, mask: [B, T] padded on the right; the mask is 1 for what is there.
        kept: [P] the positions that predict a target of some row.
    """

    readings: tuple[Reading, ...]
    ids: torch.Tensor
    mask: torch.Tensor
    kept: torch.Tensor


def readings_of(tokenizer: Any, choices: Sequence[Choice], *, window: int | None = None) -> list[Reading]:
    """What must be read to score `choices`, each text once, in the order of the choices.

    Raises:
        InputError: a text is longer than `window` tokens, or an option has no tokens.
    """
    asked: dict[tuple[int, ...], list[Ask]] = {}
    for number, choice in enumerate(choices):
        for option, text in enumerate(choice.options):
            ids, first = _encoded(tokenizer, choice, text)
            if window is not None and len(ids) > window:
                raise InputError("prompt and option are longer than the model's window", where=choice.place,
                                 expected=f"at most {window} tokens", found=f"{len(ids)} tokens",
                                 remedy="shorten the prompt")  # fmt: skip
            asked.setdefault(ids[:-1], []).append(Ask(number, option, first - 1, ids[first:]))
    return [Reading(ids, tuple(asks)) for ids, asks in asked.items()]


def batches_of(readings: Sequence[Reading], batch_size: int, device: Any) -> Iterator[ChoiceBatch]:
    """The readings in batches of nearly equal lengths, the longest first, so that too little memory shows at once."""
    import torch

    order = sorted(readings, key=lambda one: -len(one.ids))
    for start in range(0, len(order), batch_size):
        some = tuple(order[start : start + batch_size])
        longest = len(some[0].ids)
        ids, mask = (
            torch.zeros(len(some), longest, dtype=torch.int64),
            torch.zeros(len(some), longest, dtype=torch.int64),
        )
        for row, one in enumerate(some):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            mask[row, : len(one.ids)] = 1
        spans = (range(ask.first, ask.first + len(ask.targets)) for one in some for ask in one.asks)
        kept = torch.tensor(sorted({position for span in spans for position in span}))
        yield ChoiceBatch(some, ids.to(device), mask.to(device), kept.to(device))


def score_batch(model: Any, batch: ChoiceBatch) -> Mapping[tuple[int, int], float]:
    """Log-probability in nats of each option that the batch asks for, by the numbers of choice and option."""
    import inspect

    import torch

    selects = "logits_to_keep" in inspect.signature(model.forward).parameters
    chosen = {"logits_to_keep": batch.kept} if selects else {}
    with torch.no_grad():
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **chosen).logits
        logits = logits if selects else logits[:, batch.kept]
        log_p = logits.float().log_softmax(-1)
    column = {position: index for index, position in enumerate(batch.kept.tolist())}
    where = [
        (row, column[ask.first + offset], target)
        for row, one in enumerate(batch.readings)
        for ask in one.asks
        for offset, target in enumerate(ask.targets)
    ]
    values = iter(log_p[tuple(torch.tensor(where, device=log_p.device).T)].double().tolist())
    asks = (ask for one in batch.readings for ask in one.asks)
    return {(ask.choice, ask.option): math.fsum(next(values) for _ in ask.targets) for ask in asks}


def _encoded(tokenizer: Any, choice: Choice, option: str) -> tuple[tuple[int, ...], int]:
    """Ids of prompt and option, and where the option begins; at least one token stands before it."""
    from regraft.core.data.encode import Encoder
    from regraft.core.data.examples import IGNORED
    from regraft.core.data.records import Completion

    try:
        example = Encoder(tokenizer, end=False).encode(Completion(choice.prompt, option), choice.place)
    except InputError:
        raise InputError(
            "an option has no token that follows another", where=choice.place, found=brief(option),
            remedy="give a prompt that is not empty, and options of more than white space",
        ) from None  # fmt: skip
    own = [index for index, label in enumerate(example.labels) if label != IGNORED and index > 0]  # type: ignore[union-attr]
    return tuple(example.ids[: own[-1] + 1]), own[0]  # type: ignore[union-attr]


def _scored(choice: Choice, log_probs: Sequence[float], tokens: Sequence[int], normalise: Normalise) -> Scored:
    parts = {"none": [1] * len(tokens), "tokens": tokens, "characters": [len(text) for text in choice.options]}
    scores = tuple(value / part for value, part in zip(log_probs, parts[normalise], strict=True))
    return Scored(choice, tuple(log_probs), tuple(tokens), scores)


def _choice(row: Row, bad: BadRows) -> Choice | None:
    values = {name.lower(): value for name, value in row.values.items() if isinstance(name, str)}
    missing = [name for name in _COLUMNS if name not in values]
    if missing:
        bad.add(row.place, f"it has no {' and no '.join(missing)}")
        return None
    prompt, options, answer = (values[name] for name in _COLUMNS)
    fault = _fault(prompt, options)
    if not fault and (number := _answer(answer, options)) is not None:
        return Choice(prompt, tuple(options), number, row.place)
    bad.add(row.place, fault or f"the answer {brief(answer)} is neither a number below {len(options)} nor an option")
    return None


def _fault(prompt: Any, options: Any) -> str:
    if not isinstance(prompt, str):
        return f"the prompt is not text, found {brief(prompt)}"
    if not isinstance(options, list) or not all(isinstance(one, str) for one in options):
        return f"the options are not a list of texts, found {brief(options)}"
    if len(options) < 2:
        return f"it needs two options at least, found {brief(options)}"
    if not all(options):
        return "an option is empty"
    twice = [one for index, one in enumerate(options) if one in options[:index]]
    return f"an option is given twice: {brief(twice[0])}" if twice else ""


def _answer(answer: Any, options: Sequence[str]) -> int | None:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(options) else None
    if not isinstance(answer, str):
        return None
    for form in (str, str.strip):
        alike = [index for index, one in enumerate(options) if form(one) == form(answer)]
        if len(alike) == 1:
            return alike[0]
    return None


def _check_classes(path: Path, choices: Sequence[Choice]) -> None:
    answers = {(frozenset(one.options), one.options[one.answer]) for one in choices}
    if len(choices) > 1 and len(answers) == 1:
        raise InputError("every row has the same options and the same answer", where=path,
                         expected="rows of two classes at least", found=brief(choices[0].options[choices[0].answer]),
                         remedy="add rows whose answer is another")  # fmt: skip
