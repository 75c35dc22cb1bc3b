"""Whether a checkpoint's model may be run as it stands. Light: no torch."""

from __future__ import annotations

from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import Unsupported


def refuse_untrusted_code(checkpoint: Checkpoint, *, trust: bool) -> None:
    """Refuse a checkpoint that its own code defines: without that code the stock class would be another model.

    Args:
        checkpoint: whose model is to run.
        trust: whether its code may run; then nothing is refused.

    Raises:
        Unsupported: it has such code, and it may not run.
    """
    own = (checkpoint.config.get("auto_map") or {}).get("AutoModelForCausalLM")
    if own and not trust:
        raise Unsupported(
            "the model is defined by Python code of the checkpoint, which may not run",
            where=f"{checkpoint.label}: {CONFIG}: auto_map",
            found=own,
            remedy="set trust_remote_code = true under [base] if you trust its authors; or remove auto_map where the "
            "stock class computes the same",
        )
