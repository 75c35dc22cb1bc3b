"""What a runtime finds beside itself: its policy, and the tokenizer that the policy was made for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Opened:
    """A policy and its surroundings.

    Args:
        folder: of the policy and the files that belong to it.
        policy: what policy.json says.
        tokenizer: of the checkpoint.
    """

    folder: Path
    policy: dict[str, Any]
    tokenizer: Tokenizer


def open_policy(name: str, checkpoint: Path | str | None) -> Opened:
    """Read the folder `name` of a checkpoint; None takes the checkpoint that this file stands in.

    Raises:
        ValueError: the policy is of another format, or not for this tokenizer.
    """
    root = Path(__file__).resolve().parent.parent if checkpoint is None else Path(checkpoint)
    policy, text = json.loads((root / name / "policy.json").read_text()), (root / "tokenizer.json").read_bytes()
    if policy["format"] != FORMAT:
        raise ValueError(f"policy.json has format {policy['format']}; this file reads {FORMAT}")
    if hashlib.sha256(text).hexdigest() != policy["tokenizer_sha256"]:
        step = name.replace("_", "-")
        raise ValueError(f"tokenizer.json has changed since the policy was made: run {step} again")
    tokenizer = Tokenizer.from_str(text.decode())
    tokenizer.no_padding()  # what the file says of both is for whole batches, as transformers makes them
    tokenizer.no_truncation()
    return Opened(root / name, policy, tokenizer)
