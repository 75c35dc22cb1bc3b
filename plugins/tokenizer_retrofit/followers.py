"""What else goes by the old ids beside the tables of the vocabulary: refused by name, so that nothing is left stale.

Heads for further tokens that share the tables of the model (Qwen3-Next) follow them by themselves and are no concern.
"""

from __future__ import annotations

import re

from regraft.core.architectures import architecture_of
from regraft.core.checkpoint import ADAPTER_CONFIG, CONFIG, Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.specs import TensorSpec
from regraft.plugins.tokenizer_retrofit.tables import Tables

_DRAFT_KEYS = ("draft_vocab_size", "speculators_model_type")
_DRAFT = re.compile(r"(?:.*\.)?(?:d2t|t2d)|fc\.weight")
"""EAGLE drafts: maps between the draft's ids and the model's, and what joins hidden state and embedding."""
_PER_LAYER = re.compile(r".*embed_tokens_per_layer\..*")
_FURTHER = re.compile(r".*\.shared_head\.head\..*|(?:.*\.)?(?:embed_tokens|lm_head)\.(?:weight|bias)|medusa_head\..*")
"""Tables of heads for further tokens: DeepSeek-V3 and its kin (in a layer behind the last), Medusa."""


def check_followers(checkpoint: Checkpoint, tables: Tables) -> None:
    """Whether the tables are all that has rows for the old ids.

    Args:
        checkpoint: whose vocabulary is to change.
        tables: of its vocabulary.

    Raises:
        Unsupported: an adapter lies beside the weights; the checkpoint is a draft for another model; a tensor outside
            the tables has, or may have, rows for tokens.
    """
    _refuse_adapter(checkpoint)
    _refuse_draft(checkpoint)
    architecture = architecture_of(checkpoint.config, checkpoint.specs)
    shapes = architecture.expected_specs()
    roleless = architecture.extra_specs
    for name, spec in checkpoint.specs.items():
        if name in tables.names:
            continue
        if _PER_LAYER.fullmatch(name):
            raise Unsupported("a second table of embeddings has rows for the old ids, for every layer", where=name,
                              found=spec, remedy="take a model without embeddings for each layer")  # fmt: skip
        if name not in shapes and not architecture.ignores(name) and _FURTHER.fullmatch(name):
            raise Unsupported(
                "a head for further tokens, or a second table, has rows for the old ids", where=name, found=spec,
                remedy="take that head out of the checkpoint (num_nextn_predict_layers is then 0)",
            )  # fmt: skip
        known = name in shapes and name not in roleless
        if not known and not architecture.ignores(name) and _has_rows(spec, tables.rows, stock=name in shapes):
            raise Unsupported(
                "another tensor may have a row for each token", where=name, found=spec,
                remedy="this model has more tables than embeddings and a head",
            )  # fmt: skip


def _has_rows(spec: TensorSpec, rows: int, *, stock: bool) -> bool:
    """Whether a tensor may be a table: by an axis, and, where the stock class has it, so that it may well have such an
    axis by chance, by its name too."""
    if stock:
        return len(spec.shape) == 2 and spec.rows == rows and "embed" in spec.name and "position" not in spec.name
    return 1 <= len(spec.shape) <= 2 and rows in spec.shape


def _refuse_adapter(checkpoint: Checkpoint) -> None:
    if ADAPTER_CONFIG in checkpoint.files:
        raise Unsupported(
            "an adapter lies beside the weights: it was trained on the old ids, and its weights are not rewritten",
            where=f"{checkpoint.label}: {ADAPTER_CONFIG}",
            remedy="move its files to a folder of their own, and merge it before: a step lora-merge",
        )  # fmt: skip


def _refuse_draft(checkpoint: Checkpoint) -> None:
    keys = [f"{CONFIG}: {key}" for key in _DRAFT_KEYS if key in checkpoint.config]
    found = [*keys, *(name for name in checkpoint.specs if _DRAFT.fullmatch(name))]
    if found:
        raise Unsupported(
            "is a draft for another model, and goes by that model's ids", where=f"{checkpoint.label}: {found[0]}",
            remedy="change the vocabulary of the model, and train a draft for the result anew",
        )  # fmt: skip
