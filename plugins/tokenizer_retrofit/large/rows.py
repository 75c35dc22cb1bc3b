"""Rows of the appended tokens, made and written some thousand at a time, so that memory does not grow with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import torch

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.header import render_header
from regraft.core.specs import TensorSpec
from regraft.plugins.tokenizer_retrofit.large.params import LargeVocabularyParams
from regraft.plugins.tokenizer_retrofit.rows import subtoken_means
from regraft.plugins.tokenizer_retrofit.tables import Tables
from regraft.plugins.tokenizer_retrofit.vocabulary import Origin

Role = Literal["embeddings", "head", "bias"]
Made = Mapping[Role, torch.Tensor]

ROWS_AT_ONCE = 4096
PROBED = 64
"""Old rows that the file holds too, by which the runtime sees whether the model has changed since."""


class RowFile:
    """A safetensors file whose tensors are written in pieces.

    Args:
        file: open for writing.
        specs: of its tensors.
    """

    def __init__(self, file: BinaryIO, specs: Sequence[TensorSpec]) -> None:
        header = render_header(specs, {"format": "pt"})
        self.file = file
        self.begins: dict[str, int] = {}
        self.row_bytes: dict[str, int] = {}
        at = len(header)
        for spec in specs:
            self.begins[spec.name], at = at, at + spec.nbytes
            self.row_bytes[spec.name] = spec.nbytes // spec.rows if spec.rows else 0
        file.write(header)
        file.truncate(at)

    def put(self, name: str, first: int, rows: torch.Tensor) -> None:
        """Write rows from the row `first` on."""
        self.file.seek(self.begins[name] + first * self.row_bytes[name])
        self.file.write(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_rows(
    path: Path,
    checkpoint: Checkpoint,
    tables: Tables,
    parts: Sequence[tuple[int, ...]],
    params: LargeVocabularyParams,
    tell: Callable[[str], None],
) -> None:
    """Write rows.safetensors: a tensor [n, ...] for each table of the model, and some of its own rows.

    Args:
        path: the file.
        checkpoint: whose rows they are made of.
        tables: of the checkpoint.
        parts: old ids that spell each token.
        params: init and hypernet.
        tell: shows progress.

    Raises:
        InputError, Unsupported: the hypernetwork cannot be used.
    """
    make = _maker(checkpoint, tables, params)
    specs = [checkpoint.specs[name] for name in tables.names]
    named = dict(zip(tables.by_role(), specs, strict=True))
    probed = torch.arange(PROBED) * tables.rows // PROBED
    own = checkpoint.load(tables.embeddings)[probed]
    header = [TensorSpec(role, spec.dtype, (len(parts), *spec.shape[1:])) for role, spec in named.items()]
    header += [TensorSpec("probe_ids", "I64", (PROBED,)),
               TensorSpec("probe_rows", named["embeddings"].dtype, tuple(own.shape))]  # fmt: skip
    with path.open("wb") as file:
        out = RowFile(file, header)
        out.put("probe_ids", 0, probed)
        out.put("probe_rows", 0, own)
        for start in range(0, len(parts), ROWS_AT_ONCE):
            for role, rows in make(parts[start : start + ROWS_AT_ONCE]).items():
                out.put(role, start, rows)
            if start % (16 * ROWS_AT_ONCE) == 0:
                tell(f"{start} of {len(parts)} rows made")


def pieces(path: Path, name: Role) -> Iterator[torch.Tensor]:
    """The rows of one tensor of the file, in order, some thousand at a time."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118 - a file, not a mapping
            return
        rows = file.get_slice(name)
        for start in range(0, rows.get_shape()[0], ROWS_AT_ONCE):
            yield rows[start : start + ROWS_AT_ONCE]


def _maker(
    checkpoint: Checkpoint, tables: Tables, params: LargeVocabularyParams
) -> Callable[[Sequence[tuple[int, ...]]], Made]:
    lazy = {role: checkpoint.tensor(name) for role, name in tables.by_role().items()}
    loaded = {role: tensor.load() for role, tensor in lazy.items()}

    def means(parts: Sequence[tuple[int, ...]]) -> dict[Role, torch.Tensor]:
        origins = [Origin(parts=part) for part in parts]
        return {
            role: subtoken_means(tensor, origins).operation(tensor.spec.name, 0).prepare("cpu")(
                0, len(parts), loaded[role]
            )
            for role, tensor in lazy.items()
        }  # fmt: skip

    if params.hypernet is None:
        return means
    from regraft.plugins.tokenizer_retrofit.hypernet import open_hypernet, predict

    network, language = open_hypernet(params.hypernet.folder), params.hypernet.language
    if network.shape.separate != ("head" in lazy):
        raise Unsupported(
            "the hypernetwork predicts rows of another kind of head", where=params.hypernet.folder,
            expected="a head of its own" if "head" in lazy else "a head tied to the embeddings",
            remedy="take the network made for this model",
        )  # fmt: skip
    roles: tuple[Role, ...] = ("embeddings", "head")
    table = torch.cat([loaded[role].float() for role in roles if role in loaded], dim=1)

    def predicted(parts: Sequence[tuple[int, ...]]) -> Made:
        made = means(parts) if "bias" in lazy and not network.shape.biased else {}
        for role, rows in zip(("embeddings", "head", "bias"), predict(network, parts, table, language), strict=True):
            if rows is not None and role in loaded:
                made[role] = rows.to(loaded[role].dtype)
        return made

    return predicted
