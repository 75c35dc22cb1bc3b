"""Greedy continuations of a forced length, in batches, with the model's own key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from regraft.core.errors import Unsupported, UsageError
from regraft.core.training.model import memory
from regraft.core.training.modes import computing, without_dropout


def greedy(
    model: Any,
    contexts: Sequence[Sequence[int]],
    length: int,
    *,
    never: Iterable[int] | None = None,
    batch_size: int = 32,
    precision: str = "float32",
) -> list[list[int]]:
    """The `length` likeliest tokens after each context, one after the other.

    End tokens are never chosen, so that every continuation has exactly `length` tokens and none of them is padding:
    figures over the last tokens, such as a type-token ratio, then mean the same for all. Nothing else of the
    checkpoint's generation_config applies, such as a repetition penalty. Contexts of one length run together, so that
    no context is padded either. Of equally likely tokens the choice is torch's.

    Args:
        model: a causal language model of transformers, in eval mode.
        contexts: token ids, at least one each.
        length: tokens to add.
        never: ids that are not chosen; None takes the model's end tokens.
        batch_size: contexts that run together.
        precision: `float32` or `bfloat16`.

    Raises:
        UsageError: an empty context, or one that leaves no room for `length` tokens in the model's window.
        Unsupported: the model has no key-value cache.
        ResourceError: out of memory.
    """
    _check(model, contexts, length)
    banned = sorted(end_tokens(model) if never is None else set(never))
    by_length: dict[int, list[int]] = {}
    for number, context in enumerate(contexts):
        by_length.setdefault(len(context), []).append(number)
    device = next(model.parameters()).device
    result: list[list[int]] = [[] for _ in contexts]
    with torch.no_grad(), without_dropout(model), memory("generating"):
        for numbers in by_length.values():
            for start in range(0, len(numbers), batch_size):
                some = numbers[start : start + batch_size]
                ids = torch.tensor([list(contexts[number]) for number in some], device=device)
                with computing(device.type, precision):
                    rows = _continue(model, ids, length, banned).tolist()
                for number, row in zip(some, rows, strict=True):
                    result[number] = row
    return result


def end_tokens(model: Any) -> frozenset[int]:
    """Ids that end a text, by the model's generation config and config; none where they name none."""
    found: set[int] = set()
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ends = getattr(config, "eos_token_id", None)
        found |= set(ends) if isinstance(ends, (list, tuple)) else {ends} if isinstance(ends, int) else set()
    return frozenset(found)


def window_tokens(model: Any) -> int | None:
    """Tokens that the model's positions allow; None where its config does not say."""
    config = model.config.get_text_config()
    values = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions"))
    return next((value for value in values if isinstance(value, int)), None)


def _check(model: Any, contexts: Sequence[Sequence[int]], length: int) -> None:
    window, longest = window_tokens(model), max(map(len, contexts), default=1)
    if not all(contexts):
        raise UsageError("a context has no tokens", where="contexts", expected="at least one token",
                         remedy="give a text that is not empty")  # fmt: skip
    if window is not None and longest + length > window:
        raise UsageError(
            "context and continuation are longer than the model's window",
            where="contexts",
            expected=f"at most {window} tokens together",
            found=f"{longest} and {length}",
            remedy="shorten one of them",
        )


def _continue(model: Any, ids: torch.Tensor, length: int, banned: Sequence[int]) -> torch.Tensor:
    """[B, length] ids that follow `ids` [B, T]."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    step, cache, chosen = ids, None, []
    for number in range(length):
        outputs = model(input_ids=step, past_key_values=cache, use_cache=True, **last)
        cache = outputs.past_key_values
        if cache is None and number + 1 < length:
            raise Unsupported(
                "the model has no key-value cache", where=model.config.model_type,
                remedy="use a class of transformers that generates with one",
            )  # fmt: skip
        logits = outputs.logits[:, -1].float()
        logits[:, banned] = -torch.inf
        step = logits.argmax(dim=-1, keepdim=True)
        chosen.append(step)
    return torch.cat(chosen, dim=1) if chosen else ids[:, :0]
