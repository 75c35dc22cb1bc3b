"""The values of the head's tensors at the start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from regraft.core.checkpoint import Checkpoint
from regraft.core.specs import torch_dtype
from regraft.core.transformation import Run
from regraft.plugins.fourier_head import init
from regraft.plugins.fourier_head.export import Aim, logit_scale
from regraft.plugins.fourier_head.grid import Grid
from regraft.plugins.fourier_head.params import FourierHeadParams


@dataclass(frozen=True)
class HeadValues:
    """What a head begins with.

    Args:
        tensors: by name, in the dtype of the head before.
        embeddings: rows of appended tokens, fp32; None without.
        explained: share of the rows' variance that the frequencies can follow; None without rows.
    """

    tensors: Mapping[str, torch.Tensor]
    embeddings: torch.Tensor | None
    explained: float | None


def grid_of(aim: Aim, params: FourierHeadParams) -> Grid:
    """Where the bins lie."""
    return Grid(aim.bins.count, "exact" if params.exact else "midpoint", params.margin, aim.bins.edges)


def head_values(checkpoint: Checkpoint, aim: Aim, params: FourierHeadParams, run: Run) -> HeadValues:
    """Compute them.

    Raises:
        InputError: the file of weights does not fit.
    """
    bins, hidden = aim.bins, aim.architecture.hidden_size
    head = checkpoint.load(aim.head)
    embeddings = None
    if bins.appended:
        table = checkpoint.load(aim.embeddings)
        embeddings = init.appended_embeddings(table[: bins.start], bins.count, run.seed_for("embeddings"))
    # new bins have no rows: the mean row of the vocabulary stands for each
    rows = head[: bins.start].float().mean(0).expand(bins.count, -1) if bins.appended else head[bins.start : bins.stop]
    scale, explained = logit_scale(aim, checkpoint.config), None
    if params.weights is not None:
        weight, bias = init.read_weights(params.weights, params.num_frequencies, hidden)
    elif params.init == "upstream":
        weight, bias = init.upstream(params.num_frequencies, hidden, run.seed_for("init"))
    elif params.init == "uniform" or bins.appended:
        weight, bias = init.uniform(params.num_frequencies, hidden)
    else:
        weight, bias, explained = init.from_rows(rows.float() * scale, params.num_frequencies, grid_of(aim, params))
    tensors = {}
    if params.mode == "hybrid" and params.gate == "linear":
        tensors["lm_head.gate.weight"] = rows.float().mean(0, keepdim=True) * scale
        tensors["lm_head.gate.bias"] = torch.tensor([math.log(bins.count)])
    elif params.mode == "hybrid" and not aim.tied:
        tensors["lm_head.gate.weight"] = rows.clone()
    tensors |= {"lm_head.fourier.weight": weight, "lm_head.fourier.bias": bias}
    stored = torch_dtype(checkpoint.specs[aim.head].dtype)
    return HeadValues({name: tensor.to(stored) for name, tensor in tensors.items()}, embeddings, explained)
