"""How each stored tensor grows: which spans its axes are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

from regraft.core.architectures import Part
from regraft.core.architectures.layout import OUTSIDE, bias_name
from regraft.core.shape_operations import Resize, Spans
from regraft.plugins.grow.math import changes, copied, filled, joined, kept, split
from regraft.plugins.grow.params import GrowParams
from regraft.plugins.grow.sizes import Growth

TABLES = ("embed_tokens", "position_embeddings")
_SCALED_EMBEDDINGS = ("gemma2", "gemma3_text")
"""Families that multiply embeddings by the root of the hidden size."""


@dataclass(frozen=True)
class Stored:
    """A weight or a bias as the model stores it.

    Args:
        part: the part of the family that it is.
        bias: whether it is the part's bias.
    """

    part: Part
    bias: bool = False

    @property
    def silent(self) -> bool:
        """Whether the residual stream behind a layer hears nothing of attention or MLP if this is 0."""
        return set(self.part.role_names()) <= {"o_proj", "down_proj"}


@dataclass(frozen=True)
class Tensors:
    """The tensors of a model that grows.

    Args:
        growth: what grows.
        params: how.
    """

    growth: Growth
    params: GrowParams

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """Every tensor whose part in the model is known, by its name in the checkpoint."""
        found: dict[str, Stored] = {}
        layout, experts = self.growth.architecture.layout, self.growth.architecture.num_experts
        for layer in (OUTSIDE, *range(self.growth.architecture.num_layers)):
            for part in layout.present(layer):
                names = [name for name, _ in layout.specs(part, layer, experts)]
                biases = {bias_name(name) for name in names} if layout.has_bias(part) else set()
                for name in names:  # tied embeddings and head share a name: the embeddings come first and stay
                    found.setdefault(name, Stored(part, name in biases))
        return found

    def resized(self, name: str) -> Resize | None:
        """The operation that makes a tensor grow; None if it stays as it is."""
        stored = self.stored[name]
        part, first = stored.part, 1 if stored.part.experts is not None else 0
        columns_first = part.transposed and not stored.bias
        axes = {first + columns_first: self._rows(part)}
        if part.columns is not None and not stored.bias:
            axes[first + (not columns_first)] = self._columns(part)
        axes = {axis: spans for axis, spans in axes.items() if changes(spans)}
        if not axes:
            return None
        halves = any(span.half for spans in axes.values() for span in spans)
        noise, seed = (self.params.noise, self.params.seed) if halves else (0.0, 0)
        offset = self._offset(part)
        return Resize(name, axes, fill=1.0 - offset if self._norms_residual(part) else 0.0, offset=offset,
                      noise=noise, seed=seed)  # fmt: skip

    def old_extents(self, name: str) -> dict[int, int]:
        """The extents along the axes that grow, as config.json implies them."""
        operation, stored = self.resized(name), self.stored[name]
        shape = self.growth.architecture.layout.shape(stored.part)
        rows = (self.growth.architecture.layout.rows(stored.part),)
        return {axis: (rows if stored.bias else shape)[axis] for axis in (operation.axes if operation else ())}

    def _offset(self, part: Part) -> float:
        """1 for norms that store w - 1."""
        norm = part.columns is None
        return float(self.growth.architecture.norm_offset or 0.0) if norm else 0.0

    def _norms_residual(self, part: Part) -> bool:
        return part.columns is None and "hidden_size" in dict(part.roles).values()

    def _rows(self, part: Part) -> Spans:
        return joined(self._role_rows(part))

    def _role_rows(self, part: Part) -> Iterator[tuple[int, Spans]]:
        layout = self.growth.architecture.layout
        for role, size in part.roles:
            extent, scale = layout.size(size), self._row_scale(part, role)
            if size not in self.growth.sizes:
                yield extent, kept(extent, scale)
            elif size == "hidden_size":
                yield extent, filled(*self.growth.sizes[size], scale)
            else:
                yield extent, copied(*self.growth.sizes[str(size)], scale)

    def _columns(self, part: Part) -> Spans:
        size = part.columns
        assert size is not None
        extent = self.growth.architecture.layout.size(size)
        if size not in self.growth.sizes:
            return kept(extent)
        old, new = self.growth.sizes[str(size)]
        if size == "hidden_size":
            return filled(old, new) if self._writes_residual(part) else copied(old, new)
        if size == "q_size" or self.params.new_neurons == "zero":
            return filled(old, new)
        return split(old, new)

    def _writes_residual(self, part: Part) -> bool:
        """Whether the columns are channels that go into the residual stream: embeddings, and a head that is tied."""
        if set(part.role_names()) & set(TABLES):
            return True
        return "lm_head" in part.role_names() and self.growth.architecture.tie_word_embeddings

    def _row_scale(self, part: Part, role: str) -> float:
        """What the old rows of a role are multiplied by when the hidden size grows from d to D; s = sqrt(d/D).

        Over D channels, D - d of them 0, the mean square is d/D of what it was. With rms_norm_eps times d/D a norm
        gives 1/s of what it gave, which s in its weight takes back; and norms of queries and keys, which share that
        eps, see queries and keys times s. Where the class multiplies embeddings by sqrt(D) they are stored times s.
        A tied head is then s of what it was too, which the final norm takes back by keeping its weight.
        """
        if "hidden_size" not in self.growth.sizes:
            return 1.0
        root, architecture = sqrt(self.growth.hidden_ratio), self.growth.architecture
        embeddings_scaled = architecture.model_type in _SCALED_EMBEDDINGS
        if role in TABLES or (role == "lm_head" and architecture.tie_word_embeddings):
            return root if embeddings_scaled else 1.0
        if role == "final_norm" and embeddings_scaled and architecture.tie_word_embeddings:
            return 1.0
        if role in ("q_proj", "k_proj"):
            return root if architecture.qk_norm is not None else 1.0
        return root if self._norms_residual(part) else 1.0
