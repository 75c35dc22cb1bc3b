"""The model of a checkpoint as an extension makes it, its own code included."""

from __future__ import annotations

from typing import Any

from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.patch import Patch
from regraft.core.transformation import Run


def model_of(checkpoint: Checkpoint, run: Run, patch: Patch | None = None, *, dtype: str = "float32") -> Any:
    """The model, so that it computes what a user of the checkpoint will see.

    Args:
        checkpoint: with `patch` laid over it.
        run: of the step.
        patch: that the checkpoint already holds; code in it comes from our template, and may run.
        dtype: of the weights.

    Raises:
        Unsupported: the checkpoint's model is code that may not run.
        RegraftError: as `materialise_model`.
    """
    trust = run.trust or _is_ours(checkpoint, patch)
    own = _auto_map(checkpoint).get("AutoModelForCausalLM")
    if own and not trust:
        raise Unsupported(
            "the model needs Python code of the checkpoint, which may not run",
            where=f"{checkpoint.label}: {CONFIG}: auto_map",
            found=own,
            remedy="set trust_remote_code = true under [base] if you trust its authors; or remove auto_map where the "
            "stock class computes the same",
        )
    return run.model(checkpoint, dtype=dtype, trust_remote_code=trust)


def _is_ours(checkpoint: Checkpoint, patch: Patch | None) -> bool:
    """Whether the patch brings a model's code, and there is no other code in the checkpoint."""
    code = {name for name in checkpoint.files if name.endswith(".py")}
    return patch is not None and bool(code) and code <= set(patch.files) and len(_auto_map(checkpoint)) == 1


def _auto_map(checkpoint: Checkpoint) -> dict[str, Any]:
    return dict(checkpoint.config.get("auto_map") or {})
