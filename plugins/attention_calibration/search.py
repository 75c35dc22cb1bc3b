"""The search for heads: each alone on questions, the better half on more of them, then all that gain together.

Heads without a sink on any question are never tried: calibrating them is the identity. A head of layer l is tried from
layer l on, with what the layers below gave. The union is judged on questions of its own, and halved until it helps.
Where nothing is left, that is what the search has found.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, UsageError
from regraft.core.head_file import Head
from regraft.core.jsonio import dump, read_object
from regraft.core.measures.choices import Choice, ChoiceBatch, Scored, batches_of, read_choices, readings_of
from regraft.core.training.model import memory
from regraft.core.transformation import Run
from regraft.plugins.attention_calibration.aim import Aim
from regraft.plugins.attention_calibration.export import settings
from regraft.plugins.attention_calibration.model import Trial
from regraft.plugins.attention_calibration.params import AttentionCalibrationParams

LEAST = 4
"""Questions of a split."""

_SMALLEST_PASS = 8
_NO_SINKS = "none has an attention sink on these questions (a lower tau, or longer prompts, may find some)"
_NO_GAIN = "each alone, none gains more than min_gain"
_NOT_TOGETHER = "those that gain alone do not help on the questions held out"


@dataclass(frozen=True)
class Score:
    """Means over questions: log-probability of the answer among the options in nats, and how often it is highest."""

    log_prob: float
    accuracy: float

    def of(self, kind: str) -> float:
        """The one that `score` names."""
        return self.log_prob if kind == "log-prob" else self.accuracy


@dataclass(frozen=True)
class Found:
    """What the search found.

    Args:
        heads: those to calibrate, the one that gains most first; perhaps none.
        reason: why there are none; empty if there are.
        gains: of every head that was tried, alone, in the last pass that tried it.
        helpful: how many gained alone; more than `heads` if together they did not help.
        tried, without_sinks: heads that were, and those that needed not be.
        before, after: scores by split, `search` and `held_out`, without and with all `heads`.
        questions: by split.
        maps: mean weight on sinks, `before` and, with `heads`, `after`, by layer and head.
        score: what heads were judged by.
    """

    heads: tuple[Head, ...]
    reason: str
    gains: Mapping[Head, float]
    helpful: int
    tried: int
    without_sinks: int
    before: Mapping[str, Score]
    after: Mapping[str, Score]
    questions: Mapping[str, int]
    maps: Mapping[str, Sequence[Sequence[float]]]
    score: str


def search(checkpoint: Checkpoint, params: AttentionCalibrationParams, aim: Aim, run: Run) -> Found:
    """Find the heads.

    Raises:
        InputError: the questions cannot be used, or are too few.
        UsageError: the saved state belongs to another search.
        ResourceError: out of memory.
    """
    splits = _splits(params, run)
    trial, tokenizer = Trial(checkpoint, params, aim, run), run.tokenizer(checkpoint)
    texts = {name: _Texts(trial, tokenizer, choices, params.batch_size) for name, choices in splits.items()}
    with memory("searching for heads"):
        run.tell(f"head search: {len(splits['search'])} questions, {len(splits['held_out'])} to check on")
        mass = trial.sink_mass(batch for group in texts["search"].groups for batch in group.batches)
        heads = [(layer, head) for layer in aim.layers for head in range(aim.num_heads) if mass[layer, head] > 0]
        state = _State(checkpoint, params, splits, run)
        gains, last = _passes(texts["search"], heads, params, run, state) if heads else ({}, [])
        helpful = [head for head in last if gains[head] > params.min_gain]
        before = {name: one.score(()) for name, one in texts.items()}
        chosen, after = _together(texts, helpful, before, params, run)
        maps = {"before": mass.tolist()}
        if chosen:
            batches = (batch for group in texts["search"].groups for batch in group.batches)
            maps["after"] = trial.sink_mass(batches, chosen).tolist()
    reason = _NO_SINKS if not heads else _NO_GAIN if not helpful else _NOT_TOGETHER if not chosen else ""
    searched, questions = len(aim.layers) * aim.num_heads, {name: len(choices) for name, choices in splits.items()}
    return Found(
        tuple(chosen), reason, gains, len(helpful), len(heads), searched - len(heads), before, after, questions, maps,
        params.score,
    )  # fmt: skip


def pass_sizes(questions: int, passes: int) -> list[int]:
    """How many questions each pass asks: twice as many as the one before, the last all."""
    sizes = [max(min(questions, _SMALLEST_PASS), -(-questions // 2**number)) for number in range(passes)]
    return sizes[::-1]


@dataclass(frozen=True)
class _Group:
    """Some questions, and the batches that ask them; numbers of choices count within the group."""

    choices: Sequence[Choice]
    batches: Sequence[ChoiceBatch]

    def score(self, log_probs: Mapping[tuple[int, int], float]) -> tuple[float, int]:
        """Sum of the answers' log-probabilities, and how many are right."""
        total, right = 0.0, 0
        for number, choice in enumerate(self.choices):
            own = tuple(log_probs[number, option] for option in range(len(choice.options)))
            scored = Scored(choice, own, (), own)
            total, right = total + scored.answer_log_prob, right + scored.correct
        return total, right


class _Texts:
    """The questions of a split, ready to be asked."""

    def __init__(self, trial: Trial, tokenizer: Any, choices: Sequence[Choice], batch_size: int) -> None:
        from regraft.core.measures.greedy import window_tokens

        self.trial, self.choices = trial, choices
        device, window = next(trial.model.parameters()).device, window_tokens(trial.model)
        self.groups = []
        for start in range(0, len(choices), batch_size):
            some = choices[start : start + batch_size]
            readings = readings_of(tokenizer, some, window=window)
            self.groups.append(_Group(some, list(batches_of(readings, batch_size, device))))

    def score(self, heads: Sequence[Head]) -> Score:
        """Of all questions, with these heads calibrated."""
        total, right = 0.0, 0
        for group in self.groups:
            log_probs: dict[tuple[int, int], float] = {}
            for batch in group.batches:
                log_probs |= self.trial.log_probs(batch, heads)
            own = group.score(log_probs)
            total, right = total + own[0], right + own[1]
        return Score(total / len(self.choices), right / len(self.choices))


class _State:
    """What groups of questions have told so far, so that a search that was killed goes on."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        params: AttentionCalibrationParams,
        splits: Mapping[str, Sequence[Choice]],
        run: Run,
    ) -> None:
        self.path = None if run.state is None else run.state / "search.json"
        self.writes = run.rank == 0
        asked = {name: [[one.prompt, *one.options, one.answer] for one in some] for name, some in splits.items()}
        self.identity = {
            "base": checkpoint.digest, "act": settings(params), "passes": params.passes, "score": params.score,
            "layers": str(params.layers), "batch_size": params.batch_size,
            "questions": hashlib.sha256(repr(asked).encode()).hexdigest(),
        }  # fmt: skip
        self.told: dict[str, dict[str, list[float]]] = {}
        if self.path is not None and self.path.is_file():
            saved = read_object(self.path)
            if saved.get("identity") != self.identity or not isinstance(saved.get("told"), dict):
                raise UsageError("the saved state belongs to another search", where=self.path,
                                 remedy="begin anew with `apply --restart`, which deletes it")  # fmt: skip
            self.told = saved["told"]

    def keep(self, key: str, told: dict[str, list[float]]) -> None:
        """Write what a group has told."""
        self.told[key] = told
        if self.path is None or not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_bytes(dump({"identity": self.identity, "told": self.told}))
        part.replace(self.path)


def _passes(
    texts: _Texts, heads: list[Head], params: AttentionCalibrationParams, run: Run, state: _State
) -> tuple[dict[Head, float], list[Head]]:
    """The gain of every head in the last pass that tried it; and the heads of the very last, the best first."""
    sizes = pass_sizes(len(texts.choices), params.passes)
    gains: dict[Head, float] = {}
    ranked = heads
    for number, size in enumerate(sizes):
        heads = sorted(ranked[: math.ceil(len(ranked) / 2)]) if number else heads
        gains |= _pass(texts, heads, size, f"{number + 1} of {len(sizes)}", params, run, state)
        ranked = sorted(heads, key=lambda head: (-gains[head], head))
    return gains, ranked


def _pass(
    texts: _Texts,
    heads: Sequence[Head],
    size: int,
    label: str,
    params: AttentionCalibrationParams,
    run: Run,
    state: _State,
) -> dict[Head, float]:
    groups = texts.groups[: -(-size // params.batch_size)]
    sums, asked = dict.fromkeys(heads, 0.0), 0
    begun, computed = time.monotonic(), 0
    for number, group in enumerate(groups):
        key = f"{label}/{number}"
        if key not in state.told:
            state.keep(key, _told(texts.trial, group, heads))
            computed += 1
            spent = time.monotonic() - begun
            left = spent / computed * (len(groups) - number - 1)
            run.tell(f"head search: pass {label}, {len(heads)} heads, questions {number + 1} of {len(groups)} groups, "
                     f"{left:.0f} s left in this pass")  # fmt: skip
        told, asked = state.told[key], asked + len(group.choices)
        column = 0 if params.score == "log-prob" else 1
        for head in heads:
            sums[head] += told[f"{head[0]}.{head[1]}"][column] - told["base"][column]
    return {head: total / asked for head, total in sums.items()}


def _told(trial: Trial, group: _Group, heads: Sequence[Head]) -> dict[str, list[float]]:
    """Sums over a group's questions, of the base and with each head alone."""
    base: dict[tuple[int, int], float] = {}
    each: dict[Head, dict[tuple[int, int], float]] = {head: {} for head in heads}
    for batch in group.batches:
        found, outputs = trial.base(batch)
        base |= found
        for head in heads:
            each[head] |= trial.from_layer(batch, outputs, head)
    told = {"base": list(group.score(base))}
    return told | {f"{layer}.{head}": list(group.score(found)) for (layer, head), found in each.items()}


def _together(
    texts: Mapping[str, _Texts],
    helpful: Sequence[Head],
    before: Mapping[str, Score],
    params: AttentionCalibrationParams,
    run: Run,
) -> tuple[list[Head], dict[str, Score]]:
    """The most heads that together are better where they were found, and no worse on the other questions; if any."""
    count = len(helpful)
    while count:
        heads = list(helpful[:count])
        after = {name: one.score(heads) for name, one in texts.items()}
        gains = {name: after[name].of(params.score) - before[name].of(params.score) for name in texts}
        run.tell(f"head search: {count} heads together gain {gains['search']:+.4f}, {gains['held_out']:+.4f} held out")
        if gains["search"] > 0 and gains["held_out"] >= 0:
            return heads, after
        count //= 2
    return [], dict(before)


def _splits(params: AttentionCalibrationParams, run: Run) -> dict[str, list[Choice]]:
    assert params.data is not None
    choices = read_choices(params.data)
    random = Random(run.seed_for("questions"))
    random.shuffle(choices)
    if params.held_out is None:
        third = len(choices) // 3
        held_out, choices = choices[:third], choices[third:]
    else:
        held_out = read_choices(params.held_out)
    for name, some in (("data", choices), ("held_out", held_out)):
        if len(some) < LEAST:
            raise InputError("too few questions", where=name, expected=f"at least {LEAST} to search on and to check on",
                             found=len(some), remedy="give more, or a file for held_out")  # fmt: skip
    return {"search": choices, "held_out": held_out}
