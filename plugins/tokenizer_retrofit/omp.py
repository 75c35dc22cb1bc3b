"""Orthogonal matching pursuit: a donor's rows written in tokens that both vocabularies share, and read in ours.

Goddard and Fernandes Neto (arXiv 2506.06607), section 3: the donor's row of a new token is approximated by at most k of
the donor's rows of shared tokens, and the same coefficients on our rows of these tokens give ours. Atoms are compared
at unit length (Pati et al. 1993); by bare products the longest rows would be chosen over the nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regraft.core.errors import UsageError

if TYPE_CHECKING:
    import torch

_TINY = 1e-10


def pursue(
    atoms: torch.Tensor, targets: torch.Tensor, k: int, *, batch: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """The atoms chosen for each target, greedily, and the coefficients of the best fit by them.

    In each round the atom whose direction has the largest part of what is left is taken, and what is left is made
    orthogonal to all that were taken. A target that is met exactly takes coefficients of zero from there on.

    Args:
        atoms: [n, d], not zero.
        targets: [m, d].
        k: most atoms of a target.
        batch: targets at once.

    Returns:
        [m, k] int64 rows of `atoms`, all different in a row, and [m, k] float64.

    Raises:
        UsageError: k is larger than the number of atoms.
    """
    import torch

    if k > len(atoms):
        raise UsageError("there are fewer shared tokens than atoms to choose", where="atoms",
                         expected=f"at most {len(atoms)}", found=k, remedy="lower it")  # fmt: skip
    atoms = atoms.double()
    directions = torch.nn.functional.normalize(atoms)
    chosen = torch.empty(len(targets), k, dtype=torch.int64)
    weights = torch.zeros(len(targets), k, dtype=torch.float64)
    for start in range(0, len(targets), batch):
        piece = slice(start, start + batch)
        chosen[piece], weights[piece] = _pursue(atoms, directions, targets[piece].double(), min(k, len(atoms)))
    return chosen, weights


def _pursue(
    atoms: torch.Tensor, directions: torch.Tensor, targets: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch: a basis of the chosen atoms grows by Gram and Schmidt, twice over for its orthogonality."""
    import torch

    count, width = targets.shape
    rows = torch.arange(count)
    basis = targets.new_zeros(count, k, width)
    triangle = torch.eye(k, dtype=targets.dtype).repeat(count, 1, 1)
    free = torch.ones(count, len(atoms), dtype=torch.bool)
    chosen = torch.zeros(count, k, dtype=torch.int64)
    left, norm = targets.clone(), targets.norm(dim=1)
    parts = targets.new_zeros(count, k)
    for step in range(k):
        scores = (left @ directions.T).abs().masked_fill(~free, -1.0)
        best = scores.argmax(1)
        free[rows, best] = False
        chosen[:, step] = best
        rest = atoms[best].clone()
        for _ in range(2):
            along = torch.einsum("bkd,bd->bk", basis[:, :step], rest)
            rest -= torch.einsum("bkd,bk->bd", basis[:, :step], along)
            triangle[:, :step, step] += along
        length = rest.norm(dim=1)
        # An atom in the span of those before brings nothing; nor does any once the target is met.
        useful = (length > _TINY * atoms[best].norm(dim=1)) & (left.norm(dim=1) > _TINY * norm)
        basis[:, step] = torch.where(useful[:, None], rest / length.clamp(min=_TINY)[:, None], 0.0)
        triangle[:, step, step] = torch.where(useful, length, 1.0)
        parts[:, step] = (basis[:, step] * left).sum(1)
        left = left - parts[:, step, None] * basis[:, step]
    weights = torch.linalg.solve_triangular(triangle, parts[..., None], upper=True)[..., 0]
    return chosen, weights
