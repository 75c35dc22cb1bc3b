"""The toy of the paper (arXiv 2410.22269, section 4): its data, its networks, and all of them trained at once.

5000 points, 4000 to train on; two numbers in, as bins, and a third's bin out; an MLP 2-64-32-head with ReLU, Adam at
1e-3, batch 32, 50 bins. Every head on every data set with every seed is a row of one stack of networks, each with
weights of its own: a step of all of them is a few batched products, and costs what a step of one would. Heads on the
same points see the same batches. Fourier heads of fewer frequencies than the largest have zeros in their place, which
is the same density.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from regraft.kernels.fourier_logits import fourier_logits
from regraft.kernels.fourier_nll import fourier_nll
from regraft.plugins.fourier_head.metrics import divergence, smoothness

BINS, POINTS, TRAINED, BATCH, VARIANCE, FLOOR = 50, 5000, 4000, 32, 0.01, 50e-5
SHOWN = (10.0, 35.0)
"""The held-out point nearest to these two bins is drawn."""


@dataclass(frozen=True)
class Data:
    """Inputs [D, n, 2] as bin numbers, labels [D, n], and for the held-out points true masses [D, n, BINS]."""

    inputs: torch.Tensor
    labels: torch.Tensor
    held_inputs: torch.Tensor
    held_masses: torch.Tensor


def centres() -> torch.Tensor:
    return -1 + (2 * torch.arange(BINS, dtype=torch.float64) + 1) / BINS


def bin_of(values: torch.Tensor) -> torch.Tensor:
    return ((values + 1) / 2 * BINS).floor().long().clamp(0, BINS - 1)


def points(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y, z [POINTS], and the true masses of z given x and y [POINTS, BINS]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(POINTS, generator=generator, dtype=torch.float64) * 1.6 - 0.8

    def normal(middle: torch.Tensor) -> torch.Tensor:
        return middle + math.sqrt(VARIANCE) * torch.randn(POINTS, generator=generator, dtype=torch.float64)

    def bell(middle: torch.Tensor) -> torch.Tensor:
        return torch.exp(-((centres() - middle[:, None]) ** 2) / (2 * VARIANCE))

    x = uniform()
    if name == "gmm2":
        y = uniform()
        z = normal(torch.where(torch.rand(POINTS, generator=generator) < 0.5, x, y))
        return x, y, z, normed(normed(bell(x)) + normed(bell(y)))
    y = normal(x)
    if name == "gaussian":
        return x, y, normal(y), normed(bell(y))
    first, second = (100 * item.abs().clamp_min(1e-6) for item in (x, y))
    torch.manual_seed(seed)  # distributions draw from the global generator
    drawn = torch.distributions.Beta(first, second).sample()
    sign = torch.where(torch.rand(POINTS, generator=generator) < 0.5, 1.0, -1.0)
    places = centres().abs()
    logs = (first - 1)[:, None] * places.log() + (second - 1)[:, None] * (1 - places).log()
    return x, y, sign * drawn, normed(torch.exp(logs - logs.amax(1, keepdim=True)))


def normed(masses: torch.Tensor) -> torch.Tensor:
    return masses / masses.sum(-1, keepdim=True)


def data_of(sets: Sequence[tuple[str, int]]) -> Data:
    """The points of data sets and seeds."""
    parts = []
    for name, seed in sets:
        x, y, z, masses = points(name, seed)
        order = torch.randperm(POINTS, generator=torch.Generator().manual_seed(42))
        inputs = torch.stack([bin_of(x), bin_of(y)], 1)[order].float()
        parts.append((inputs, bin_of(z)[order], masses[order]))
    inputs, labels, masses = (torch.stack(item) for item in zip(*parts, strict=True))
    return Data(inputs[:, :TRAINED], labels[:, :TRAINED], inputs[:, TRAINED:], masses[:, TRAINED:])


class Stack:
    """Networks of H heads on D data sets, row h · D + d for head h on d; linear and mixture heads before Fourier heads.

    Args:
        heads: `linear`, `gmm`, `fourier-N`.
        sets: name and seed of each data set.
    """

    def __init__(self, heads: Sequence[str], sets: Sequence[tuple[str, int]]) -> None:
        self.heads, self.each = list(heads), len(sets)
        self.frequencies = [int(head.partition("-")[2]) for head in heads if head.startswith("fourier")]
        rows_of = {"linear": self.each, "gmm": self.each, "fourier": self.each * len(self.frequencies)}
        self.kinds = {kind: rows for kind, rows in rows_of.items() if kind in heads or (kind == "fourier" and rows)}
        generator = torch.Generator().manual_seed(0)
        rows = len(heads) * self.each

        def layer(rows: int, inputs: int, outputs: int, scale: float = 1.0) -> list[torch.Tensor]:
            bound = inputs**-0.5 * scale  # as nn.Linear begins
            shapes = ((rows, inputs, outputs), (rows, 1, outputs))
            return [(torch.rand(shape, generator=generator) * 2 - 1) * bound for shape in shapes]

        parameters = [*layer(rows, 2, 64), *layer(rows, 64, 32)]
        if "linear" in heads:
            parameters += layer(self.each, 32, BINS)
        if "gmm" in heads:
            parameters += [*layer(self.each, 32, 2), torch.full((self.each, 1, 2), math.log(math.expm1(2 / BINS)))]
        if self.frequencies:  # the paper divides a Fourier head's first weights by 100
            width = 2 * (max(self.frequencies) + 1)
            parameters += layer(self.each * len(self.frequencies), 32, width, 0.01)
        self.flat = torch.cat([one.flatten() for one in parameters])
        self.gradient = torch.zeros_like(self.flat)
        self.flat.grad = self.gradient
        self.parameters = []
        for one, gradient in zip(self.flat.split([one.numel() for one in parameters]),
                                 self.gradient.split([one.numel() for one in parameters]), strict=True):  # fmt: skip
            shape = parameters[len(self.parameters)].shape
            self.parameters.append(one.view(shape).requires_grad_())
            self.parameters[-1].grad = gradient.view(shape)
        # a Gaussian takes one component, so the second is away
        self.away = torch.tensor([-math.inf if name == "gaussian" else 0.0 for name, _ in sets])[:, None, None]
        self.mask = self._mask()
        self.middles = centres().float()

    def _mask(self) -> torch.Tensor | None:
        """[rows, 1, 2K] with zeros at frequencies that a head does not have."""
        if not self.frequencies or min(self.frequencies) == max(self.frequencies):
            return None
        count = max(self.frequencies) + 1
        masks = [(torch.arange(count) <= most).float().repeat(2) for most in self.frequencies]
        return torch.stack(masks).repeat_interleave(self.each, 0)[:, None]

    def outputs(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs [rows of the kind, n, width] by kind of head, for inputs [H · D, n, 2]."""
        first, one, second, two, *rest = self.parameters
        hidden = torch.baddbmm(two, torch.baddbmm(one, inputs, first).relu_(), second).relu_()
        found = {}
        for kind, own in zip(self.kinds, hidden.split(list(self.kinds.values())), strict=True):
            weight, bias, *rest = rest
            found[kind] = torch.baddbmm(bias, own, weight)
            rest = rest[1:] if kind == "gmm" else rest
        if self.mask is not None:
            found["fourier"] = found["fourier"] * self.mask
        return found

    def loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed over networks, mean over each one's batch; inputs [H · D, n, 2], labels [H · D, n]."""
        total, found = torch.zeros(()), self.outputs(inputs)
        for (kind, outputs), own in zip(found.items(), labels.split(list(self.kinds.values())), strict=True):
            wanted = own.flatten()
            if kind == "linear":
                total = total + F.cross_entropy(outputs.flatten(0, 1), wanted, reduction="sum")
            elif kind == "gmm":
                total = total + F.nll_loss(self._mixture(outputs).flatten(0, 1), wanted, reduction="sum")
            else:
                total = total + fourier_nll(outputs.flatten(0, 1), wanted, BINS, floor=FLOOR, reduction="sum")
        return total / inputs.shape[1]

    @torch.no_grad()
    def masses(self, inputs: torch.Tensor) -> torch.Tensor:
        """[H · D, n, BINS]."""
        found = []
        for kind, outputs in self.outputs(inputs).items():
            if kind == "fourier":
                masses = fourier_logits(outputs.flatten(0, 1), BINS, floor=FLOOR).exp()
                found.append(masses.view(*outputs.shape[:2], BINS))
            else:
                found.append(outputs.softmax(-1) if kind == "linear" else self._mixture(outputs).exp())
        return torch.cat(found)

    def _mixture(self, outputs: torch.Tensor) -> torch.Tensor:
        """Log-masses: equal parts, means in (-1, 1), widths that all inputs share; in logarithms: none vanishes."""
        widths = F.softplus(self._widths())
        scaled = (self.middles - outputs.tanh()[..., None]) * widths.reciprocal()[..., None]
        bells = scaled.square() * -0.5 - widths.log()[..., None]
        one, other = bells.unbind(-2)
        return torch.logaddexp(one, other + self.away).log_softmax(-1)

    def _widths(self) -> torch.Tensor:
        return self.parameters[8 if "linear" in self.heads else 6]


def train(heads: Sequence[str], sets: Sequence[tuple[str, int]], epochs: int) -> tuple[Data, torch.Tensor]:
    """The data, and the masses [H, D, n, BINS] that the trained heads give to held-out points."""
    data, stack = data_of(sets), Stack(heads, sets)
    optimizer = torch.optim.Adam([stack.flat], lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(len(sets))[:, None]
    for _ in range(epochs):
        order = torch.rand(len(sets), TRAINED, generator=generator).argsort(1)
        inputs, labels = data.inputs[row, order].repeat(len(heads), 1, 1), data.labels[row, order].repeat(len(heads), 1)
        for some, wanted in zip(inputs.split(BATCH, 1), labels.split(BATCH, 1), strict=True):
            stack.gradient.zero_()
            stack.loss(some, wanted).backward()
            optimizer.step()
    held = data.held_inputs.repeat(len(heads), 1, 1)
    return data, stack.masses(held).unflatten(0, (len(heads), len(sets)))


def figures(heads: Sequence[str], names: Sequence[str], seeds: Sequence[int], epochs: int) -> dict[str, dict]:
    """By head and data set: KL and smoothness of each seed, the true smoothness, and a density for the plot."""
    sets = [(name, seed) for name in names for seed in seeds]
    started = time.process_time()
    data, predicted = train(heads, sets, epochs)
    found: dict[str, dict] = {"seconds": {"cpu": time.process_time() - started}}
    for head, masses in zip(heads, predicted, strict=True):
        found[head] = {}
        for name in names:
            own = [index for index, one in enumerate(sets) if one[0] == name]
            show = int((data.held_inputs[own[0]] - torch.tensor(SHOWN)).square().sum(1).argmin())
            found[head][name] = {
                "kl": divergence(data.held_masses[own], masses[own].double()).mean(1).tolist(),
                "smoothness": smoothness(masses[own]).mean(1).tolist(),
                "truth": smoothness(data.held_masses[own]).mean().item(),
                "shown": masses[own[0], show].tolist(),
                "true": data.held_masses[own[0], show].tolist(),
            }
    return found
