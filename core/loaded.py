"""A checkpoint's model and tokenizer, ready to run: what commands that compute with a model start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from regraft.core.errors import Unsupported, UsageError

if TYPE_CHECKING:
    from regraft.core.checkpoint import Checkpoint
    from regraft.core.sources import Source
    from regraft.core.training.head import Head

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What weights can be held and computed in; `auto` see `opened`."""

_SHORT_CODES = frozenset({"BF16", "F16"})


@dataclass(frozen=True)
class Loaded:
    """A model that runs.

    Args:
        checkpoint: where it comes from.
        model: of transformers, in eval mode, nothing of it learning.
        tokenizer: its own.
        device: torch device.
        dtype: of its weights and products.
    """

    checkpoint: Checkpoint
    model: Any
    tokenizer: Any
    device: str
    dtype: str

    @property
    def window(self) -> int | None:
        """Tokens that the model's positions are meant for; None where its config does not say."""
        from regraft.core.measures.greedy import window_tokens

        return window_tokens(self.model)

    @cached_property
    def head(self) -> Head:
        """How its logits follow from its last hidden states."""
        from regraft.core.training.head import Head

        return Head.of(self.model)


def check_dtype(wish: str) -> None:
    """Refuse what is no dtype to compute in.

    Raises:
        UsageError: it is none.
    """
    if wish not in DTYPES:
        raise UsageError(
            "unknown dtype", where="--dtype", expected=", ".join(DTYPES), found=wish, remedy="name one of these"
        )


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose headers are read, and whose model can be made.

    Args:
        checkpoint: that was opened.
        device: torch device.
        dtype: as for `opened`.
        trust: whether its code may run.
    """

    checkpoint: Checkpoint
    device: str
    dtype: str
    trust: bool

    @property
    def window(self) -> int | None:
        """Tokens that its positions are meant for; None where config.json does not say."""
        return self.checkpoint.window

    def load(self) -> Loaded:
        """Make model and tokenizer.

        Raises:
            InputError: no tokenizer, or tensors that do not fit the model's class.
            Unsupported: no class for the model.
            ResourceError: not enough memory.
        """
        from regraft.core.training.model import materialise_model, materialise_tokenizer

        dtype = _dtype(self.checkpoint, self.device) if self.dtype == "auto" else self.dtype
        tokenizer = materialise_tokenizer(self.checkpoint, trust_remote_code=self.trust)
        model = materialise_model(self.checkpoint, self.device, dtype, trust_remote_code=self.trust)
        return Loaded(self.checkpoint, model, tokenizer, self.device, dtype)


def opened(
    name: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    sources: Sequence[Source] = (),
) -> Opened:
    """Open a checkpoint, and refuse what can be refused from its headers.

    Args:
        name: whatever a recipe's base may be: a folder, a file, a hub id, `demo:tiny`.
        revision: branch, tag or commit of a hub id.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: one of `DTYPES`. `auto` is bfloat16 where the device is fast at it and the floating-point tensors are
            stored in 16 bits, and else float32.
        trust_remote_code: let Python code of the checkpoint run.
        sources: of plugins.

    Raises:
        UsageError: no such device or dtype.
        InputError: the checkpoint cannot be read.
        Unsupported: its model needs code which may not run.
        ResourceError: no such device.
    """
    from regraft.core.devices import resolve_device
    from regraft.core.sources import open_checkpoint

    check_dtype(dtype)
    place = resolve_device(device)
    checkpoint = open_checkpoint(name, revision=revision, extra=sources)
    _refuse_untrusted(checkpoint, trust_remote_code)
    return Opened(checkpoint, place, dtype, trust_remote_code)


def _refuse_untrusted(checkpoint: Checkpoint, trust: bool) -> None:
    from regraft.core.training.suitable import refuse_untrusted_code

    try:
        refuse_untrusted_code(checkpoint, trust=trust)
    except Unsupported as error:
        error.remedy = (
            "give --trust-remote-code if you trust its authors; or remove auto_map where the stock class computes "
            "the same"
        )
        raise


def _dtype(checkpoint: Checkpoint, device: str) -> str:
    from regraft.core.specs import FLOAT_CODES
    from regraft.core.training.modes import bf16_is_fast

    stored = {spec.dtype for spec in checkpoint.specs.values()} & FLOAT_CODES
    return "bfloat16" if stored and stored <= _SHORT_CODES and bf16_is_fast(device) else "float32"
