"""`regraft generate`: text that a checkpoint's model writes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli.console import INTERRUPTED, print_json, tell
from regraft.cli.options import Device, Dtype, Json, Model, Revision, TrustRemoteCode
from regraft.cli.streams import unread
from regraft.core.interrupts import Interrupted

if TYPE_CHECKING:
    from regraft.core.generation import Generation
    from regraft.core.loaded import Loaded


def generate(
    checkpoint: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model reads; - takes stdin.")],
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, though there is a chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="The system message of a chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above it, tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Let a checkpoint's model write: a chat where it has a template, else a continuation. Streams to stdout."""
    from regraft.core.devices import check_device
    from regraft.core.generation import Generation, Sampling, read_prompt
    from regraft.core.host import host
    from regraft.core.loaded import check_dtype, opened

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    check_device(device)
    check_dtype(dtype)
    text = _stdin() if prompt == "-" else prompt
    loaded = opened(
        checkpoint,
        revision=revision,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        sources=host().sources(),
    ).load()
    asked = read_prompt(loaded.tokenizer, text, raw=raw, system=system)
    written = Generation(loaded.model, loaded.tokenizer, asked, sampling)
    interrupted = _write(written, show=not as_json)
    if as_json:
        print_json(_document(loaded, written, interrupted=interrupted))
    elif interrupted:
        tell(f"interrupted after {len(written.ids)} tokens")
    elif written.stopped == "window":
        tell(f"note: stopped at the end of the model's window of {loaded.window} tokens")
    raise typer.Exit(INTERRUPTED if interrupted else 0)


def _write(written: Generation, *, show: bool) -> bool:
    """Generate, show each piece at once while somebody reads, and tell whether the user interrupted: then what was
    written stays.
    """
    interrupted = False
    try:
        for piece in written:
            if show:
                sys.stdout.write(piece)
                sys.stdout.flush()
                if unread():
                    break
    except Interrupted:
        interrupted = True
    if show:
        print(flush=True)
    return interrupted


def _stdin() -> str:
    from regraft.core.errors import InputError

    if sys.stdin is None:  # closed by whoever started us
        return ""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8 text", where="stdin", found=f"{error.reason} at byte {error.start}") from None
    return text.removesuffix("\n")


def _document(loaded: Loaded, written: Generation, *, interrupted: bool) -> dict[str, Any]:
    return {
        "checkpoint": loaded.checkpoint.label,
        "device": loaded.device,
        "dtype": loaded.dtype,
        "sampling": vars(written.sampling),
        "chat": written.prompt.chat,
        "prompt": written.prompt.text,
        "prompt_tokens": len(written.prompt.ids),
        "text": written.text,
        "new_tokens": len(written.ids),
        "stopped": "interrupted" if interrupted else written.stopped,
    }
