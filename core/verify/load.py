"""The deeper checks: does stock transformers load the folder, and does it compute?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from regraft.core.child import run_script
from regraft.core.errors import VerificationError
from regraft.core.verify import stock_load

Depth = Literal["structure", "load", "forward"]
_TIMEOUT_SECONDS = 1800
IGNORED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Endings of tensors that older checkpoints store and today's classes make themselves."""
_MESSAGES = {
    "missing_keys": "stock transformers misses tensors",
    "unexpected_keys": "stock transformers does not know tensors",
    "mismatched_keys": "stock transformers expects other shapes",
}


def verify_load(
    folder: Path, depth: Literal["load", "forward"], *, trust: bool, label: str | None = None
) -> dict[str, Any]:
    """Load `folder` in a fresh process by stock transformers, without regraft; run one batch if `depth` is `forward`.

    Args:
        folder: a checkpoint folder.
        depth: how deep.
        trust: whether code inside the folder may run: only code that regraft wrote, or that the recipe trusts.
        label: how messages name it; the folder if None.

    Raises:
        VerificationError: it does not load, a key is missing, unknown or of another shape, or logits are not finite.
    """
    arguments = (str(folder), depth, "1" if trust else "0")
    report = run_script(stock_load.__file__, *arguments, timeout_seconds=_TIMEOUT_SECONDS)
    where = label or str(folder)
    if "error" in report:
        verb = "compute with" if report.get("stage") == "forward" else "load"
        raise VerificationError(
            f"stock transformers cannot {verb} it", where=where, found=report["error"], remedy="see what it says"
        )
    for key, message in _MESSAGES.items():
        names = [name for name in report[key] if not name.endswith(IGNORED)]
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise VerificationError(
                message, where=where, expected="the tensors of its class", found=shown, remedy="check config.json"
            )
    if depth == "forward" and not report["finite"]:
        raise VerificationError(
            "the logits are not finite",
            where=where,
            expected="finite numbers",
            remedy="scan the weights with `regraft verify --deep`",
        )
    return report
