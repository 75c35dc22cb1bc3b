"""Chats as the model's own template writes them, with the places of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regraft.core.data.records import Chat, Message
from regraft.core.errors import InputError, Unsupported


def render(tokenizer: Any, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
    """The text of a chat, and the spans of its answers, each with what ends the turn.

    An answer is what the template adds to the prompt for it: the conversation before, with the generation prompt where
    the template has one. So the span begins where the model begins to write, whatever the template looks like.

    Raises:
        InputError: no answer, the template refuses the messages, or it writes a turn otherwise when others follow.
        Unsupported: the tokenizer has no chat template.
    """
    whole = chat_text(tokenizer, chat.messages)
    spans = [
        _span(tokenizer, chat.messages, index, whole)
        for index, message in enumerate(chat.messages)
        if message["role"] == "assistant" and index >= chat.first
    ]
    if not spans:
        raise InputError("the chat has no answer", expected="a message of the assistant")
    return whole, spans


def _span(tokenizer: Any, messages: Sequence[Message], index: int, whole: str) -> tuple[int, int]:
    prompt = chat_text(tokenizer, messages[:index], prompt=True)
    answered = chat_text(tokenizer, messages[: index + 1])
    if not answered.startswith(prompt):
        prompt = chat_text(tokenizer, messages[:index])
    if not (answered.startswith(prompt) and whole.startswith(answered)):
        raise InputError(
            "the chat template writes this turn otherwise when others follow, so it cannot be learnt in place",
            found=f"message {index + 1} of {len(messages)}",
        )
    return len(prompt), len(answered)


def chat_text(tokenizer: Any, messages: Sequence[Message], *, prompt: bool = False) -> str:
    """Messages as the model's own template writes them; `prompt` asks for the beginning of an answer behind them.

    Raises:
        InputError: the template refuses the messages.
        Unsupported: the tokenizer has no chat template.
    """
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise Unsupported(
            "the model has no chat template, and the data has chats",
            where="chat_template",
            remedy="use a model with one, or give prompts and completions",
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=prompt
        )
    except (jinja2.TemplateError, TypeError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"the chat template refuses it: {error}") from None
    return text
