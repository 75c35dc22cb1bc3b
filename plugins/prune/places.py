"""Which matrices of a checkpoint are pruned, and which MLPs are switched off. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from regraft.core.architectures import Architecture, Slot, architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.host import host
from regraft.core.layers import layers_of
from regraft.core.sparse_operations import Sparsity
from regraft.core.specs import FLOAT_CODES
from regraft.plugins.prune.params import PruneParams, Role

ATTENTION: tuple[Role, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP: tuple[Role, ...] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Matrix:
    """One projection of one layer, or of one of its experts.

    Args:
        layer, role: which.
        expert: of a mixture, else None.
        slot: where it is stored.
    """

    layer: int
    role: str
    expert: int | None
    slot: Slot

    @property
    def name(self) -> str:
        """`layers.3.q_proj`, or `layers.3.experts.1.up_proj`."""
        expert = "" if self.expert is None else f"experts.{self.expert}."
        return f"layers.{self.layer}.{expert}{self.role}"

    @property
    def shape(self) -> tuple[int, int]:
        """Output rows and inputs."""
        assert self.slot.num_columns is not None
        return self.slot.num_rows, self.slot.num_columns


@dataclass(frozen=True)
class Places:
    """What the step touches.

    Args:
        architecture: of the checkpoint.
        matrices: that are pruned, layer by layer.
        skipped: layers whose MLP is switched off.
        sparsity: how much of a matrix goes.
    """

    architecture: Architecture
    matrices: tuple[Matrix, ...]
    skipped: tuple[int, ...]
    sparsity: Sparsity

    def by_tensor(self) -> dict[str, list[Matrix]]:
        """The matrices of each stored tensor."""
        found: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            found.setdefault(matrix.slot.tensor, []).append(matrix)
        return found

    def silenced(self) -> list[str]:
        """Tensors that become 0 to switch MLPs off."""
        found = []
        for layer in self.skipped:
            for matrix in matrices_of(self.architecture, layer, "down_proj"):
                found += [name for name in (matrix.slot.tensor, matrix.slot.bias) if name is not None]
        return list(dict.fromkeys(found))


def places_of(checkpoint: Checkpoint, params: PruneParams) -> Places:
    """The places that `params` name.

    Raises:
        UsageError: the model does not have one of the layers.
        Unsupported: no such projections, a pattern that does not fit, inputs of experts, or nothing to go.
        InputError: the tensors are not those of such a model.
    """
    architecture = architecture_of(checkpoint.config, checkpoint.specs, families=host().architectures())
    skipped = _skipped(architecture, params)
    matrices = tuple(_matrices(architecture, params, frozenset(skipped))) if params.prunes else ()
    places = Places(architecture, matrices, skipped, sparsity_of(params))
    _check_tensors(checkpoint, places)
    _check_fit(places, params)
    return places


def sparsity_of(params: PruneParams) -> Sparsity:
    """How much of a matrix goes, and what is compared."""
    if params.pattern is not None:
        keep, group = map(int, params.pattern.split(":"))
        return Sparsity(keep=keep, group=group)
    return Sparsity(params.sparsity or 0.0, whole=params.score == "magnitude")


def matrices_of(architecture: Architecture, layer: int, role: str) -> Iterator[Matrix]:
    """The matrix, or that of each expert. Raises Unsupported if the layer has no such role."""
    experts: range | tuple[None] = (None,)
    if architecture.num_experts and role in MLP and architecture.has("router", layer):
        experts = range(architecture.num_experts)
    for expert in experts:
        yield Matrix(layer, role, expert, architecture.slot(role, layer, expert))


def _skipped(architecture: Architecture, params: PruneParams) -> tuple[int, ...]:
    if params.skip_ffn is None:
        return ()
    if params.skip_ffn.start >= architecture.num_layers:
        raise UsageError(
            "there is no such layer",
            where="skip_ffn.start",
            expected=f"0 to {architecture.num_layers - 1}",
            found=params.skip_ffn.start,
            remedy="name a layer that the model has; they count from 0",
        )
    return tuple(range(params.skip_ffn.start, architecture.num_layers, params.skip_ffn.every))


def _matrices(architecture: Architecture, params: PruneParams, skipped: frozenset[int]) -> Iterator[Matrix]:
    layers = range(architecture.num_layers)
    for layer in layers if params.layers is None else layers_of(params.layers, architecture.num_layers):
        for role in dict.fromkeys(params.roles or _all_roles(architecture, layer)):
            if not (layer in skipped and role in MLP):
                yield from matrices_of(architecture, layer, role)


def _all_roles(architecture: Architecture, layer: int) -> tuple[Role, ...]:
    """Every projection; one that the table does not know is refused when it is asked for. Not every MLP has a gate."""
    mlp = tuple(role for role in MLP if role != "gate_proj" or architecture.has(role, layer))
    return (*ATTENTION, *mlp)


def _check_tensors(checkpoint: Checkpoint, places: Places) -> None:
    slots: Mapping[str, tuple[int, ...] | None] = {
        **dict.fromkeys(places.silenced()),
        **{matrix.slot.tensor: matrix.slot.shape for matrix in places.matrices},
    }
    for name, shape in slots.items():
        where = f"{checkpoint.label}: {name}"
        if name not in checkpoint.specs:
            raise InputError("a tensor of the model is missing", where=where,
                             remedy="check that every shard is there")  # fmt: skip
        spec = checkpoint.specs[name]
        if shape is not None and spec.shape != shape:
            raise InputError("config.json says another shape", where=where, expected=list(shape), found=spec,
                             remedy="correct config.json")  # fmt: skip
        if spec.dtype not in FLOAT_CODES:
            raise Unsupported("a tensor is in a dtype that cannot be computed with", where=where, found=spec.dtype,
                              expected=", ".join(sorted(FLOAT_CODES)), remedy="use an unquantised base")  # fmt: skip


def _check_fit(places: Places, params: PruneParams) -> None:
    for matrix in places.matrices:
        group, (_, columns) = places.sparsity.group, matrix.shape
        if group and columns % group:
            raise Unsupported(f"a pattern of {group} needs a whole number of groups", where=matrix.name,
                              expected=f"a multiple of {group} inputs", found=columns,
                              remedy="give sparsity, or leave the role out")  # fmt: skip
        if params.score == "wanda" and matrix.expert is not None:
            raise Unsupported(
                "the class computes all experts at once, so the inputs of one cannot be measured", where=matrix.name,
                expected='score = "magnitude", or roles without the MLP\'s', found='score = "wanda"',
                remedy='give roles = ["q_proj", "k_proj", "v_proj", "o_proj"], or score = "magnitude"',
            )  # fmt: skip
    if params.prunes and not places.matrices:
        raise UsageError("nothing is left to prune: the layers' MLPs are switched off whole", where="skip_ffn",
                         remedy="name other roles or layers, or leave sparsity and pattern out")  # fmt: skip
    if params.prunes and not any(places.sparsity.count(*matrix.shape) for matrix in places.matrices):
        widest = max((matrix.shape[1] for matrix in places.matrices), default=0)
        raise Unsupported("so little goes that nothing would: the result would be the base itself", where="sparsity",
                          expected=f"at least 1 of {widest} inputs", found=params.sparsity,
                          remedy="give more, or remove the step")  # fmt: skip
