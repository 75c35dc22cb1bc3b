"""From records to token ids and labels, by where answers begin and end in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from regraft.core.data.chat import render
from regraft.core.data.examples import IGNORED, Example, PreferenceExample, ints
from regraft.core.data.records import Chat, Completion, Preference, Record, Text
from regraft.core.data.rows import Place
from regraft.core.errors import InputError

Learn = Literal["answer", "all"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Encoder:
    """Turns records into examples.

    The whole text is tokenised once, as the model will see it. A token is learnt if it holds a character of an answer;
    one that holds the end of the prompt and the beginning of the answer belongs to the answer.

    Args:
        tokenizer: of the checkpoint.
        learn: `answer` learns answers only, `all` every token; of a plain text always all.
        end: end a text or an answer with the tokenizer's end token, which is learnt; a chat's template does so itself.
    """

    tokenizer: Any
    learn: Learn = "answer"
    end: bool = True

    def encode(self, record: Record, place: Place) -> Example | PreferenceExample:
        """The example of a record.

        Raises:
            InputError: nothing in it can be learnt, or the chat template refuses it.
            Unsupported: a chat, and the model has no chat template.
        """
        if isinstance(record, Preference):
            return PreferenceExample(self._answered(record.chosen, place), self._answered(record.rejected, place))
        if not isinstance(record, Text):
            return self._answered(record, place)
        ids, _ = self._tokens(record.text, special=True)
        return checked(Example(ints(ids), ints(ids), place))

    def _answered(self, record: Completion | Chat, place: Place) -> Example:
        if isinstance(record, Completion):
            text = record.prompt + record.completion
            spans: Sequence[Span] = [(len(record.prompt), len(text))]
        else:
            text, spans = render(self.tokenizer, record)
        ids, offsets = self._tokens(text, special=isinstance(record, Completion))
        if offsets is None:
            learnt = self._by_prefix(ids, text, spans, special=isinstance(record, Completion))
        else:
            learnt = [any(_holds(offset, span) for span in spans) for offset in offsets]
            learnt = learnt + [True] * (len(ids) - len(learnt))
        if not any(learnt):
            raise InputError("the answer has no tokens")
        labels = ids if self.learn == "all" else [one if own else IGNORED for one, own in zip(ids, learnt, strict=True)]
        return checked(Example(ints(ids), ints(labels), place))

    def _tokens(self, text: str, *, special: bool) -> tuple[list[int], list[Span] | None]:
        """Ids, and where each stands in the text; the end token that is added here has no place. None: not known."""
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        coded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=fast, verbose=False)
        ids = list(coded["input_ids"])
        end = self.tokenizer.eos_token_id
        if self.end and special and end is not None and ids[-1:] != [end]:
            ids.append(end)
        return ids, [(start, stop) for start, stop in coded["offset_mapping"]] if fast else None

    def _by_prefix(self, ids: Sequence[int], text: str, spans: Sequence[Span], *, special: bool) -> list[bool]:
        """For tokenizers that do not tell places: what the text up to an edge has in common with the whole text."""

        def shared(stop: int) -> int:
            if stop == len(text):
                return len(ids)
            prefix = self.tokenizer(text[:stop], add_special_tokens=special, verbose=False)["input_ids"]
            pairs = enumerate(zip(prefix, ids, strict=False))
            return next((index for index, (one, other) in pairs if one != other), min(len(prefix), len(ids)))

        edges = [(shared(start), shared(stop)) for start, stop in spans]
        return [any(start <= index < stop for start, stop in edges) for index in range(len(ids))]


def _holds(offset: Span, span: Span) -> bool:
    """Whether a token holds a character of the span.

    Byte-level tokenizers that trim white space give a token of spaces no width, at the end of its spaces.
    """
    start, stop = offset
    return stop > span[0] and (stop <= span[1] if start == stop else start < span[1])


def checked(example: Example) -> Example:
    """`example`, if it has a token to learn.

    Raises:
        InputError: it has not.
    """
    if example.learnt == 0:
        reason = "no answer token is left to learn" if len(example) > 1 else "the text has fewer than two tokens"
        raise InputError(reason)
    return example
