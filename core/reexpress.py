"""A checkpoint as another stock class that computes the same and has switches for biases that its own class lacks.

| from | to | when |
|---|---|---|
| qwen2, mistral, phi3 | llama | no layer has a sliding window |
| qwen2, mistral, phi3 | smollm3 | always: windows are copied, and rotary positions switched on in every layer |

phi3 with rotary positions on a part of each head is refused: neither class computes that. Only rows of fused tensors
move; no value changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from regraft.core.architectures import Architecture, Slot, architecture_of
from regraft.core.checkpoint import CONFIG, TOKENIZER_CONFIG, Checkpoint
from regraft.core.derived import open_rows
from regraft.core.errors import Unsupported
from regraft.core.jsonio import difference
from regraft.core.operations import Value
from regraft.core.patch import Edit
from regraft.core.reexpress_config import SOURCES, Source, target_config
from regraft.core.tensors import ByteRange, LazyTensor, RowReader

if TYPE_CHECKING:
    import torch

Target = Literal["llama", "smollm3"]
TARGETS: tuple[Target, ...] = ("llama", "smollm3")
"""In the order in which they are tried: more programs know the first."""

_FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@dataclass(frozen=True)
class Reexpression:
    """The same model as another class; the biases that its switches add are still to be filled in.

    Args:
        target: the `model_type`.
        architecture: the roles of the result.
        config: config.json of the result.
        edits, removals: how fused tensors come apart.
        json, dropped, notes: as in `Patch`.
    """

    target: Target
    architecture: Architecture
    config: Mapping[str, Any]
    edits: Mapping[str, Edit]
    removals: frozenset[str]
    json: Mapping[str, Mapping[str, Any]]
    dropped: Mapping[str, str]
    notes: tuple[str, ...]


def reexpress(
    checkpoint: Checkpoint,
    architecture: Architecture,
    target: Target,
    *,
    attention_bias: bool = True,
    mlp_bias: bool = False,
) -> Reexpression:
    """`checkpoint` as `target`, with biases switched on.

    Raises:
        Unsupported: the other class would not compute the same, or it is not known whether.
    """
    source = SOURCES.get(architecture.model_type)
    if source is None:
        raise Unsupported(
            "it is not known which other stock class computes what this one does",
            where="config.json: model_type",
            expected=" or ".join(SOURCES),
            found=architecture.model_type,
            remedy="use a site that the class has a bias for",
        )
    config = target_config(checkpoint.config, architecture.settings, source, target)
    biased = attention_bias or architecture.slot("q_proj", 0).bias is not None
    config |= {"attention_bias": biased, "mlp_bias": mlp_bias}
    after = architecture_of(config, checkpoint.specs)
    edits, removals = _split(checkpoint, architecture, after)
    tokenizer = _tokenizer(checkpoint, source)
    return Reexpression(
        target=target,
        architecture=after,
        config=config,
        edits=edits,
        removals=removals,
        json={CONFIG: difference(checkpoint.config, config), **tokenizer},
        dropped=_remote_code(checkpoint),
        notes=_notes(checkpoint, source, target, tokenizer),
    )


def _split(checkpoint: Checkpoint, before: Architecture, after: Architecture) -> tuple[dict[str, Edit], frozenset[str]]:
    """Edits that give every projection of a fused tensor a tensor of its own, and the fused tensors, which go."""
    edits: dict[str, Edit] = {}
    fused: set[str] = set()
    for layer in range(before.num_layers):
        for role in _FUSED:
            slot = before.slot(role, layer)
            if not slot.whole:
                name = after.slot(role, layer).tensor
                part = RowRange(name, checkpoint.tensor(slot.tensor), _run(slot))
                edits[name] = Edit(part.spec, Value(part))
                fused.add(slot.tensor)
    return edits, frozenset(fused)


def _run(slot: Slot) -> slice:
    (run,) = slot.rows
    return run


def _remote_code(checkpoint: Checkpoint) -> dict[str, str]:
    """Code files that config.json names for the class that is no longer there."""
    named = checkpoint.config.get("auto_map")
    entries: Sequence[Any] = list(named.values()) if isinstance(named, Mapping) else []
    files = {f"{entry.split('--')[-1].rpartition('.')[0]}.py" for entry in entries if isinstance(entry, str)}
    return dict.fromkeys(sorted(files & set(checkpoint.files)), "code of the class that the model was saved with")


def _tokenizer(checkpoint: Checkpoint, source: Source) -> dict[str, Mapping[str, Any]]:
    """Names the tokenizer's class where transformers would infer it from `model_type`, which is about to change."""
    if "tokenizer.json" not in checkpoint.files:
        return {}
    given = checkpoint.json(TOKENIZER_CONFIG)
    named = given.get("tokenizer_class")
    if given.get("auto_map") or (
        named and (source.tokenizer is None or named.removesuffix("Fast") == source.tokenizer)
    ):
        return {}
    return {TOKENIZER_CONFIG: {"tokenizer_class": source.tokenizer or "PreTrainedTokenizerFast"}}


def _notes(checkpoint: Checkpoint, source: Source, target: Target, tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    config, notes = checkpoint.config, []
    if tokenizer:
        named = tokenizer[TOKENIZER_CONFIG]["tokenizer_class"]
        notes.append(f"tokenizer_config.json names {named}, the class that transformers took by the old model_type")
    if any(config.get(key) for key in ("resid_pdrop", "embd_pdrop")):
        notes.append(f"{target} has no resid_pdrop and embd_pdrop: dropout of residuals and embeddings is gone")
    if source.model_type == "phi3" and (config.get("rope_scaling") or _scaled(config)):
        notes.append(
            "phi3 computes its cache anew when a generation passes original_max_position_embeddings; "
            f"{target} goes on with the keys it has"
        )
    return tuple(notes)


def _scaled(config: Mapping[str, Any]) -> bool:
    given = config.get("rope_parameters")
    return isinstance(given, Mapping) and given.get("rope_type", "default") != "default"


class RowRange(LazyTensor):
    """Some consecutive rows of a tensor under another name; bytes on disk where the tensor's are."""

    def __init__(self, name: str, source: LazyTensor, rows: slice) -> None:
        self.spec = replace(source.spec, name=name, shape=(rows.stop - rows.start, *source.spec.shape[1:]))
        self.sources = (source,)
        self.start = rows.start

    @property
    def row_local(self) -> bool:
        """As the tensor."""
        return self.sources[0].row_local

    @property
    def raw(self) -> ByteRange | None:
        """The rows' part of the tensor's bytes."""
        whole = self.sources[0].raw
        if whole is None:
            return None
        return ByteRange(whole.path, whole.offset + self.start * self.spec.row_bytes, self.spec.nbytes)

    @property
    def held_bytes(self) -> int:
        """As the tensor; all of it where it is computed at once."""
        source = self.sources[0]
        return source.held_bytes + (0 if source.row_local else 2 * source.spec.nbytes)

    def open(self, device: str = "cpu") -> RowReader:
        """Reads the rows."""
        read, first = open_rows(self.sources[0], device), self.start

        def rows(start: int, stop: int) -> torch.Tensor:
            return read(first + start, first + stop)

        return rows
