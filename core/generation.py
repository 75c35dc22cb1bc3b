"""Text that a model writes after a prompt, piece by piece: the likeliest tokens, or drawn by temperature and top-p."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from regraft.core.errors import InputError, UsageError

if TYPE_CHECKING:
    import torch

Stopped = Literal["not yet", "end", "length", "window"]

_PART_OF_A_CHARACTER = "\ufffd"
_MOST_PENDING = 64
_CONTEXT = 8


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p: draw among the likeliest tokens that together have at least this probability.
        seed: of the draws, which are made on the CPU, so that they are the same on every device.

    Raises:
        UsageError: a value out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("--temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
        )
        for option, value, fine, expected in ranges:
            if not fine:
                raise UsageError("is out of its range", where=option, expected=expected, found=value)


@dataclass(frozen=True)
class Prompt:
    """What the model reads first.

    Args:
        text: as it is read, special tokens spelt out where the chat template wrote them.
        ids: its tokens.
        chat: whether the template wrote it.
    """

    text: str
    ids: Sequence[int]
    chat: bool


def read_prompt(tokenizer: Any, text: str, *, raw: bool = False, system: str | None = None) -> Prompt:
    """The prompt as the model's chat template writes it, if it has one and `raw` does not forbid it; else as it is.

    Args:
        tokenizer: of the checkpoint.
        text: what the user says, or what is to be continued.
        raw: leave the template aside; the tokenizer still puts its beginning before the text.
        system: the system message of a chat.

    Raises:
        UsageError: a system message without a chat, or no token in the prompt.
        InputError: the template refuses the messages.
    """
    from regraft.core.data.chat import chat_text

    chat = not raw and bool(getattr(tokenizer, "chat_template", None))
    if system is not None and not chat:
        raise UsageError(
            "there is no chat that a system message could begin",
            where="--system",
            found="--raw" if raw else "a checkpoint without a chat template",
            remedy="leave it out" if not raw else "leave out one of the two",
        )
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        text = chat_text(tokenizer, [*messages, {"role": "user", "content": text}], prompt=True)
    ids = list(tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"])
    if not chat and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # of a tokenizer that ends every text: this one goes on
    if not ids:
        raise UsageError("the prompt has no tokens", where="PROMPT", remedy="give a text that is not empty")
    return Prompt(text, ids, chat)


@dataclass
class Generation:
    """A text in the making: iterate over it for its pieces, once; afterwards, or in between, ask what there is.

    Args:
        model: a causal language model of transformers, in eval mode, with a key-value cache.
        tokenizer: its own.
        prompt: at least one token, and fewer than the model's window has.
        sampling: how tokens are chosen. The model's end tokens end the text; nothing else of its generation config
            applies, so the same options give the same kind of text with every checkpoint.

    Raises:
        UsageError: the prompt leaves no room in the window.
        Unsupported: the model has no key-value cache.
        ResourceError: out of memory.
    """

    model: Any
    tokenizer: Any
    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    ids: list[int] = field(default_factory=list, init=False)
    text: str = field(default="", init=False)
    stopped: Stopped = field(default="not yet", init=False)

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, each as soon as its last character is whole."""
        speller = _Speller(self.tokenizer)
        for token in self._tokens():
            self.ids.append(token)
            if piece := speller.add(token):
                self.text += piece
                yield piece
        if piece := speller.rest():
            self.text += piece
            yield piece

    def _tokens(self) -> Iterator[int]:
        import torch

        from regraft.core.measures.greedy import end_tokens
        from regraft.core.measures.reading import read
        from regraft.core.training.model import memory

        most, at_most = self._room()
        ends = end_tokens(self.model)
        random = torch.Generator().manual_seed(self.sampling.seed)
        with memory("reading the prompt"):
            logits, cache = read(self.model, self.prompt.ids)
        for number in range(most):
            token = choose(logits, self.sampling, random)
            if token in ends:
                self.stopped = "end"
                return
            yield token
            if number + 1 < most:
                logits, cache = self._step(token, cache)
        self.stopped = at_most

    def _step(self, token: int, cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits [vocabulary] behind one more token, and the cache with it."""
        import torch

        from regraft.core.training.model import memory

        with torch.no_grad(), memory("generating"):
            step = torch.tensor([[token]], device=next(self.model.parameters()).device)
            outputs = self.model(input_ids=step, past_key_values=cache, use_cache=True)
        return outputs.logits[0, -1], outputs.past_key_values

    def _room(self) -> tuple[int, Stopped]:
        """How many tokens may follow the prompt, and what that number comes from."""
        from regraft.core.measures.greedy import window_tokens

        window, wanted = window_tokens(self.model), self.sampling.max_new_tokens
        if window is None or len(self.prompt.ids) + wanted <= window:
            return wanted, "length"
        if len(self.prompt.ids) >= window:
            raise UsageError(
                "the prompt fills the model's window",
                where="PROMPT",
                expected=f"fewer than {window} tokens",
                found=len(self.prompt.ids),
                remedy="shorten it, or extend the context first with context-extension",
            )
        return window - len(self.prompt.ids), "window"


def choose(logits: torch.Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """The next token.

    Args:
        logits: [vocabulary].
        sampling: temperature 0 takes the first of the likeliest.
        random: on the CPU.

    Raises:
        InputError: no logit is a number, as those of a damaged checkpoint.
    """
    import torch

    scores = logits.float().cpu()
    if not bool(torch.isfinite(scores.max())):
        raise InputError(
            "the model's logits are not finite",
            where="the checkpoint's weights",
            remedy="look for NaN and Inf with `regraft verify --deep`, or compute with --dtype float32",
        )
    if sampling.temperature == 0:
        return int(scores.argmax())
    ordered, tokens = (scores / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < sampling.top_p, ordered, 0.0)
    kept[0] = ordered[0]
    return int(tokens[torch.multinomial(kept, 1, generator=random)])


class _Speller:
    """Turns tokens into text as they come; characters of several tokens wait until they are whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token: int) -> str:
        """What this token makes certain."""
        self._ids.append(token)
        text = self._decoded(self._ids)
        return "" if text.endswith(_PART_OF_A_CHARACTER) else self._fresh(text)

    def rest(self) -> str:
        """What is left when no token follows."""
        return self._fresh(self._decoded(self._ids))

    def _fresh(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._shown = text
        if len(self._ids) > _MOST_PENDING:  # so that each token costs the same, however long the text
            self._ids = self._ids[-_CONTEXT:]
            self._shown = self._decoded(self._ids)
        return piece

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
