"""Which device computes."""

from __future__ import annotations

from regraft.core.errors import ResourceError, UsageError


def resolve_device(wish: str) -> str:
    """The torch device string for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: no such form.
        ResourceError: there is no such device.
    """
    if wish == "cpu":
        return "cpu"
    kind, _, number = wish.partition(":")
    if wish != "auto" and (kind != "cuda" or (number and not number.isdigit()) or wish.endswith(":")):
        raise UsageError("unknown device", where="--device", expected="auto, cpu, cuda or cuda:N", found=wish)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wish == "auto":
        return "cuda:0" if count else "cpu"
    if int(number or 0) >= count:
        raise ResourceError(
            "there is no such device",
            where="--device",
            expected=wish,
            found=f"{count} CUDA devices",
            remedy="use --device cpu",
        )
    return f"cuda:{int(number or 0)}"
