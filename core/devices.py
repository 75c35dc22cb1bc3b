"""Which device computes."""

from __future__ import annotations

import re

from regraft.core.errors import ResourceError, UsageError

_FORM = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")


def check_device(wish: str) -> None:
    """Refuse what names no device; whether there is such a one, `resolve_device` tells.

    Raises:
        UsageError: no such form.
    """
    if not _FORM.fullmatch(wish):
        expected = "auto, cpu, cuda or cuda:N"
        raise UsageError("unknown device", where="--device", expected=expected, found=wish, remedy="name one of these")


def resolve_device(wish: str, own: int | None = None) -> str:
    """The torch device string for `auto`, `cpu`, `cuda` or `cuda:N`.

    Args:
        wish: as the command line says.
        own: of several processes on this machine, the number of this one, and of its CUDA device.

    Raises:
        UsageError: no such form; or one device for several processes.
        ResourceError: there is no such device.
    """
    check_device(wish)
    if wish == "cpu":
        return "cpu"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wish == "auto" and not count:
        return "cpu"
    number = wish.partition(":")[2]
    if own is not None:
        if number:
            expected, remedy = "auto, cpu or cuda", "leave the number out: every process takes the device of its own"
            raise UsageError("several processes need a device each", where="--device", expected=expected, found=wish,
                             remedy=remedy)  # fmt: skip
        wish, number = f"cuda:{own}", str(own)
    if int(number or 0) >= count:
        raise ResourceError(
            "there is no such device",
            where="--device",
            expected=wish,
            found=f"{count} CUDA devices" if count != 1 else "cuda:0 alone",
            remedy="use --device cpu",
        )
    return f"cuda:{int(number or 0)}"
