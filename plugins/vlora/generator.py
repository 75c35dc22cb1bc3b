"""The perceptual weights generator: from an image's features to low-rank factors.

Ma et al., Visual Perception by Large Language Model's Weights (NeurIPS 2024, arXiv 2405.20339), section 3.2.

    F = X Wpᵀ + bp + E_pos                       X [N, P, dv], F [N, P, dg]
    q ← q + SelfAttn(LN₁ q)                      q [N, T·L', dg], learnt queries
    q ← q + CrossAttn(LN₂ q, F, F)               F is not normed
    q ← q + W₂ gelu(W₁ LN₃ q)                    `depth` times
    A_t = reshape(W_h LN(q) + b_h)               [N, d_in(t), r] for each type t and active layer
    ΔW = s · B_t A_tᵀ                            B_t [d_out(t), r]: a parameter of each type and layer, at first zero

The paper has one width for all; here each type has its own d_in and d_out, so that grouped key-value heads and heads
that are wider or narrower than the hidden size fit.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from regraft.plugins.vlora.settings import GeneratorSettings

STD = 0.02
"""Standard deviation of the linear layers at the start."""

Factors = dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]
"""By type and layer (from 0): A [N, d_in(t), r] and B [d_out(t), r]; the delta is s·B Aᵀ."""


class Block(nn.Module):
    """Self-attention among queries, cross-attention to the image's features, feed-forward; normed before each."""

    def __init__(self, dim: int, heads: int, ffn_size: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.linear1 = nn.Linear(dim, ffn_size)
        self.linear2 = nn.Linear(ffn_size, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, query: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Queries [N, n, dg] and features [N, P, dg] to queries [N, n, dg]."""
        normed = self.norm1(query)
        query = query + self.self_attn(normed, normed, normed, need_weights=False)[0]
        query = query + self.cross_attn(self.norm2(query), features, features, need_weights=False)[0]
        out: torch.Tensor = query + self.linear2(F.gelu(self.linear1(self.norm3(query))))
        return out


class SubGenerator(nn.Module):
    """Queries of some types, the blocks that they run through, and an output head for each width of A.

    Args:
        settings: of the generator.
        types: those that it makes factors for.
    """

    def __init__(self, settings: GeneratorSettings, types: str) -> None:
        super().__init__()
        dim, layers = settings.dim, len(settings.active_layers)
        self.types, self.layers, self.rank, self.inputs = types, layers, settings.rank, settings.inputs
        self.queries = nn.Parameter(torch.empty(1, len(types) * layers, dim))
        self.decoders = nn.ModuleList(Block(dim, settings.heads, settings.ffn_size) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(dim)
        self.weights_head = nn.ModuleDict(
            {str(width): nn.Linear(dim, width * settings.rank) for width in settings.head_widths(types)}
        )

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features [N, P, dg] to A [N, L', d_in(t), r] of every type t."""
        query = self.queries.expand(features.shape[0], -1, -1)
        for block in self.decoders:
            query = block(query, features)
        found = {}
        for letter, part in zip(self.types, self.norm(query).split(self.layers, dim=1), strict=True):
            width = self.inputs[letter]
            found[letter] = self.weights_head[str(width)](part).unflatten(-1, (width, self.rank))
        return found


class PerceptualGenerator(nn.Module):
    """An image's features to the factors of every type and active layer.

    Its tensors are those of `settings.shapes()`, without values until `initialise` or `load_state_dict`.

    Args:
        settings: its sizes.
    """

    def __init__(self, settings: GeneratorSettings) -> None:
        super().__init__()
        self.settings = settings
        layers = len(settings.active_layers)
        self.visual_proj = nn.Linear(settings.visual_dim, settings.dim)
        self.pos_embed = nn.Parameter(torch.empty(1, settings.pos_num, settings.dim))
        self.gen = nn.ModuleDict({name: SubGenerator(settings, types) for name, types in settings.groups.items()})
        self.B = nn.ParameterDict(
            {t: nn.Parameter(torch.empty(layers, settings.outputs[t], settings.rank)) for t in settings.types}
        )

    @property
    def scale(self) -> float:
        """s of ΔW = s·B Aᵀ."""
        return self.settings.scale

    def forward(self, features: torch.Tensor, present: torch.Tensor | None = None) -> Factors:
        """The factors.

        Args:
            features: [N, P, dv].
            present: [N] bool; False for a row without an image, whose A is zero: the language model stays as it is.

        Returns:
            For each type and active layer A [N, d_in(t), r] and B [d_out(t), r], both without the scale.
        """
        features = self.visual_proj(features) + self.pos_embed
        found: Factors = {}
        for sub in self.gen.values():
            for letter, left in sub(features).items():
                if present is not None:
                    left = left * present.to(left.dtype)[:, None, None, None]
                for index, layer in enumerate(self.settings.active_layers):
                    found[letter, layer] = left[:, index], self.B[letter][index]
        return found

    @torch.no_grad()
    def initialise(self, seed: int) -> PerceptualGenerator:
        """Random values as the paper's code gives them, on the CPU, from `seed` alone.

        Linear layers truncated normal with 0.02, attention's input projections Xavier uniform, queries and positions
        N(0, 1), norms 1, biases and B zero, so that every delta is zero.
        """
        random = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            kind = name.split(".")[-1]
            if kind == "in_proj_weight":
                nn.init.xavier_uniform_(parameter, generator=random)
            elif kind in ("queries", "pos_embed"):
                parameter.normal_(generator=random)
            elif "norm" in name and kind == "weight":
                parameter.fill_(1.0)
            elif kind == "weight":
                nn.init.trunc_normal_(parameter, std=STD, generator=random)
            else:
                parameter.zero_()
        return self


def empty_generator(settings: GeneratorSettings) -> PerceptualGenerator:
    """A generator on the meta device: shapes without memory; nothing random is drawn."""
    with torch.device("meta"):
        return PerceptualGenerator(settings)


def new_generator(settings: GeneratorSettings, seed: int) -> PerceptualGenerator:
    """A generator as it stands before training, fp32 on the CPU; torch's own random state stays as it is."""
    return empty_generator(settings).to_empty(device="cpu").initialise(seed)
