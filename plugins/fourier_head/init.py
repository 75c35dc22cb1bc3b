"""The first values of the head: from the rows that the bins had, uniform, at random, or from another head's file."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from regraft.core.errors import InputError
from regraft.plugins.fourier_head.grid import Grid

_UPSTREAM = "fc_extract_autocorrelation_params"
_UPSTREAM_SHRINK = 100


def from_rows(rows: torch.Tensor, frequencies: int, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The head nearest to a softmax over `rows`, in closed form.

    √P is proportional to exp(logit / 2) ≈ 1 + w_j·h / 2, so with F = pinv(e^(iπ (l - N/2) z_j)) over the bins' centres
    a(h) = F (1 + W h / 2): the coefficients' weight is F W / 2 and their bias F 1. Turning all frequencies by N/2
    leaves the modulus alone. Rows lose their mean first: it moves all bins together, which is the gate's part.

    Args:
        rows: W [m, hidden], in the order of the bins.
        frequencies: N.
        grid: where the bins lie.

    Returns:
        Weight [2(N+1), hidden] and bias [2(N+1)], fp32; and the share of the rows' variance that N frequencies can
        follow, 1 for an ordinal range whose neighbours are alike, near (N+1)/m for one in no order.
    """
    wide = rows.double() - rows.double().mean(0)
    frequency = torch.arange(frequencies + 1, dtype=torch.float64) - frequencies / 2
    angles = math.pi * grid.centres()[:, None] * frequency
    waves = torch.complex(angles.cos(), angles.sin())
    inverse = torch.linalg.pinv(waves)
    weight, bias = inverse @ wide.to(waves.dtype) / 2, inverse.sum(1)
    followed = (waves @ weight * 2).real
    total = wide.square().sum()
    explained = float(1 - (wide - followed).square().sum() / total) if total > 0 else 1.0
    return _stacked(weight).float(), _stacked(bias).float(), explained


def uniform(frequencies: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The uniform density whatever the hidden state: a = (1, 0, ..., 0)."""
    bias = torch.zeros(2 * (frequencies + 1))
    bias[0] = 1
    return torch.zeros(len(bias), hidden), bias


def upstream(frequencies: int, hidden: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear layer's usual random start over a hundred, as the reference code begins: a random density."""
    generator, bound = torch.Generator().manual_seed(seed), hidden**-0.5 / _UPSTREAM_SHRINK
    count = 2 * (frequencies + 1)
    weight, bias = torch.rand(count, hidden, generator=generator), torch.rand(count, generator=generator)
    return (2 * weight - 1) * bound, (2 * bias - 1) * bound


def read_weights(path: Path, frequencies: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a head that the reference code has trained, or this step.

    Raises:
        InputError: the file cannot be read, or has no such tensors of these shapes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            "cannot be read as a .safetensors file", where=path, found=error,
            remedy="store the head's state_dict with safetensors.torch.save_file",
        ) from None  # fmt: skip
    found = []
    for kind, shape in (("weight", (2 * (frequencies + 1), hidden)), ("bias", (2 * (frequencies + 1),))):
        names = [name for name in tensors if name.endswith((f"{_UPSTREAM}.{kind}", f"fourier.{kind}"))]
        shown = [f"{name} {list(tensors[name].shape)}" for name in names or list(tensors)[:4]]
        if len(names) != 1 or tuple(tensors[names[0]].shape) != shape:
            raise InputError(
                f"has not the {kind} of a Fourier head with {frequencies} frequencies", where=path,
                expected=f"{_UPSTREAM}.{kind} {list(shape)}",
                found=", ".join(shown) or "nothing",
                remedy="set num_frequencies to those of the file, and take a head for this hidden size",
            )  # fmt: skip
        if not bool(tensors[names[0]].isfinite().all()):
            raise InputError("holds a number that is not finite", where=f"{path}: {names[0]}")
        found.append(tensors[names[0]].float())
    return found[0], found[1]


def appended_embeddings(embeddings: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Input rows [count, hidden] of new bins: the mean row, and around it a curve on which neighbours are alike.

    Four waves in random directions, as far from the mean as other rows are.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = embeddings.float()
    directions = torch.randn(8, wide.shape[1], generator=generator)
    angles = math.pi * Grid(count).centres().float()[:, None] * torch.arange(1, 5) / 2
    curve = torch.cat([angles.cos(), angles.sin()], 1) @ directions / 2
    return wide.mean(0) + curve * wide.std(0)


def _stacked(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values.real, values.imag], 0)
